"""fuse makes a model's modules call their layers as fused operators; unfuse undoes it.

Only callers change. An nn.Sequential, or a module whose forward calls its layers, gets a subclass
of its class with the same name and another forward. Its children, Parameters, hooks, attributes
and state_dict stay as they are. At every call, guards check whether what was read still holds: a
child that was replaced, hooked or wrapped is called as a module, from the next call on.

Level "layers": each (Linear, activation) pair is one operator and one autograd node, so gradients
arrive layer by layer. Level "stack": each run of layers is one.

A forward is fused if torch.fx can follow it with certainty (see following.py). If not, it is left
alone, and fusion_report says why; torch.compile(model, backend="mlp_ext") follows any code.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import nn

from mlp_ext.errors import kind
from mlp_ext.following import TENSOR, Signature, signature_of
from mlp_ext.forward_code import fuse_code
from mlp_ext.guarding import Unfollowable
from mlp_ext.nn import Activation, LinearAct, activation_of, find_override, type_name
from mlp_ext.plan import HOOKS_OF_ALL, Plan, find_obstacle, without_plans
from mlp_ext.sequential import Sequential, find_steps, is_layer
from mlp_ext.sequential import forward as run_sequential

Level = Literal["layers", "stack"]
LEVELS: tuple[Level, ...] = get_args(Level)
Status = Literal["fused", "would fuse", "not fused"]
FUSED: dict[Status, str] = {"fused": "yes", "would fuse": "would be", "not fused": "no"}
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Site:
    """One Linear of a model, in a `FusionReport`.

    Attributes:
        name (str): its path in the model, as in `named_modules`; "" if it is the model.
        activation (str or None): the activation that is fused with it, a name in
            `mlp_ext.ACTIVATIONS`; "identity" if none is. None if the Linear is not fused.
        status (str): "fused", "would fuse" or "not fused".
        reason (str): why it is not fused, or "".

    Examples:
        >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU())
        >>> (site,) = mlp_ext.fusion_report(model)
        >>> site.name, site.activation, site.status
        ('0', 'relu', 'would fuse')
    """

    name: str
    activation: str | None
    status: Status
    reason: str


@dataclass(frozen=True, repr=False)
class FusionReport:
    """Every Linear of a model, in the order of `named_modules`. Prints as a table.

    `len(report)` is their number, and iterating yields each `Site`.

    Attributes:
        sites (list of Site): one for each Linear, in this order.

    Examples:
        >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 1))
        >>> [site.reason for site in mlp_ext.fusion_report(model) if site.status == "not fused"]
        ['last in its Sequential']
    """

    sites: list[Site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        if not self.sites:
            return "no Linear in this model"
        rows = [("layer", "fused", "with", "reason")]
        for s in self:
            activation = "(no activation)" if s.activation == "identity" else s.activation or ""
            rows.append((s.name or "(model)", FUSED[s.status], activation, s.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    __repr__ = __str__


def fuse(model: Model, level: Level = "layers") -> Model:
    """Fuses the linear layers and activations of a model, in place.

    Results stay the same, up to rounding. Children, Parameters, hooks and `state_dict` stay as they
    are, so an optimizer made before stays valid. Layers are found in every `nn.Sequential`, and in
    `forward` code that torch.fx can follow with certainty. Later changes of the model take effect
    in the next call. Calling it again with another level switches the level.

    Args:
        model (nn.Module): the model.
        level (str): "layers" makes each Linear and the activation after it one operator, so that
            gradients arrive layer by layer. "stack" makes each run of layers one operator and one
            autograd node, which is faster. Default: "layers".

    Returns:
        nn.Module: `model` itself.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: `level` is unknown.

    Warns:
        UserWarning: nothing can be fused. `fusion_report` says why.

    Examples:
        >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 1))
        >>> model = mlp_ext.fuse(model, level="stack")
        >>> model(torch.randn(128, 20)).shape
        torch.Size([128, 1])
    """
    callers = _callers("fuse", model, level)
    sites = _sites(model, callers)
    if all(site.status == "not fused" for site in sites):
        count = len(sites)
        what = (
            f"0 of the model's {count} Linear layers can be fused" if count else "it has no Linear"
        )
        advice = f'; print fusion_report(model, "{level}") for the reasons'
        if count:
            advice += ', or use torch.compile(model, backend="mlp_ext"), which follows any code'
        warnings.warn(f"fuse changed nothing: {what}{advice}", UserWarning, stacklevel=2)
    for caller in callers:
        if caller.fused:
            _set_class(caller.module, _fused_class(original_class(caller.module), level))
    return model


def unfuse(model: Model) -> Model:
    """Undoes `fuse`, in place.

    Layers written as `LinearReLU` or `Sequential` of mlp_ext are kept.

    Args:
        model (nn.Module): the model, fused or not.

    Returns:
        nn.Module: `model` itself.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: the class of a fused module was changed after `fuse`, as `fully_shard` does.
            Nothing is changed then.

    Examples:
        >>> model = mlp_ext.fuse(nn.Sequential(nn.Linear(20, 30), nn.ReLU()))
        >>> print(mlp_ext.fusion_report(mlp_ext.unfuse(model)))
        layer  fused     with  reason
        0      would be  relu
    """
    _check("unfuse", model)
    fused = [(name, m) for name, m in model.named_modules() if isinstance(m, _Fused)]
    for name, module in fused:
        if original_class(module) is type(module):
            what = f"{name or 'the model'} is now a {type_name(module)}"
            raise ValueError(f"unfuse: {what}; undo first what changed its class after fuse")
    for _, module in fused:
        _set_class(module, original_class(module))
    return model


def fusion_report(model: nn.Module, level: Level = "layers") -> FusionReport:
    """Lists every Linear of a model: whether it is fused, or would be, and why not.

    Args:
        model (nn.Module): the model, fused or not. It is not changed.
        level (str): "layers" or "stack", as for `fuse`. Default: "layers".

    Returns:
        FusionReport: a `Site` for each Linear. Prints as a table.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: `level` is unknown.

    Examples:
        >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 1))
        >>> print(mlp_ext.fusion_report(model))
        layer  fused     with  reason
        0      would be  relu
        2      no              last in its Sequential
    """
    return FusionReport(_sites(model, _callers("fusion_report", model, level)))


# ---- the classes of fused modules ----


class _Fused(nn.Module):
    """Base of the classes that fuse gives to modules."""

    fused_from: ClassVar[type[nn.Module]]
    level: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leaves out that of the module's class, which may keep a register of its subclasses."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if reduced[:2] == (copyreg.__newobj__, (type(self),)):  # type: ignore[attr-defined]
            state, *rest = reduced[2:]
            state = without_plans(state) if isinstance(state, dict) else state
            return _new, (self.fused_from, self.level), state, *rest
        return reduced  # from a __reduce__ of the class

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script: the same module, not fused."""
        module = self.fused_from.__new__(self.fused_from)
        vars(module).update(without_plans(vars(self)))
        return module


class _Plans:
    """The plans of a forward: one for each signature and each state of what it reads."""

    LIMIT = 16  # plans made; a forward that needs more changes all the time, and runs as it is

    def __init__(self) -> None:
        self._plans: list[tuple[Signature, Plan | None]] = []

    def find(
        self, module: nn.Module, original: type[nn.Module], signature: Signature, level: str
    ) -> Plan | None:
        """None if the forward has nothing to fuse, or cannot be followed."""
        for known, plan in self._plans:
            if known == signature and (plan is None or plan.is_for(module)):
                return plan
        if len(self._plans) >= self.LIMIT or getattr(module, "_is_replica", False):
            return None
        try:
            plan = fuse_code(module, original.forward, signature, level).plan
        except Unfollowable:
            plan = None
        self._plans.append((signature, plan))
        return plan

    def __reduce__(self) -> Any:  # copies make their own
        return type(None), ()


def _forward_of_code(original: type[nn.Module], level: str) -> Callable[..., Any]:
    @functools.wraps(original.forward)  # tools read its signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and not any(HOOKS_OF_ALL):
            try:
                signature, tensors = signature_of(args, kwargs)
            except Unfollowable:
                pass
            else:
                plans = vars(self).get("_plans")
                if plans is None:
                    plans = vars(self)["_plans"] = _Plans()
                if plan := plans.find(self, original, signature, level):
                    return plan.run(self, *tensors)
        return original.forward(self, *args, **kwargs)

    return forward


def _forward_of_chain(original: type[nn.Module], level: str) -> Callable[..., Any]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, input: Any) -> Any:
        return run_sequential(self, input, level)

    return forward


_CLASSES: weakref.WeakValueDictionary[tuple[type, str], type] = weakref.WeakValueDictionary()


def _fused_class(original: type[nn.Module], level: str) -> type:
    found = _CLASSES.get((original, level))
    if found is None:
        forward = (_forward_of_chain if _is_chain(original) else _forward_of_code)(original, level)
        names = ("__module__", "__qualname__", "__doc__")
        attributes = {name: getattr(original, name) for name in names}
        attributes |= {"fused_from": original, "level": level, "forward": forward}
        found = _CLASSES[original, level] = type(original.__name__, (_Fused, original), attributes)
    return found


def _new(original: type[nn.Module], level: str) -> object:
    """For pickle and copy."""
    return object.__new__(_fused_class(original, level))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has when it is not fused."""
    kind = type(module)
    return kind.fused_from if issubclass(kind, _Fused) and "fused_from" in vars(kind) else kind


def _set_class(module: nn.Module, kind: type) -> None:
    for name in vars(module).keys() - without_plans(vars(module)):
        del vars(module)[name]
    module.__class__ = kind


# ---- what can be fused ----


@dataclass
class _Caller:
    """A module that calls layers, and what fuse finds in it."""

    name: str
    module: nn.Module
    fused: dict[int, Activation] = field(default_factory=dict)  # by id of the Linear
    reason: str = ""  # why the other layers are not fused


def _check(name: str, model: nn.Module, level: Level = "layers") -> None:
    if level not in LEVELS:
        raise ValueError(f"{name}: level must be one of {', '.join(LEVELS)}, got {kind(level)}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {kind(model)}")


def _callers(name: str, model: nn.Module, level: Level) -> list[_Caller]:
    """The analysis shared by fuse and fusion_report."""
    _check(name, model, level)
    callers = []
    for name, module in model.named_modules():
        caller = _Caller(name, module)
        if chains(module):
            _read_chain(caller, "stack" if isinstance(module, Sequential) else level)
        elif _calls_linears(module):
            _read_code(caller, level)
        else:
            continue
        callers.append(caller)
    return callers


def _is_chain(kind: type[nn.Module]) -> bool:
    """Whether modules of this class call their children one after another."""
    methods = ("__call__", "_call_impl", "forward", "__iter__", "__getattribute__")
    return any(
        issubclass(kind, base)
        and all(getattr(kind, name) is getattr(base, name) for name in methods)
        for base in (nn.Sequential, Sequential)
    )


def chains(module: object) -> bool:
    """Whether a module, fused or not, calls its children one after another."""
    return (
        isinstance(module, nn.Module)
        and _is_chain(original_class(module))
        and not find_override(module, of_hooks=False)
    )


def _read_chain(caller: _Caller, level: str) -> None:
    children = [*caller.module._modules.values()]
    for indices, activations in find_steps(children, level):
        for index, activation in zip(indices, activations, strict=False):
            caller.fused[id(children[index])] = activation


def _calls_linears(module: nn.Module) -> bool:
    """Whether the module's own code may call a Linear: its child, or one in a list of children."""
    lists = (nn.ModuleList, nn.ModuleDict)
    children = [*module.children()]
    for child in children:
        if type(child) in lists:
            children += child.children()
    return not isinstance(module, lists) and any(_is_linear(child) for child in children)


def _read_code(caller: _Caller, level: str) -> None:
    module, kind = caller.module, original_class(caller.module)
    if override := find_override(module, of_hooks=False):
        caller.reason = f"in a {kind.__name__}, which {override}"
    elif kind.__module__.startswith("torch."):
        caller.reason = f"in a {kind.__name__}, whose forward belongs to torch"
    elif _overrides_calls(kind):
        caller.reason = f"in a {kind.__name__}, which overrides how modules are called"
    else:
        try:
            found = fuse_code(module, kind.forward, _usual_signature(kind), level)
        except Unfollowable as error:
            caller.reason = f"in a {kind.__name__}, whose forward {error}"
        else:
            for path, activation in found.pairs.items():
                caller.fused[id(module.get_submodule(path))] = activation


def _overrides_calls(kind: type[nn.Module]) -> bool:
    names = ("__call__", "_call_impl", "__getattr__", "__getattribute__", "__setattr__")
    return any(getattr(kind, name) is not getattr(nn.Module, name) for name in names)


def _usual_signature(kind: type[nn.Module]) -> Signature:
    """A tensor for each argument that has no default."""
    try:
        parameters = [*inspect.signature(kind.forward).parameters.values()][1:]
    except (TypeError, ValueError):
        raise Unfollowable("has no signature") from None
    required = [p for p in parameters if p.default is p.empty]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.KEYWORD_ONLY) for p in required):
        required = [p for p in required if p.kind is p.POSITIONAL_OR_KEYWORD]
    return Signature(tuple(TENSOR for _ in required), ())


# ---- the report ----


def _is_linear(module: nn.Module) -> bool:
    """Also by name, to report quantized and scripted layers."""
    name = getattr(module, "original_name", type(module).__name__)
    return isinstance(module, nn.Linear) or name.endswith("Linear")


def _sites(model: nn.Module, callers: list[_Caller]) -> list[Site]:
    sites = []
    for name, module in model.named_modules():
        if not _is_linear(module):
            continue
        caller = next((c for c in callers if id(module) in c.fused), None)
        if caller:
            done = isinstance(caller.module, (_Fused, Sequential))
            activation = caller.fused[id(module)].name
            sites.append(Site(name, activation, "fused" if done else "would fuse", ""))
        elif isinstance(module, LinearAct):
            sites.append(Site(name, module.activation, "fused", f"a {type(module).__name__}"))
        else:
            sites.append(Site(name, None, "not fused", _reason(name, module, callers)))
    return sites


def _reason(name: str, linear: nn.Module, callers: list[_Caller]) -> str:
    """Why this Linear is not fused."""
    if not name:
        return "is the whole model"
    inside = [c for c in callers if not c.name or name.startswith(c.name + ".")]
    caller = max(inside, key=lambda c: len(c.name), default=None)
    if caller and caller.reason:
        return caller.reason
    if not isinstance(linear, nn.Linear) or not is_layer(linear):
        return f"is a {type_name(linear)}, which may compute something else than a torch.nn.Linear"
    if obstacle := find_obstacle(linear):
        return obstacle
    if caller is None:
        return "no module whose code could be read calls it"
    if not chains(caller.module):
        return "its output is not read by an activation alone"
    children = [*caller.module._modules.values()]
    index = next((i for i, child in enumerate(children) if child is linear), len(children))
    follower = children[index + 1] if index + 1 < len(children) else None
    if follower is None:
        return "last in its Sequential"
    if activation_of(follower) and (obstacle := find_obstacle(follower)):
        return f"its {type(follower).__name__} {obstacle}"
    if type(follower) in LinearAct.by_module:
        return f"followed by {follower}, whose options are not supported"
    return f"followed by {type(follower).__name__}"
