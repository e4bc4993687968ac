"""Losses at extreme values: the loss and its gradient are those of eager."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from steps import LOSSES, Training, assert_steps_match_eager, make_net
from torch import Tensor, nn

from mlp_ext import TrainStep, TrainSteps
from mlp_ext.bench.training import sgd_step

pytestmark = pytest.mark.isa

Result = tuple[Tensor, Tensor]  # the loss, and the gradient of the bias
HUGE = 3e38  # twice that is infinite in float32
VALUES = [math.nan, math.inf, -math.inf, HUGE, -HUGE, 1e30, 1.0, 0.0, -0.0, -1.0, 1e-40]
OUTPUTS, TARGETS = torch.tensor([*itertools.product(VALUES, VALUES)]).T


def model_of(bias: Tensor) -> nn.Linear:
    model = nn.Linear(1, len(bias))
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(bias)
    return model


def momentum(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)


def results(run: str, model: nn.Linear, criterion: nn.Module, x: Tensor, target: Tensor) -> Result:
    """After one step, whose momentum buffer is the gradient."""
    optimizer = momentum([*model.parameters()])
    if run == "many":
        loss = TrainSteps([model], criterion, [optimizer])(x, target)[0]
    else:
        loss = {"eager": sgd_step, "step": TrainStep}[run](model, criterion, optimizer)(x, target)
    return loss, optimizer.state[model.bias]["momentum_buffer"]


def assert_as_eager(
    make: Callable[[], nn.Linear], criterion: nn.Module, x: Tensor, target: Tensor, atol: float
) -> None:
    expected = results("eager", make(), criterion, x, target)
    for run in ("step", "many"):
        found = results(run, make(), criterion, x, target)
        torch.testing.assert_close(found, expected, equal_nan=True, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [1, 16], ids=["blocks", "lanes"])
@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss,
        nn.L1Loss,
        nn.SmoothL1Loss,
        lambda **r: nn.SmoothL1Loss(beta=1e38, **r),
        lambda **r: nn.SmoothL1Loss(beta=0.0, **r),
        nn.HuberLoss,
        lambda **r: nn.HuberLoss(delta=1e38, **r),
        nn.BCEWithLogitsLoss,
        lambda **r: nn.BCEWithLogitsLoss(pos_weight=torch.full_like(OUTPUTS, 0.25), **r),
        lambda **r: nn.BCEWithLogitsLoss(pos_weight=torch.full_like(OUTPUTS, 4.0), **r),
    ],
    ids=[
        *("mse", "l1", "smooth_l1", "wide", "beta_0", "huber", "delta"),
        *("bce_with_logits", "pos_weight_quarter", "pos_weight_4"),
    ],
)
def test_extreme_outputs_and_targets(
    loss: Callable[..., nn.Module], rows: int, reduction: str
) -> None:
    """Each pair of such values is an output: NaN and infinite where eager's gradients are."""
    x, target = torch.zeros(rows, 1), TARGETS.expand(rows, -1).contiguous()
    assert_as_eager(lambda: model_of(OUTPUTS), loss(reduction=reduction), x, target, 1e-44)


def test_a_mean_of_huge_differences_has_a_finite_gradient() -> None:
    """2 (y - t) overflows, its share of the mean does not."""
    target = torch.full((1, 30), -HUGE)
    criterion = nn.MSELoss()
    _, gradient = results("step", model_of(torch.zeros(30)), criterion, torch.zeros(1, 1), target)
    torch.testing.assert_close(gradient, torch.full((30,), 2 * HUGE / 30))


WEIGHT = torch.tensor([0.5, 2.0, 1.5])


@pytest.mark.parametrize("rows", [1, 16], ids=["blocks", "lanes"])
def test_bce_of_saturated_sigmoids_in_float64(rows: int) -> None:
    model = nn.Sequential(
        model_of(torch.tensor([-40.0, -28.0, -27.0, 28.0])), nn.Sigmoid()
    ).double()
    x, target = torch.ones(rows, 1).double(), torch.full((rows, 4), 0.3).double()
    steps = {}
    for make in (sgd_step, TrainStep):
        net = deepcopy(model)
        make(net, nn.BCELoss(), torch.optim.SGD(net.parameters(), lr=1.0))(x, target)
        steps[make] = net[0].weight.detach()  # from 0
    torch.testing.assert_close(steps[TrainStep], steps[sgd_step], atol=0, rtol=1e-12)


@pytest.mark.parametrize("rows", [4, 40], ids=["blocks", "lanes"])
@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(WEIGHT, reduction="sum"),
        nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"),
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1),
        nn.NLLLoss(WEIGHT),
    ],
    ids=["mean", "weighted", "smoothing", "weighted_smoothing", "nll"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e30, 2.0])
def test_ignored_row(value: float, criterion: nn.Module, rows: int) -> None:
    """Its logits are slopes times this value. Its gradient is 0 softmax(z), NaN where that is."""
    for slopes in ([1.0, 0.5, -1.0], [1e30, 0.0, 1e-30]):

        def make(slopes: list[float] = slopes) -> nn.Linear:
            model = model_of(torch.tensor([0.1, 0.2, 0.3]))
            with torch.no_grad():
                model.weight.copy_(torch.tensor(slopes)[:, None])
            return model

        for ignored in (slice(1, 2), slice(None)):
            x = torch.linspace(-1e-30, 1e-30, rows)[:, None]
            target = torch.arange(rows) % 3
            x[1], target[ignored] = value, -100
            assert_as_eager(make, criterion, x, target, 1e-6)


@pytest.mark.parametrize("rows", [4, 40], ids=["blocks", "lanes"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_cross_entropy_of_large_logits_keeps_its_digits(probabilities: bool, rows: int) -> None:
    """log_softmax(z) is small where z is not."""
    bias = torch.tensor([10000.25, 10000.5, 10000.0, -10000.0])
    target = torch.arange(rows) % 3
    if probabilities:
        target = torch.tensor([0.2, 0.3, 0.5, 0.0]).expand(rows, 4).contiguous()
    exact = nn.CrossEntropyLoss()(
        bias.double().expand(rows, -1), target.double() if probabilities else target
    )
    for run in ("step", "many"):
        loss, _ = results(run, model_of(bias), nn.CrossEntropyLoss(), torch.zeros(rows, 1), target)
        assert (loss.double() - exact).abs() < 1e-6 * exact


@pytest.mark.parametrize("loss", [n for n in LOSSES if n.startswith(("classes", "prob", "nll"))])
@pytest.mark.parametrize("N", [1, 2, 10, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_few_and_many_classes(dtype: torch.dtype, N: int, loss: str) -> None:
    """Rows in lanes up to 16 classes, classes in lanes above."""
    criterion, make_target, last = LOSSES[loss]
    for rows in (1, 5, 16, 19):
        model = make_net([300, N], last).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        x, target = torch.randn(rows, 300, dtype=dtype), make_target(rows, N, dtype)
        assert_steps_match_eager(Training(model, criterion(N, dtype), optimizer, x, target), 2)
