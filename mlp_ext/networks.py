"""Lists of networks: what must be the same for all of them, and whose input is whose."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mlp_ext.errors import kind
from mlp_ext.reading import Reading

GROUPS = "make one call for each kind"
ALONE = "use TrainStep for each network"
Look = dict[str, object]


def listed(name: str, argument: str, value: Any) -> list[Any]:
    """The models or optimizers in a list; raises if it is one of them or none."""
    what = {"models": nn.Module, "optimizers": torch.optim.Optimizer}[argument]
    is_one = isinstance(value, (what, str)) and not isinstance(value, nn.ModuleList)
    if is_one or not isinstance(value, Iterable):
        raise TypeError(f"{name}: {argument} must be a list, got {kind(value)}")
    found = [*value]
    if not found:
        raise ValueError(f"{name}: {argument} must be at least one, got an empty list")
    return found


def check_options(
    name: str,
    own: Callable[..., object],
    of_one: Callable[..., object],
    unknown: Iterable[str],
) -> None:
    """Raises for options that `own` does not have. of_one: the same of TrainStep."""
    for option in unknown:
        if option not in signature(of_one).parameters:
            raise TypeError(f"{name}() got an unexpected keyword argument '{option}'")
        if f"{option}s" in signature(own).parameters:
            raise TypeError(f"{name}: pass {option}s, one for each network, not {option}")
        raise TypeError(f"{name}: {option} is not supported; {ALONE}")


def of_network(name: str, error: Exception, index: int) -> Exception:
    """An error of TrainStep as that of models[index] and optimizers[index]."""
    message = str(error).removeprefix("TrainStep: ")
    message, names = re.subn(r"^(model|optimizer)\b", rf"\1s[{index}]", message)
    if not names and not message.startswith("criterion"):
        message = f"models[{index}]: {message}"
    return type(error)(f"{name}: {message}")


def look(reading: Reading, optimizer: torch.optim.Optimizer | None = None) -> Look:
    """What must be the same for all networks."""
    layers = reading.layers
    weights = [layer.parameters[0] for layer in layers]
    activations = [layer.activation for layer in layers]
    names = [f"{a.name}{a.parameters or ''}" if a else "identity" for a in activations]
    found: Look = {
        "widths": "-".join(map(str, [weights[0].shape[-1], *map(len, weights)])),
        "activations": " ".join(names),
        "layers with a bias": [i for i, each in enumerate(layers) if len(each.parameters) == 2],
        "dtype": weights[0].dtype,
        "device": weights[0].device,
        "dropout before layers": reading.dropout,
        "flattened dimensions": reading.flattened,
    }
    if optimizer is not None:
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters = [p for layer in layers for p in layer.parameters]
        learning = [i for i, p in enumerate(parameters) if p.requires_grad and id(p) in known]
        found["parameters that learn"] = learning
    return found


def check_alike(name: str, looks: Sequence[Look]) -> None:
    for i, each in enumerate(looks):
        if each == looks[0]:
            continue
        what = next(what for what, value in each.items() if value != looks[0][what])
        values = f"{each[what]} in models[{i}], {looks[0][what]} in models[0]"
        raise ValueError(f"{name}: models must be alike, and {what}: {values}; {GROUPS}")


def check_distinct(name: str, argument: str, given: Sequence[object]) -> None:
    first: dict[int, int] = {}
    for i, each in enumerate(given):
        if (other := first.setdefault(id(each), i)) != i:
            what = f"{argument}[{i}] is {argument}[{other}]"
            raise ValueError(f"{name}: {what}; make one for each network")


def flattened(
    name: str, input: Tensor, K: int, dimensions: Sequence[tuple[int, int]], count: int
) -> Tensor:
    """The input as [M, K] or [E, M, K]; raises if it is neither. dimensions: of each Flatten."""
    try:
        for leading, shape in ((0, []), (1, [count])):
            x = input
            for pair in dimensions:
                x = x.flatten(*(d + leading if d >= 0 else d for d in pair))
            if x.dim() == 2 + leading and [*x.shape[:leading], x.shape[-1]] == [*shape, K]:
                return x
    except IndexError:  # too few dimensions
        pass
    what = f"input must be [M, K={K}] for all networks or [E={count}, M, K={K}] for each its own"
    raise RuntimeError(f"{name}: {what}, got {list(input.shape)}")
