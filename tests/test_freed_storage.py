"""Tensors whose storage was freed, as FSDP frees parameters, are refused with one clear line."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlp_ext import TrainStep, TrainSteps, linear_act

pytestmark = pytest.mark.usefixtures("one_thread")
FREED = r" \[[\d, ]*\] has no memory: its storage was freed"


def free(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


ACTIVATIONS = ["identity", "relu", "tanh", "silu", "gelu"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("freed", ["input", "weight", "bias"])
def test_layer(freed: str, activation: str) -> None:
    tensors = {"input": torch.randn(9, 6), "weight": torch.randn(5, 6), "bias": torch.randn(5)}
    free(tensors[freed])
    for requires_grad in (False, True):
        for t in tensors.values():
            t.requires_grad_(requires_grad)
        with pytest.raises(RuntimeError, match=f"linear_act: {freed}{FREED}"):
            linear_act(*tensors.values(), activation)


@pytest.mark.parametrize("freed", ["weights[0]", "weights[1]", "biases[0]", "biases[1]", "input"])
def test_stack(freed: str) -> None:
    x, weights = torch.randn(9, 6), [torch.randn(5, 6), torch.randn(4, 5)]
    biases = [torch.randn(5), torch.randn(4)]
    named = {f"weights[{i}]": w for i, w in enumerate(weights)}
    named |= {f"biases[{i}]": b for i, b in enumerate(biases)}
    free({**named, "input": x}[freed])
    name = freed.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(RuntimeError, match=f"mlp: {name}{FREED}"):
        torch.ops.mlp_ext.mlp(x, weights, biases, ["tanh", "tanh"])


def test_view_of_freed_storage() -> None:
    """Its data pointer is not null, since it has an offset."""
    flat = torch.randn(5 + 5 * 6)
    weight = flat[5:].view(5, 6)
    free(flat)
    with pytest.raises(RuntimeError, match=f"linear_act: weight{FREED}"):
        linear_act(torch.randn(9, 6), weight, None, "relu")


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("freed", ["input", "weight", "output", "gradient"])
def test_saved_tensor(freed: str, activation: str) -> None:
    x, w = torch.randn(9, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    y = linear_act(x, w, None, activation)
    dy = torch.ones_like(y)
    tensors = {"input": x.data, "weight": w.data, "output": y.data, "gradient": dy}
    free(tensors[freed])
    if freed == "output" and activation == "silu":  # saves z
        return y.backward(dy)
    names = {"output": "saved", "gradient": "grad_output"}
    with pytest.raises(RuntimeError, match=f"linear_act: {names.get(freed, freed)}{FREED}"):
        y.backward(dy)


def test_what_backward_does_not_read() -> None:
    x, w = torch.randn(9, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    b = torch.randn(5, requires_grad=True)
    y = linear_act(x, w, b, "relu")
    free(w.data)
    dw, db = torch.autograd.grad(y.sum(), (w, b))
    dz = (y > 0).to(y.dtype)
    torch.testing.assert_close((dw, db), (dz.t() @ x, dz.sum(0)))


def test_empty_tensors_have_no_memory() -> None:
    x, w = torch.randn(0, 6), torch.randn(5, 6)
    free(x)
    assert linear_act(x, w, None, "relu").shape == (0, 5)


def make_model(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), *modules, nn.Linear(5, 4))


def make_optimizer(model: nn.Module, counts_steps: bool = False) -> torch.optim.Optimizer:
    if counts_steps:
        return torch.optim.Adam(model.parameters())
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


Free = Callable[[nn.Sequential, nn.Module, torch.optim.Optimizer, Tensor, Tensor], Tensor]
OF_STEP: dict[str, tuple[Free, str]] = {
    "input": (lambda m, c, o, x, y: x, "input"),
    "target": (lambda m, c, o, x, y: y, "target"),
    "weight": (lambda m, c, o, x, y: m[2].weight, "a weight"),
    "bias": (lambda m, c, o, x, y: m[0].bias, "a bias"),
    "class weights": (lambda m, c, o, x, y: c.weight, "the criterion's weight"),
    "momentum": (
        lambda m, c, o, x, y: o.state[m[0].bias]["momentum_buffer"],
        "an optimizer state",
    ),
    "count of steps": (lambda m, c, o, x, y: o.state[m[0].bias]["step"], "a count of steps"),
}


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("freed", OF_STEP)
def test_step(freed: str, many: bool) -> None:
    by_classes, counts_steps = freed == "class weights", freed == "count of steps"
    criterion = nn.CrossEntropyLoss(torch.rand(4)) if by_classes else nn.MSELoss()
    model = make_model()
    optimizer = make_optimizer(model, counts_steps)
    x, y = torch.randn(9, 6), torch.randint(4, (9,)) if by_classes else torch.randn(9, 4)
    step: Any = TrainStep(model, criterion, optimizer)
    if many:
        other = deepcopy(model)
        others = [make_optimizer(other, counts_steps), optimizer]
        step = TrainSteps([other, model], criterion, others)
    step(x, y)
    part, name = OF_STEP[freed]
    free(part(model, criterion, optimizer, x, y))
    before = [p.clone() for p in model.parameters() if p.untyped_storage().nbytes()]
    for call in (step, lambda x, y: step.fit(x, y, epochs=2, batch_size=4, shuffle=True)):
        with pytest.raises(RuntimeError, match=f"{name}{FREED}"):
            call(x, y)
    after = [p for p in model.parameters() if p.untyped_storage().nbytes()]
    assert all(map(torch.equal, before, after))


def test_classes() -> None:
    model = make_model()
    step = TrainStep(model, nn.CrossEntropyLoss(), make_optimizer(model))
    x, y = torch.randn(9, 6), torch.randint(4, (9,))
    free(y)
    with pytest.raises(RuntimeError, match=f"target{FREED}"):
        step(x, y)


@pytest.mark.parametrize("kind", ["accumulate", "dropout"])
def test_step_by_operators(kind: str) -> None:
    model = make_model(*([nn.Dropout(0.5)] if kind == "dropout" else []))
    accumulate = 2 if kind == "accumulate" else 1
    step = TrainStep(model, nn.MSELoss(), make_optimizer(model), accumulate=accumulate)
    x, y = torch.randn(9, 6), torch.randn(9, 4)
    step(x, y)
    free(model[-1].weight)
    with pytest.raises(RuntimeError, match=f"a weight{FREED}"):
        step(x, y)
