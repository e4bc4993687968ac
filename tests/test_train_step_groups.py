"""Clipping and groups of steps equal eager loops; what a step keeps alive."""

import gc
import weakref
from copy import deepcopy
from functools import partial
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
    state_of,
)
from torch import nn

from mlp_ext import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")


# --- Clipping and groups ---


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("max_norm", [None, 0.1, 1e6, 0])
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_clipped_and_accumulated(optimizer: Any, max_norm: float | None, accumulate: int) -> None:
    """Twenty steps leave two of an incomplete group, which are not applied."""
    assert_as_eager(net(), optimizer=optimizer, max_norm=max_norm, accumulate=accumulate)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_groups_of_other_dtypes(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    data = [(torch.randn(10, 8).to(dtype), torch.rand(10, 4).to(dtype)) for _ in range(8)]
    settings = {"max_norm": 0.2, "accumulate": 2}
    expected, found = (
        results(make, model, nn.MSELoss(), sgd, data, **settings) for make in (Eager, TrainStep)
    )
    torch.testing.assert_close(found, expected, **TOLERANCES.get(dtype, {}))


def test_large_layers_in_groups() -> None:
    layers = [nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 4)]
    model = nn.Sequential(*layers)
    model[2].weight.requires_grad_(False)
    assert_as_eager(model, optimizer=adam, max_norm=0.5, accumulate=2)


def test_everything_at_once() -> None:
    model = Thin(nn.Flatten(), *net(dropout=0.2))
    assert_as_eager(
        model,
        partial(F.cross_entropy, label_smoothing=0.1),
        adam,
        x=lambda: torch.randn(10, 2, 4),
        y=lambda: torch.randint(4, (10,), dtype=torch.uint8),
        max_norm=0.5,
        accumulate=4,
    )


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("rows", [1, 5], ids=["[n, K]", "[n, T, K]"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_norm": 0.1}, {"accumulate": 4}, {"accumulate": 3, "max_norm": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fit(settings: dict[str, Any], rows: int, shuffle: bool, dropout: float) -> None:
    """The last, incomplete group is applied at the end, not at the end of an epoch."""
    shape = (23,) if rows == 1 else (23, rows)
    x, y, model = torch.randn(*shape, 8), torch.rand(*shape, 4), net(dropout=dropout)
    found = []
    for make in (TrainStep, Eager):
        copy = deepcopy(model)
        optimizer = adam(copy.parameters())
        step = make(copy, nn.MSELoss(), optimizer, **settings)
        torch.manual_seed(3)
        losses = step.fit(x, y, epochs=5, batch_size=5, shuffle=shuffle)
        found.append({"losses": losses, **state_of(copy, optimizer)})
    assert_equal(*found)


def test_fit_on_full_batches_in_groups() -> None:
    x, y, model = torch.randn(23, 8), torch.rand(23, 4), net()
    found = []
    for make in (TrainStep, Eager):
        copy = deepcopy(model)
        step = make(copy, nn.MSELoss(), sgd(copy.parameters()), accumulate=3)
        found.append({"losses": step.fit(x, y, 7, 23, False), **copy.state_dict()})
    assert_equal(*found)


def test_a_group_survives_a_change_of_the_model() -> None:
    x, y, model = torch.randn(10, 8), torch.rand(10, 4), net()
    found = []
    for make in (TrainStep, Eager):
        copy = deepcopy(model)
        step = make(copy, nn.MSELoss(), sgd(copy.parameters()), accumulate=3)
        step(x, y)
        copy.append(nn.Identity())
        step(x, y)
        step(x, y)
        found.append(copy.state_dict())
    assert_equal(*found)


def test_what_learns_may_not_change_within_a_group() -> None:
    x, y, model = torch.randn(10, 8), torch.rand(10, 4), net()
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()), accumulate=2)
    step(x, y)
    model[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="TrainStep: other parameters learn than in the step"):
        step(x, y)
    model[0].weight.requires_grad_(True)
    step(x, y)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    step(x, y)
    step(x, y)
    assert torch.equal(model[0].weight, before)


def test_no_state_before_the_first_update() -> None:
    model = net()
    optimizer = adam(model.parameters())
    step = TrainStep(model, nn.MSELoss(), optimizer, accumulate=2)
    before = deepcopy(model.state_dict())
    step(torch.randn(10, 8), torch.rand(10, 4))
    assert not optimizer.state
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    step(torch.randn(10, 8), torch.rand(10, 4))
    assert len(optimizer.state) == 6


def test_a_step_that_fails_leaves_its_group_as_it_was() -> None:
    x, y, model = torch.randn(10, 8), torch.randint(4, (10,)), net()
    copy = deepcopy(model)
    step = TrainStep(model, nn.CrossEntropyLoss(), sgd(model.parameters()), accumulate=2)
    step(x, y)
    with pytest.raises(IndexError, match="target must be classes from 0 to 3"):
        step(x, y + 1)
    step(x, y)
    eager = Eager(copy, nn.CrossEntropyLoss(), sgd(copy.parameters()), accumulate=2)
    eager(x, y)
    eager(x, y)
    assert_equal(model.state_dict(), copy.state_dict())


@pytest.mark.parametrize("settings", [{}, {"max_norm": 1.0}, {"accumulate": 2}], ids=str)
def test_states_that_share_memory_are_refused(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    optimizer, (x, y) = adam(model.parameters()), torch.randn(2, 10, 4)
    step = TrainStep(model, nn.MSELoss(), optimizer, **settings)
    for _ in range(2):
        step(x, y)
    states = [optimizer.state[layer.weight] for layer in (model[0], model[2])]
    states[0]["exp_avg"] = states[1]["exp_avg"]
    before = deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="an optimizer state must not share memory with an opt"):
        for _ in range(2):
            step(x, y)
    assert_equal(model.state_dict(), before)


def test_a_copy_has_the_same_settings() -> None:
    model = net()
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()), max_norm=0.1, accumulate=2)
    copy = deepcopy(step)
    data = [(torch.randn(10, 8), torch.rand(10, 4)) for _ in range(4)]
    for one in (step, copy):
        for x, y in data:
            one(x, y)
    torch.testing.assert_close(copy._parts[0].state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_norm": -1}, ValueError, "max_norm must be from 0 on, got -1"),
        ({"max_norm": float("nan")}, ValueError, "max_norm must be from 0 on, got nan"),
        ({"max_norm": "1"}, TypeError, "max_norm must be a number or None, got '1'"),
        ({"accumulate": 0}, ValueError, "accumulate must be at least 1, got 0"),
        ({"accumulate": 1.5}, TypeError, "accumulate must be an int, got 1.5"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: Any, message: str) -> None:
    model = net()
    with pytest.raises(error, match=f"^TrainStep: {message}"):
        TrainStep(model, nn.MSELoss(), sgd(model.parameters()), **settings)


def test_a_scheduler_that_steps_with_each_group_does_not_warn() -> None:
    model = net()
    optimizer = sgd(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step = TrainStep(model, nn.MSELoss(), optimizer, accumulate=2)
    for _ in range(2):
        step(torch.randn(10, 8), torch.rand(10, 4))
    scheduler.step()


# --- What a step holds ---


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}], ids=str)
def test_parameters_can_be_swapped_after_a_step(settings: dict[str, int]) -> None:
    model, x, y = net(), torch.randn(10, 8), torch.rand(10, 4)
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()), **settings)
    for _ in range(2):
        step(x, y)
    other = nn.Parameter(torch.randn(16, 8))
    values = other.detach().clone()
    torch.utils.swap_tensors(model[0].weight, other)
    assert torch.equal(model[0].weight, values)
    for _ in range(2):
        step(x, y)
    assert not torch.equal(model[0].weight, values)


@pytest.mark.parametrize("holder", ["model", "optimizer"])
def test_what_holds_its_step_is_freed(holder: str) -> None:
    model = net()
    optimizer = sgd(model.parameters())
    step = TrainStep(model, nn.MSELoss(), optimizer)
    step(torch.randn(10, 8), torch.rand(10, 4))
    held = model if holder == "model" else optimizer
    held.step_of_mine = step  # type: ignore[union-attr]
    seen = [weakref.ref(thing) for thing in (model, model[0].weight, optimizer)]
    del model, optimizer, step, held
    gc.collect()
    assert [reference() for reference in seen] == [None] * 3
