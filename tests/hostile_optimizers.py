"""Hostile optimizers of TrainStep: groups, states, parameters."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
from hostile import Change, Row, Table, adam, momentum, net, step
from hostile_layers import NAN

ROWS: Table = {}


def add(name: str, call: Any, error: type[Exception] | None = None, message: str = "") -> None:
    assert name not in ROWS
    ROWS[name] = Row(call, error, f"TrainStep: {message}" if error else "")


def group(name: str, make: Callable[[], Any]) -> Change:
    return lambda p: p.optimizer.param_groups[0].__setitem__(name, make())


for value in (-0.1, NAN, float("inf"), True):
    add(f"lr of {value}", step(group("lr", lambda value=value: value)))
add("lr of a tensor", step(group("lr", lambda: torch.tensor([0.1]))))
add("momentum of 1.5", step(group("momentum", lambda: 1.5)))
add("eps of 0", step(group("eps", lambda: 0), optimizer=adam))
add("negative decay", step(group("weight_decay", lambda: -0.5)))
add("ints as betas", step(group("betas", lambda: (0, 0)), optimizer=adam))

HAS = "optimizer.param_groups has "
for name, change, message in (
    ("lr of text", group("lr", lambda: "0.1"), f"{HAS}lr = str; it must be a number"),
    ("lr of None", group("lr", lambda: None), f"{HAS}lr = NoneType; it must be a number"),
    (
        "lr of two",
        group("lr", lambda: torch.ones(2)),
        f"{HAS}lr = a tensor [2] of float32 on cpu; it",
    ),
    (
        "meta lr",
        group("lr", lambda: torch.ones((), device="meta")),
        f"{HAS}lr = a tensor [] of float32 on m",
    ),
    (
        "complex lr",
        group("lr", lambda: torch.tensor(1j)),
        f"{HAS}lr = a tensor [] of complex64 on cpu",
    ),
    (
        "list as momentum",
        group("momentum", lambda: [0.9]),
        f"{HAS}momentum = list; it must be a number",
    ),
    (
        "group of None",
        lambda p: p.optimizer.param_groups.__setitem__(0, None),
        "optimizer.param_groups[0] is",
    ),
    (
        "groups in a tuple",
        lambda p: setattr(p.optimizer, "param_groups", ()),
        "optimizer.param_groups is a bui",
    ),
    (
        "state of None",
        lambda p: setattr(p.optimizer, "state", None),
        "optimizer.state must be a dict, got No",
    ),
    (
        "UserDict as state",
        lambda p: setattr(p.optimizer, "state", UserDict()),
        "optimizer.state must be a di",
    ),
):
    add(name, step(change), TypeError, message)
for value in (None, 0.9, (0.9,), (0.9, 0.9, 0.9)):
    message = f"{HAS}betas = {type(value).__name__}; it must be a tuple of 2 numbers"
    add(
        f"betas of {value}",
        step(group("betas", lambda value=value: value), optimizer=adam),
        TypeError,
        message,
    )
for name in ("lr", "momentum"):
    change = lambda p, name=name: p.optimizer.param_groups[0].__delitem__(name)  # noqa: E731
    add(f"{name} deleted", step(change), ValueError, f"optimizer.param_groups has no {name}")
add(
    "params deleted",
    step(lambda p: p.optimizer.param_groups[0].__delitem__("params")),
    ValueError,
    "optimizer cannot be read: it has no 'params'",
)
add(
    "state deleted",
    step(lambda p: delattr(p.optimizer, "state")),
    ValueError,
    "optimizer has no state",
)
add(
    "parameter twice",
    step(lambda p: p.optimizer.param_groups[0]["params"].append(p.model[0].weight)),
    ValueError,
    "optimizer.param_groups[0]['params'] has a parameter again; make the optimizer with each",
)
add(
    "optimizer of another model",
    step(optimizer=lambda _: momentum(net().parameters()), first=False),
    ValueError,
    "optimizer has none of the model's parameters; make it with model.parameters()",
)


def state(name: str, make: Callable[[], Any]) -> Change:
    """Another state of the last weight, so that one before it might have changed already."""
    return lambda p: p.optimizer.state[p.model[2].weight].__setitem__(name, make())


def entry(make: Callable[[], Any]) -> Change:
    return lambda p: p.optimizer.state.__setitem__(p.model[2].weight, make())


add("buffer of None", step(state("momentum_buffer", lambda: None)))
add("NaN buffer", step(state("momentum_buffer", lambda: torch.full((3, 5), NAN))))
add("flipped buffer", step(state("momentum_buffer", lambda: torch.arange(15.0).view(3, 5).flip(0))))
add("transposed buffer", step(state("momentum_buffer", lambda: torch.arange(15.0).view(5, 3).t())))
add("no entry", step(entry(dict)))
add("more states", step(state("mine", lambda: "text")))
for name, change, error, message in (
    (
        "entry of None",
        entry(lambda: None),
        TypeError,
        "each parameter's entry in optimizer.state must be",
    ),
    (
        "entry of a list",
        entry(list),
        TypeError,
        "each parameter's entry in optimizer.state must be a dic",
    ),
    (
        "text as buffer",
        state("momentum_buffer", lambda: "x"),
        TypeError,
        "momentum_buffer in optimizer.st",
    ),
    (
        "small buffer",
        state("momentum_buffer", lambda: torch.ones(2)),
        RuntimeError,
        "an optimizer state mu",
    ),
    (
        "float64 buffer",
        state("momentum_buffer", lambda: torch.ones(3, 5).double()),
        RuntimeError,
        "an optimizer state must be float32 to match input, got float64; call optimizer.load",
    ),
    (
        "meta buffer",
        state("momentum_buffer", lambda: torch.ones(3, 5, device="meta")),
        RuntimeError,
        "an opt",
    ),
):
    add(name, step(change), error, message)
for name, make, error, message in (
    ("number as count", lambda: 3, TypeError, "step in optimizer.state must be a tensor, got int"),
    ("counts", lambda: torch.ones(2), RuntimeError, "a count of steps must be [], got [2]"),
    (
        "complex count",
        lambda: torch.tensor(1j),
        TypeError,
        "a count of steps must be float32 or float64, ",
    ),
):
    add(name, step(state("step", make), optimizer=adam), error, message)
