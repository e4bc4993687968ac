"""fuse replaces a model's layers with fused ones, or its Sequentials with stacks; unfuse undoes it.

Level "layers": in every nn.Sequential, at any depth, the Linear of a (Linear, activation) pair is
replaced by a fused layer, and the activation by a FusedActivation, an nn.Identity. Indices and
state_dict keys are unchanged, and Parameters are the same objects, so existing optimizers stay
valid. The original modules are not modified, and unfuse puts them back. A fused layer reads the
options of the replaced activation at every call, so that changes, also through the FusedActivation
(model[1].negative_slope = 0.3), take effect in the next call.

A pair is not fused if fusing could change what the model computes or lose something that its
modules have, such as hooks: see `_obstacle` and fusion_report. Activations may be used in several
places. Two limits: code that calls one layer of a fused Sequential by its index also gets the
activation, and the two modules of a pair must not be replaced or sliced apart.

Level "stack": every nn.Sequential, at any depth, with a Linear that can run in a stack becomes an
mlp_ext.Sequential: the same object with the same children, which may be changed and called as
before. On layers that are already fused it runs those; fusing the layers of a stack does nothing.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar, cast

from torch import nn

from mlp_ext.nn import (
    FusedActivation,
    LinearAct,
    activation_of,
    find_addition,
    find_special,
    type_name,
)
from mlp_ext.sequential import FusedSequential, Sequential, find_obstacle, find_steps

LEVELS = ("layers", "stack")

Status = Literal["fused", "would fuse", "not fused"]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Site:
    """One Linear of a model: its path, the activation after it, its status and the reason."""

    name: str
    activation: str | None
    status: Status
    reason: str


@dataclass(frozen=True, repr=False)
class FusionReport:
    """Every Linear of a model in order; prints as a table, one line each."""

    sites: list[Site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        rows = [(s.name or "(model)", s.status, s.activation or "-", s.reason) for s in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join(lines) or "no Linear in this model"

    __repr__ = __str__


def fuse(model: Model, level: str = "layers") -> Model:
    """Fuse the model's Sequentials in place; returns `model`.

    Level "layers" fuses each (Linear, activation) pair into one layer. Level "stack" turns each
    nn.Sequential into an mlp_ext.Sequential, one operator for each run of layers. Fusing twice
    changes nothing. fusion_report(model, level) lists what is not fused, and why; a UserWarning
    points to it if nothing is.
    Raises TypeError if `model` is not an nn.Module, ValueError if `level` is not in LEVELS.
    """
    survey = _survey(model, level)
    if all(site.status == "not fused" for _, site in survey):
        count = len(survey)
        what = (
            f"0 of the model's {count} Linear layers can be fused" if count else "it has no Linear"
        )
        why = f'fusion_report(model, "{level}") tells why'
        warnings.warn(f"fuse changed nothing: {what}; {why}", UserWarning, stacklevel=2)
    if level == "stack":
        for module in [*model.modules()]:
            if _stackable(module):
                module.__class__ = FusedSequential
        return model
    return _swap(model, [(p, _fused(p)) for p, site in survey if site.status == "would fuse"])


def unfuse(model: Model) -> Model:
    """Undo fuse in place, with the original modules; returns `model`.

    They get the current Parameters and training flags of the fused layers. Layers written as
    mlp_ext.LinearReLU or mlp_ext.Sequential are kept.
    Raises TypeError if `model` is not an nn.Module; ValueError, with nothing changed, if a fused
    layer has something that would be lost, such as a hook.
    """
    swaps = []
    for place, site in _survey(model):
        if _was_fused(place):
            if site.reason:
                raise ValueError(f"unfuse: {site.name} {site.reason}")
            swaps.append((place, _unfused(place)))
    for module in [*model.modules()]:
        if type(module) is FusedSequential:
            vars(module).pop("_plan", None)
            module.__class__ = nn.Sequential  # type: ignore[assignment]
    return _swap(model, swaps)


def fusion_report(model: nn.Module, level: str = "layers") -> FusionReport:
    """What is fused in `model`, what fuse would fuse, and why it would not fuse the other Linears.

    Raises the same errors as fuse.
    """
    return FusionReport([site for _, site in _survey(model, level)])


class _Place(NamedTuple):
    """A Linear, or a module with such a name, and its position in the model."""

    name: str  # qualified; "" for the model itself
    layer: nn.Module
    follower: nn.Module | None  # the next child of the same parent
    parent: nn.Module | None
    keys: tuple[str, str]  # of layer and follower in parent
    uses: int  # in how many places of the model the layer is used


def _survey(model: nn.Module, level: str = "layers") -> list[tuple[_Place, Site]]:
    """The analysis shared by fuse, unfuse and fusion_report."""
    if level not in LEVELS:
        raise ValueError(f"fuse: level must be one of {', '.join(LEVELS)}, got {level!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"mlp_ext: model must be a torch.nn.Module, got {type(model).__name__}")
    uses = Counter(id(m) for parent in model.modules() for m in parent._modules.values())
    seen: set[nn.Module] = set()

    def places(path: str, parent: nn.Module) -> Iterator[_Place]:
        if parent in seen:  # on another path
            return
        seen.add(parent)
        for (key, child), (next_key, follower) in pairwise([*parent._modules.items(), ("", None)]):
            if child is not None:
                name = f"{path}.{key}" if path else key
                yield _Place(name, child, follower, parent, (key, next_key), uses[id(child)])
                yield from places(name, child)

    root = _Place("", model, None, None, ("", ""), 1)
    return [(p, _site(p, level)) for p in (root, *places("", model)) if _is_linear(p.layer)]


def _is_linear(module: nn.Module) -> bool:
    """Also by name, to report quantized and scripted layers."""
    name = getattr(module, "original_name", type(module).__name__)
    return isinstance(module, nn.Linear) or name.endswith("Linear")


def _site(place: _Place, level: str) -> Site:
    name, layer, follower, parent = place[:4]
    if isinstance(layer, LinearAct):
        if _was_fused(place):
            lost = find_addition(layer) or find_addition(cast(nn.Module, follower))
            reason = f"{lost}, which unfuse would lose" if lost else ""
        else:
            reason = f"written as {type(layer).__name__}, which unfuse keeps"
        return Site(name, layer.activation, "fused", reason)
    if chains(parent, Sequential) or (_stackable(parent) and level == "stack"):
        obstacle, activation = find_obstacle(layer), _stack_activation(place)
        done: Status = "fused" if isinstance(parent, Sequential) else "would fuse"
        return Site(name, activation, "not fused" if obstacle else done, obstacle)
    obstacle = _obstacle(place)
    if level == "stack" and not obstacle:
        obstacle = f"in a {type_name(parent)}, not exactly a torch.nn.Sequential"
    known = activation_of(follower) if chains(place.parent) else None
    status: Status = "not fused" if obstacle else "would fuse"
    return Site(name, known.name if known else None, status, obstacle)


def _obstacle(place: _Place) -> str:
    """Why this Linear cannot be fused; "" if it can."""
    layer, follower, parent = place.layer, place.follower, place.parent
    if type(layer) is not nn.Linear:
        return f"is a {type_name(layer)}, not exactly a torch.nn.Linear"
    if parent is None:
        return "is the whole model"
    if not chains(parent):
        return f"in a {type(parent).__name__}, whose calls are code: write the fused layer there"
    if follower is None:
        return "last in its Sequential"
    if type(follower) not in LinearAct.by_module:
        return f"followed by {type(follower).__name__}"
    if not activation_of(follower):
        return f"followed by {follower}, whose options are not supported"
    if place.uses > 1:
        return f"used in {place.uses} places"
    if addition := find_addition(layer):
        return addition
    if addition := find_addition(follower):
        return f"its {type(follower).__name__} {addition}"
    return find_special(layer)


def chains(parent: nn.Module | None, base: type[nn.Sequential] = nn.Sequential) -> bool:
    """Whether `parent` calls its children one after another, like `base` itself."""
    methods = ("__call__", "_call_impl", "forward", "__iter__")
    return isinstance(parent, base) and all(
        getattr(type(parent), name) is getattr(base, name) and name not in vars(parent)
        for name in methods
    )


def _stackable(module: nn.Module | None) -> bool:
    """Whether fuse(level="stack") turns it into an mlp_ext.Sequential."""
    return (
        type(module) is nn.Sequential
        and chains(module)
        and any(step.activations for step in find_steps([*module._modules.values()]))
    )


def _stack_activation(place: _Place) -> str | None:
    """The activation that a run applies after this layer."""
    names = [*cast(nn.Module, place.parent)._modules]
    index = names.index(place.keys[0])
    for indices, activations in find_steps([*cast(nn.Module, place.parent)._modules.values()]):
        if activations and index in indices:
            return activations[indices.index(index)].name
    return None


def _was_fused(place: _Place) -> bool:
    return isinstance(place.follower, FusedActivation) and place.follower.pair[0] is place.layer


def _fused(place: _Place) -> tuple[nn.Module, nn.Module]:
    linear, activation = cast(nn.Linear, place.layer), cast(nn.Module, place.follower)
    layer = LinearAct.by_module[type(activation)].from_linear(linear)
    # Share one dict: load_state_dict(assign=True) and to_empty() replace Parameters in both.
    layer._parameters = linear._parameters
    layer.take_options_from(activation)
    return layer, FusedActivation(layer, linear, activation)


def _unfused(place: _Place) -> tuple[nn.Module, nn.Module]:
    _, linear, activation = cast(FusedActivation, place.follower).pair
    return linear, activation


def _swap(model: Model, swaps: list[tuple[_Place, tuple[nn.Module, nn.Module]]]) -> Model:
    """Done last and with nothing left that can fail: a model is changed in whole or not at all."""
    for place, modules in swaps:
        parent = cast(nn.Module, place.parent)
        for key, old, new in zip(place.keys, (place.layer, place.follower), modules, strict=True):
            new.training = cast(nn.Module, old).training
            parent._modules[key] = new
    return model
