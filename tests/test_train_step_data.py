"""Data and losses of training loops: more dimensions, other dtypes, functions."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eager_steps import assert_as_eager, net, sgd
from torch import Tensor, nn

from mlp_ext import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")


# --- Data ---


def test_input_of_three_dimensions() -> None:
    shape = (4, 5)
    assert_as_eager(net(), x=lambda: torch.randn(*shape, 8), y=lambda: torch.rand(*shape, 4))


def test_input_of_one_dimension() -> None:
    assert_as_eager(net(), x=lambda: torch.randn(8), y=lambda: torch.rand(4))
    assert_as_eager(
        net(), nn.CrossEntropyLoss(), x=lambda: torch.randn(8), y=lambda: torch.tensor(2)
    )


def test_classes_of_three_dimensions_say_what_to_pass() -> None:
    model = net()
    step = TrainStep(model, nn.CrossEntropyLoss(), sgd(model.parameters()))
    with pytest.raises(
        ValueError, match=r"classes along dimension 1 .*; pass input.flatten\(0, -2"
    ):
        step(torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(ignore_index=1), nn.NLLLoss()])
def test_classes_of_uint8(criterion: nn.Module) -> None:
    assert_as_eager(net(), criterion, y=lambda: torch.randint(4, (10,), dtype=torch.uint8))


@pytest.mark.parametrize(
    "criterion",
    [
        nn.MSELoss(),
        nn.L1Loss(),
        nn.SmoothL1Loss(),
        nn.BCEWithLogitsLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
)
def test_targets_of_float64(criterion: nn.Module) -> None:
    def target() -> Tensor:
        return torch.rand(10, 4).double().softmax(1)

    assert_as_eager(net(), criterion, y=target)
    model = net()
    loss = TrainStep(model, criterion, sgd(model.parameters()))(torch.randn(10, 8), target())
    assert loss.dtype is torch.float64


@pytest.mark.parametrize("criterion", [nn.HuberLoss(), nn.BCELoss()])
def test_targets_of_float64_that_torch_refuses(criterion: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid())
    step = TrainStep(model, criterion, sgd(model.parameters()))
    with pytest.raises(
        RuntimeError, match=r"target is float64, the model float32; pass target.float"
    ):
        step(torch.randn(10, 8), torch.rand(10, 4).double())


@pytest.mark.parametrize("call", ["step", "fit"])
def test_numpy_arrays_are_refused_in_one_line(call: str) -> None:
    model = net()
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    x, y = np.ones((500, 8), np.float32), np.ones((500, 4), np.float32)
    call_it = step if call == "step" else step.fit
    for arguments, name in (
        ((x, torch.from_numpy(y)), "input"),
        ((torch.from_numpy(x), y), "target"),
    ):
        with pytest.raises(TypeError, match=rf"pass torch\.from_numpy\({name}\)$") as caught:
            call_it(*arguments)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 120


# --- Losses ---


CLASSES = F.cross_entropy, F.nll_loss
FUNCTIONS = [
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    *CLASSES,
    partial(F.mse_loss, reduction="sum"),
    partial(F.smooth_l1_loss, beta=0.3),
    partial(F.huber_loss, delta=0.2),
    partial(F.cross_entropy, label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 3.0, 4.0])),
    partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor([1.0, 2.0, 3.0, 4.0])),
]


def _name(function: Any) -> str:
    if isinstance(function, partial):
        return "_".join([function.func.__name__, *function.keywords])
    return str(function.__name__)


@pytest.mark.parametrize("function", FUNCTIONS, ids=_name)
def test_functions_as_criterion(function: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid())
    of_classes = getattr(function, "func", function) in CLASSES
    y = (lambda: torch.randint(4, (10,))) if of_classes else (lambda: torch.rand(10, 4))
    assert_as_eager(model, function, partial(torch.optim.SGD, lr=0.01), y=y)


def test_keywords_of_a_partial_are_followed_or_refused() -> None:
    model, x, y = net(), torch.randn(10, 8), torch.rand(10, 4)
    criterion = partial(F.mse_loss, reduction="mean")
    step = TrainStep(model, criterion, sgd(model.parameters()))
    loss = criterion(model(x), y)
    torch.testing.assert_close(step(x, y), loss)
    criterion.keywords["reduction"] = "sum"
    loss = criterion(model(x), y)
    torch.testing.assert_close(step(x, y), loss)
    criterion.keywords["size_average"] = False
    with pytest.raises(ValueError, match="criterion has the keyword size_average, which is not"):
        step(x, y)
