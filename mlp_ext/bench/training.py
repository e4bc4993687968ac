"""Networks, losses, optimizers and kinds of steps of the demo and the benchmarks.

To add one, add a row to its table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlp_ext.fuse import fuse
from mlp_ext.nn import MODULES
from mlp_ext.train_step import TrainStep

Step = Callable[[Tensor, Tensor], Tensor]  # input [M, K], target [M, N] -> loss []


class Loss(NamedTuple):
    criterion: Callable[[], nn.Module]
    last: Callable[[], nn.Module] = nn.Sigmoid  # after the last layer; Identity for logits


LOSSES: dict[str, Loss] = {  # losses for targets in [0, 1] or class probabilities
    "mse": Loss(nn.MSELoss),
    "bce": Loss(nn.BCELoss),
    "bce_with_logits": Loss(nn.BCEWithLogitsLoss, nn.Identity),
    "l1": Loss(nn.L1Loss),
    "smooth_l1": Loss(nn.SmoothL1Loss),
    "huber": Loss(nn.HuberLoss),
    "cross_entropy": Loss(nn.CrossEntropyLoss, nn.Identity),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


def sgd_step(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """The usual eager training step."""

    def step(input: Tensor, target: Tensor) -> Tensor:
        # forward
        loss: Tensor = criterion(model(input), target)
        # backward
        optimizer.zero_grad()
        loss.backward()
        # update
        optimizer.step()
        return loss.detach()

    return step


@dataclass(frozen=True)
class Layers:
    """Makes a training step from a torch.nn model, a loss and an optimizer. The step updates the
    model's own Parameters."""

    step: Callable[[nn.Module, nn.Module, torch.optim.Optimizer], Step]
    change: Callable[[nn.Module], nn.Module] = lambda model: model  # before the step is made

    def __call__(
        self, model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer
    ) -> Step:
        return self.step(self.change(model), criterion, optimizer)


LAYERS: dict[str, Layers] = {
    "native": Layers(sgd_step),
    "fused": Layers(sgd_step, fuse),
    "stack": Layers(sgd_step, partial(fuse, level="stack")),
    "step": Layers(TrainStep),
    "fit": Layers(TrainStep),  # whole epochs in one call, where the caller has them
}


def make_mlp(
    widths: Sequence[int],
    seed: int = 0,
    activation: str = "relu",
    last: Callable[[], nn.Module] = nn.Sigmoid,
) -> nn.Sequential:
    """Linear layers of these widths, input first, with `activation` between and `last` at the end.

    activation: a name in mlp_ext.ACTIVATIONS; its options have their defaults. float32 on the CPU,
    the same initial weights for the same seed; torch's own random state is left unchanged. Raises
    ValueError for fewer than two widths.
    """
    if len(widths) < 2:
        raise ValueError(f"make_mlp: widths must name input and output, got {list(widths)}")
    make = MODULES[activation]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = [m for k, n in pairwise(widths) for m in (nn.Linear(k, n), make())]
    return nn.Sequential(*layers[:-1], last())
