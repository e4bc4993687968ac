"""Follows a module's forward with torch.fx, where this is certain.

torch.fx records what a forward does with its input. It takes everything else as a constant:
attributes of self, globals, random numbers, the results of isinstance. So this module watches the
code while it runs, and either guards what was read or refuses, with a reason.
"""

from __future__ import annotations

import dis
import enum
import functools
import gc
import itertools
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlp_ext.guarding import (
    MOST_ITEMS,
    SETTINGS,
    Unfollowable,
    Values,
    check_watched,
    is_library,
)
from mlp_ext.nn import find_override
from mlp_ext.plan import GuardList


class Signature(NamedTuple):
    """The arguments of a call: TENSOR, or a constant, for each."""

    positional: tuple[object, ...]
    keywords: tuple[tuple[str, object], ...]


class _Tensor(enum.Enum):
    TENSOR = 0


TENSOR = _Tensor.TENSOR
_CONSTANTS = (type(None), bool, int, float, str)


def signature_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Signature, list[Tensor]]:
    """The signature of a call, and its tensors in order.

    Raises Unfollowable for an argument that is neither a plain tensor nor a constant, or a tensor
    that is passed twice.
    """
    tensors: list[Tensor] = []

    def kind(value: object) -> object:
        if type(value) in _CONSTANTS:
            return value, repr(value)  # 0.0 == -0.0 == False, but they compute other values
        is_plain = type(value) in (Tensor, nn.Parameter) and not value.is_nested  # type: ignore[attr-defined]
        if is_plain and all(value is not other for other in tensors):
            tensors.append(value)  # type: ignore[arg-type]
            return TENSOR
        raise Unfollowable(f"an argument is a {type(value).__name__}")

    positional = tuple([kind(value) for value in args])
    return Signature(positional, tuple([(k, kind(v)) for k, v in kwargs.items()])), tensors


class Followed(NamedTuple):
    """What a forward does, as long as the guards hold."""

    graph: fx.Graph  # calls of children are call_module nodes
    guards: GuardList


def follow(
    module: nn.Module, forward: Callable[..., Any], signature: Signature, inlines: bool = True
) -> Followed:
    """Follows `forward` of the module for calls of this signature. Raises Unfollowable.

    inlines: also follows small layers that the model defines, such as its own GELU, rather than
        calling them.
    """
    reads = _Reads(module)
    tracer, guards = _Tracer(forward, signature, inlines), GuardList()
    try:
        with _LOCK, _NoTensors(), reads.recording():  # type: ignore[no-untyped-call]
            graph = tracer.trace(module)
        reads.guard(guards)
        for child in tracer.inlined:
            guards.code(child)
    except Unfollowable:
        raise
    except Exception as error:  # of the model's code, which saw a Proxy instead of a tensor
        raise Unfollowable(_reason(error)) from None
    finally:
        has_changed = reads.restore()
    if has_changed or not guards.guards().holds():
        raise Unfollowable("changes what it reads")
    return Followed(graph, guards)


def _reason(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    if "control flow" in text or "iterated over" in text:
        return "branches on its input"
    return f"cannot be traced by torch.fx: {type(error).__name__}: {text}"[:160]


# One at a time: torch.fx patches nn.Module while it traces.
_LOCK = threading.RLock()


class _Value(fx.Proxy):
    """A Proxy that refuses to say what it is, since code that asks would see a Proxy."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if _is_of_torch(sys._getframe(1)):
            return _Value
        raise Unfollowable("asks for the type of a tensor")


def _record_in_place(name: str) -> None:
    """x += 1 changes x. torch.fx alone would record x + 1."""
    change = getattr(operator, f"i{name}")

    def in_place(x: Any, y: Any) -> Any:
        return change(x, y)

    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", in_place, (self, other), {})

    setattr(_Value, f"__i{name}__", method)


_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
for _name in _IN_PLACE:
    _record_in_place(_name)


class _Tracer(fx.Tracer):
    """Traces `forward` of the root, with constants where the signature has them. Calls of children
    are recorded, not followed, but for small layers that the model defines."""

    proxy_buffer_attributes = True

    def __init__(self, forward: Callable[..., Any], signature: Signature, inlines: bool) -> None:
        super().__init__()
        self._forward, self._signature, self._inlines = forward, signature, inlines
        self._thread = threading.get_ident()
        self.inlined: list[nn.Module] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        count = itertools.count()

        def argument(value: Any) -> Any:
            if value is TENSOR:
                return self.create_proxy("placeholder", f"input_{next(count)}", (), {})
            return value[0]

        args = [argument(value) for value in self._signature.positional]
        kwargs = {name: argument(value) for name, value in self._signature.keywords}
        return functools.partial(self._forward, self.root, *args, **kwargs), []

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:  # torch.fx patches calls in all threads
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        of_torch = type(m).__module__.partition(".")[0] in ("torch", "mlp_ext")
        if of_torch or m._modules or not self._inlines or find_override(m):
            return True
        self.inlined.append(m)
        return False


_COMPUTES = "computes with tensors that do not come from its input"


class _NoTensors(TorchDispatchMode):
    """Forbids computing: a result that does not depend on the input would become a constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Unfollowable(_COMPUTES)


def _package(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_of_torch(frame: types.FrameType | None) -> bool:
    return frame is not None and _package(frame) in ("torch", "mlp_ext")


def _is_of_model(frame: types.FrameType | None) -> bool:
    """Whether a frame runs the model's code, or Python's library on behalf of that."""
    if frame is None or _is_of_torch(frame):
        return False
    return _package(frame) not in sys.stdlib_module_names or _is_of_model(frame.f_back)


@functools.cache
def _recorded_code() -> set[types.CodeType]:
    """The code of torch's functions that torch.fx records and that are written in Python."""
    functions = itertools.chain(*torch.overrides.get_overridable_functions().values())
    return {f.__code__ for f in functions if isinstance(f, types.FunctionType)}


# Code of torch that a forward may run while it is followed, apart from functions that torch.fx
# records: what it computes depends on the arguments and on modules alone.
_MODULES = ("torch.nn.modules", "torch.nn.functional", "torch.functional", "torch.fx",
            "torch._jit_internal", "torch._tensor", "torch.compiler", __name__)  # fmt: skip
_DISPATCH = ("torch._library", "torch._compile", "torch.utils._python_dispatch")  # to _NoTensors
_CHANGES = {"__setattr__", "__delattr__", "register_buffer", "register_parameter", "add_module",
            "train", "requires_grad_", "_apply", "apply"}  # fmt: skip
# Builtin functions whose result depends on their arguments alone. Those of torch that compute are
# recorded where an argument comes from the input, and forbidden elsewhere.
_SAFE_MODULES = ("builtins", "math", "_operator", "itertools", "_functools", "_collections",
                 "torch._C._nn", "torch._C._special", "torch._C._linalg")  # fmt: skip
_SAFE_FUNCTIONS = {
    "builtins": {"len", "isinstance", "issubclass", "getattr", "hasattr", "min", "max", "sum",
                 "abs", "round", "sorted", "any", "all", "callable", "iter", "next", "divmod",
                 "pow", "repr"},
}  # fmt: skip
_SAFE_OWNERS = (str, tuple, list, dict, set, frozenset, int, float, bool, slice, range)
_READING_METHODS = {"get", "items", "keys", "values", "index", "count", "copy", "join", "format",
                    "lower", "upper", "startswith", "endswith", "split", "strip"}  # fmt: skip


_HANDLERS = {"PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH"}  # of try and with


class _Reads:
    """What a forward reads while it is followed, beside its arguments."""

    def __init__(self, root: nn.Module) -> None:
        self._model = {id(module) for module in root.modules()}
        self._attributes: dict[tuple[int, str], nn.Module] = {}
        self._globals: dict[tuple[int, str], dict[str, Any]] = {}
        self._copies: list[tuple[Any, Any]] = []  # of containers that were read, with their copies
        self._ids: set[int] = set()  # of these containers
        self._seen: set[types.CodeType] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        if sys.getprofile() is not None:
            raise Unfollowable("runs under a profiler")
        thread = threading.get_ident()

        def getattribute(module: nn.Module, name: str) -> Any:
            if threading.get_ident() == thread:
                self._read(module, name, sys._getframe(1))
            return object.__getattribute__(module, name)

        collects = gc.isenabled()
        gc.disable()  # finalizers and callbacks of the collector are not part of the forward
        nn.Module.__getattribute__ = getattribute  # type: ignore[method-assign, assignment]
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            del nn.Module.__getattribute__
            if collects:
                gc.enable()

    def _read(self, module: nn.Module, name: str, frame: types.FrameType) -> None:
        in_list = name == "_modules" and frame.f_globals["__name__"] == nn.ModuleList.__module__
        if not (_is_of_model(frame) or (in_list and id(module) in self._model)):
            return  # a slice of a ModuleList is a new one, which nobody can change
        if name in ("__dict__", "__class__"):
            raise Unfollowable(f"reads its {name}")
        self._attributes[id(module), name] = module
        value = object.__getattribute__(module, "__dict__").get(name)
        self._keep(name, value)

    def _keep(self, name: str, value: Any) -> None:
        check_watched(name, value)
        if isinstance(value, (list, dict)) and id(value) not in self._ids:
            self._ids.add(id(value))
            self._copies.append((value, value.copy()))

    def _profile(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "call":
            if _is_of_model(frame):
                self._enter(frame)
            elif _is_of_model(frame.f_back):
                self._enter_torch(frame)
        elif event == "c_call" and _is_of_model(frame):
            self._call_builtin(argument)

    def _enter(self, frame: types.FrameType) -> None:
        """Records the globals that code of the model may read."""
        code = frame.f_code
        if code in self._seen:
            return
        self._seen.add(code)
        if any(instruction.opname in _HANDLERS for instruction in dis.get_instructions(code)):
            raise Unfollowable("handles exceptions")
        locals_of_code = {name for seen in self._seen for name in (*seen.co_cellvars, "__class__")}
        if unknown := set(code.co_freevars) - locals_of_code:
            raise Unfollowable(f"reads the variable {min(unknown)!r} of a function around it")
        for name in code.co_names:
            if name in frame.f_globals:
                self._globals[id(frame.f_globals), name] = frame.f_globals
                value = frame.f_globals[name]
                self._keep(name, value)
                if isinstance(value, types.ModuleType):
                    self._read_module(value, set(code.co_names))
            elif name == "type":
                raise Unfollowable("asks for types")

    def _read_module(self, module: types.ModuleType, names: set[str]) -> None:
        content = vars(module)
        for name in names & content.keys():
            value = content[name]
            if (id(content), name) in self._globals:
                continue
            if isinstance(value, types.ModuleType):
                self._globals[id(content), name] = content
                self._read_module(value, names)
            elif not is_library(module.__name__) or isinstance(value, SETTINGS):
                self._globals[id(content), name] = content
                self._keep(name, value)

    def _enter_torch(self, frame: types.FrameType) -> None:
        code, module = frame.f_code, frame.f_globals["__name__"]
        if module == "torch._dynamo.utils":
            return  # a callback of a weak reference, where an error would be lost
        if module.startswith(_DISPATCH):
            raise Unfollowable(_COMPUTES)
        allowed = code in _recorded_code() or module.startswith(_MODULES)
        if not allowed or code.co_name in _CHANGES:
            raise Unfollowable(f"calls {code.co_name}")

    def _call_builtin(self, function: Any) -> None:
        owner = getattr(function, "__self__", None) or getattr(function, "__objclass__", None)
        name = getattr(function, "__name__", "")
        if id(owner) in self._ids:
            safe = name in _READING_METHODS
        elif isinstance(owner, types.ModuleType):
            safe = name in _SAFE_FUNCTIONS.get(owner.__name__, (name,))
            safe = safe and owner.__name__.startswith(_SAFE_MODULES)
        elif owner is None:
            safe = getattr(torch._C._VariableFunctions, name, None) is function
        else:
            safe = isinstance(owner, _SAFE_OWNERS) or owner in _SAFE_OWNERS
        if not safe:
            raise Unfollowable(f"calls {name}")

    def restore(self) -> bool:
        """Undoes changes of containers that were read. Returns whether there were any."""
        changed = [(a, b) for a, b in self._copies if _identities(a) != _identities(b)]
        for container, copy in changed:
            container.clear()
            container.update(copy) if isinstance(container, dict) else container.extend(copy)
        return bool(changed)

    def guard(self, guards: GuardList) -> None:
        """Guards everything that was read. Raises Unfollowable if something has no guard."""
        values = Values(guards, {name for code in self._seen for name in code.co_names})
        for (_, name), module in self._attributes.items():
            values.attribute(module, name)
        for (_, name), container in self._globals.items():
            values.item(container, name, container[name], f"the global {name}")
        if len(guards.items) + len(guards.class_items) > MOST_ITEMS:
            raise Unfollowable("reads too many values to guard")


def _identities(container: list[Any] | dict[Any, Any]) -> list[int]:
    if isinstance(container, dict):
        container = [*itertools.chain(*container.items())]
    return [*map(id, container)]
