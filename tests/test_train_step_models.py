"""Models that a step takes besides plain Sequentials: modules with code, Flatten, Dropout."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_steps import (
    TOLERANCES,
    Eager,
    Thin,
    adam,
    assert_as_eager,
    assert_equal,
    net,
    results,
    sgd,
)
from torch import nn

import mlp_ext
from mlp_ext import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")


class Quickstart(nn.Module):
    """As in torch's own tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        x = self.flatten(x)
        logits = self.linear_relu_stack(x)
        return logits


class InTurn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)
        self.act, self.drop = nn.Tanh(), nn.Dropout(0.2)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


# --- Models ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: Thin(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)),
        Quickstart,
        InTurn,
        lambda: nn.Sequential(nn.Identity(), Thin(nn.Linear(8, 4)), nn.ReLU()),
    ],
)
def test_modules_that_only_call_their_children(make: Callable[[], nn.Module]) -> None:
    assert_as_eager(make())


@pytest.mark.parametrize(
    "code",
    [
        "def forward(self, x): return self.body(x) + 1",
        "def forward(self, x): return self.body(x.abs())",
        "def forward(self, x): return self.body(x) if self.training else x",
        "def forward(self, x): return self.body[0](x)",
        "def forward(self, x): return F.relu(self.body(x))",
        "def forward(self, x, y=None): return self.body(x)",
        "def forward(self, x):\n  y = self.body(x)\n  return x",
        "def forward(self, x):\n  self.body = self.body\n  return self.body(x)",
        "def forward(self, x):\n  for _ in (1, 2): x = self.body(x)\n  return x",
        "forward = nn.Sequential.forward",
    ],
)
def test_modules_that_do_more_are_refused(code: str) -> None:
    namespace: dict[str, Any] = {}
    exec(code, {"F": F, "nn": nn}, namespace)
    module = type("Mine", (Thin,), namespace)(nn.Linear(8, 4))
    with pytest.raises(TypeError, match=r"model is a .*Mine, which a step does not support; use"):
        TrainStep(module, nn.MSELoss(), sgd(module.parameters()))


def test_a_child_that_is_replaced_is_seen() -> None:
    model = Quickstart()
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    x, y = torch.randn(10, 2, 4), torch.rand(10, 4)
    step(x, y)
    model.linear_relu_stack = nn.LayerNorm(8)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"model.linear_relu_stack is a .*LayerNorm, which a step"):
        step(x, y)


def test_a_forward_that_is_patched_is_seen() -> None:
    class Patched(Thin):
        def forward(self, x):
            return self.body(x)

    model = Patched(nn.Linear(8, 4))
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    step(torch.randn(10, 8), torch.rand(10, 4))
    Patched.forward = lambda self, x: self.body(x) + 1
    with pytest.raises(TypeError, match="which a step does not support"):
        step(torch.randn(10, 8), torch.rand(10, 4))


@pytest.mark.filterwarnings("ignore:fuse changed nothing")
@pytest.mark.parametrize("level", ["layers", "stack"])
def test_fused_wrappers(level: str) -> None:
    for make in (Quickstart, InTurn, lambda: Thin(nn.Flatten(), *net())):
        assert_as_eager(mlp_ext.fuse(make(), level=level))


@pytest.mark.parametrize("shape", [(10, 2, 4), (10, 8), (10, 2, 2, 2), (10, 8, 1)])
def test_flatten(shape: tuple[int, ...]) -> None:
    assert_as_eager(net(nn.Flatten()), x=lambda: torch.randn(shape))


def test_flatten_of_some_dimensions() -> None:
    assert_as_eager(
        net(nn.Flatten(2), nn.Flatten(1, 1)),
        x=lambda: torch.randn(10, 3, 2, 4),
        y=lambda: torch.rand(10, 3, 4),
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(8, 8), nn.Flatten()], r"model.1, a Flatten, comes after other layers; put it"),
        ([nn.Flatten(0), nn.Linear(8, 4)], r"model.0, Flatten\(.*\), flattens the batch; use the"),
        ([nn.Linear(8, 4), nn.Dropout(), nn.ReLU()], "model.2, a ReLU, follows a Dropout; put"),
        ([nn.Linear(8, 4), nn.Dropout(), nn.Dropout()], "model.2, a Dropout, follows another Drop"),
        ([nn.Dropout(inplace=True), nn.Linear(8, 4)], "model.0, a Dropout, changes the input in"),
    ],
)
def test_places_that_are_refused(layers: list[nn.Module], message: str) -> None:
    model = nn.Sequential(*layers)
    with pytest.raises(ValueError, match=f"^TrainStep: {message}"):
        TrainStep(model, nn.MSELoss(), sgd(model.parameters()))


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Dropout1d(), nn.GRU(8, 8)]
)
def test_what_stands_between_layers_is_named(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 8), module, nn.Linear(8, 4))
    name = type(module).__name__
    message = (
        rf"^TrainStep: model\.1 is a torch\.nn\.[a-z.]*{name}, which a step does not support; "
    )
    with pytest.raises(
        TypeError, match=message + r"use the eager loop, with mlp_ext.fuse\(model\)$"
    ):
        TrainStep(model, nn.MSELoss(), sgd(model.parameters()))


# --- Dropout ---


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_draws_eagers_masks(p: float, optimizer: Any) -> None:
    assert_as_eager(net(nn.Dropout(p / 2), dropout=p), optimizer=optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dropout_of_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(*net(dropout=0.3), nn.Dropout(0.2)).to(dtype)
    x, y = torch.randn(10, 8).to(dtype), torch.rand(10, 4).to(dtype)
    expected, found = (
        results(make, model, nn.L1Loss(), sgd, [(x, y)] * 5) for make in (Eager, TrainStep)
    )
    torch.testing.assert_close(found, expected, **TOLERANCES.get(dtype, {}))


def test_dropout_with_eval_and_train() -> None:
    model, x, y = net(dropout=0.5), torch.randn(10, 8), torch.rand(10, 4)
    pairs = []
    for make in (Eager, TrainStep):
        copy = deepcopy(model)
        step = make(copy, nn.MSELoss(), sgd(copy.parameters()))
        torch.manual_seed(2)
        losses = []
        for i in range(12):
            copy.train(i // 3 % 2 == 0)
            copy[2].p = 0.1 * (i % 5)
            losses.append(step(x, y))
        pairs.append({"losses": torch.stack(losses), **copy.state_dict()})
    assert_equal(*reversed(pairs))
