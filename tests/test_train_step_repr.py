"""repr of a TrainStep: the layers, the criterion, the optimizer and the options, and no data."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlp_ext import LinearGELU, TrainStep, fuse


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())


def sgd(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.01, **options})


def test_model_criterion_and_optimizer() -> None:
    model = mlp()
    step = TrainStep(model, nn.MSELoss(), sgd(model))
    assert repr(step) == "TrainStep(10-5-1 relu sigmoid, MSELoss(), SGD(lr=0.01))"


def test_options() -> None:
    model = mlp()
    step = TrainStep(model, nn.MSELoss(), sgd(model), max_norm=1.0, accumulate=4)
    assert repr(step).endswith(", SGD(lr=0.01), max_norm=1.0, accumulate=4)")


@pytest.mark.parametrize("level", ["layers", "stack"])
def test_other_modules(level: str) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Sequential(LinearGELU(784, 64), nn.Dropout()), nn.Linear(64, 10)
    )
    step = TrainStep(fuse(model, level), nn.CrossEntropyLoss(), sgd(model))
    assert "(784-64-10 gelu identity, CrossEntropyLoss(), " in repr(step)


def test_options_of_the_optimizer_that_are_not_defaults() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.999), maximize=True)
    step = TrainStep(model, nn.MSELoss(), optimizer)
    assert ", AdamW(lr=0.001, betas=(0.8, 0.999), maximize=True))" in repr(step)


def test_groups_of_the_optimizer() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    step = TrainStep(model, nn.MSELoss(), optimizer)
    assert ", SGD(lr=[0.1, 0.01], momentum=0.9))" in repr(step)


def test_functions_as_criterion_without_their_data() -> None:
    model = mlp()
    assert ", mse_loss, " in repr(TrainStep(model, F.mse_loss, sgd(model)))
    weight = torch.full((1,), 7.25)
    criterion = partial(F.binary_cross_entropy_with_logits, pos_weight=weight, reduction="sum")
    text = repr(TrainStep(model, criterion, sgd(model, lr=torch.tensor(7.25))))
    assert "(pos_weight=torch.Tensor, reduction='sum'), SGD(lr=torch.Tensor))" in text
    assert "7.25" not in text


def test_changes_are_seen() -> None:
    model = mlp()
    optimizer = sgd(model)
    step = TrainStep(model, nn.MSELoss(), optimizer)
    twin = copy.deepcopy(step)  # which has not read its parts yet
    model[1] = nn.Tanh()
    optimizer.param_groups[0]["lr"] = 0.5
    assert repr(step) == "TrainStep(10-5-1 tanh sigmoid, MSELoss(), SGD(lr=0.5))"
    assert repr(twin) == "TrainStep(10-5-1 relu sigmoid, MSELoss(), SGD(lr=0.01))"


def test_model_that_a_step_no_longer_takes() -> None:
    model = mlp()
    step = TrainStep(model, nn.MSELoss(), sgd(model))
    model[1] = nn.PReLU()
    assert repr(step) == "TrainStep(Sequential, MSELoss(), SGD(lr=0.01))"
    del model[0], model[0], model[0], model[0]
    assert repr(step).startswith("TrainStep(Sequential, ")
