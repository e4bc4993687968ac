"""opacus: gradients for each sample, by hooks on the layers, in three modes."""

import pytest
import torch
from clients import NATIVE, classes, close, levels, net, rows
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@levels
@pytest.mark.parametrize("force_functorch", [False, True])
def test_gradients_of_each_sample(level: str, force_functorch: bool) -> None:
    samples: list[list[Tensor]] = []
    for kind in (NATIVE, level):
        model = GradSampleModule(net(kind), force_functorch=force_functorch)
        nn.functional.cross_entropy(model(rows()), classes()).backward()
        samples.append([p.grad_sample for p in model.parameters()])
    close(samples[1], samples[0])


@levels
def test_private_training(level: str) -> None:
    trained = []
    for kind in (NATIVE, level):
        model = net(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(TensorDataset(rows(40), classes(40)), batch_size=10)
        torch.manual_seed(0)
        private, optimizer, batches = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            noise_generator=torch.Generator().manual_seed(0),
            batch_first=True,
        )
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(private(x), y).backward()
            optimizer.step()
        trained.append([p.detach() for p in model.parameters()])
    close(trained[1], trained[0], rtol=1e-4, atol=1e-5)
