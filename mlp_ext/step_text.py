"""How TrainStep and TrainSteps write what they are made of, and read the counts they are given."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from mlp_ext.errors import kind
from mlp_ext.reading import read_model


def model_text(model: nn.Module) -> str:
    """As "10-5-1 relu sigmoid"; the class of a model that a step does not support any more."""
    try:
        layers = read_model(model).layers
        shapes = [layer.parameters[0].shape for layer in layers]
        widths = [shapes[0][1], *(shape[0] for shape in shapes)]
    except Exception:
        return type(model).__name__
    activations = [layer.activation.name if layer.activation else "identity" for layer in layers]
    return f"{'-'.join(map(str, widths))} {' '.join(activations)}"


def criterion_text(criterion: Any) -> str:
    if isinstance(criterion, partial):
        keywords = ", ".join(f"{name}={kind(value)}" for name, value in criterion.keywords.items())
        return f"{criterion.func.__name__}({keywords})"
    return repr(criterion) if isinstance(criterion, nn.Module) else criterion.__name__


def optimizer_text(optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """With lr and the options that are not defaults; lists where groups differ."""
    _, *options = signature(type(optimizers[0])).parameters.values()
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    texts = []
    for option in options:
        values = [_short(group.get(option.name)) for group in groups]
        if option.name == "lr" or not {*values} <= {_short(option.default)}:
            several = [*values[:3], "...", values[-1]] if len(values) > 8 else values
            value = values[0] if len({*values}) == 1 else f"[{', '.join(several)}]"
            texts.append(f"{option.name}={value}")
    return f"{type(optimizers[0]).__name__}({', '.join(texts)})"


def _short(value: object) -> str:
    return f"({', '.join(map(kind, value))})" if isinstance(value, tuple) else kind(value)


def positive(caller: str, name: str, value: Any) -> int:
    """A positive int (or NumPy integer)."""
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        what = f"{name} must be an int, got {kind(value)}"
        raise TypeError(f"{caller}: {what}")
    if not 1 <= count < 2**63:
        bound = "at least 1" if count < 1 else "below 2**63"
        raise ValueError(f"{caller}: {name} must be {bound}, got {kind(count)}")
    return count
