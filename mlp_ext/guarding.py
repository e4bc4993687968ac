"""Guards what a forward reads, and refuses what cannot be guarded."""

from __future__ import annotations

import enum
import functools
import numbers
import sys
import types
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlp_ext.plan import GuardList


class Unfollowable(Exception):
    """Why a forward cannot be followed with certainty."""


MOST_ITEMS = 500  # each costs about 10 ns in every call
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum,
          types.BuiltinFunctionType, types.ModuleType, nn.Module, range)  # fmt: skip
SETTINGS = (type(None), bool, int, float, str, list, dict)  # of the modules of libraries
_HEAP_TYPE = 1 << 9  # in __flags__ of a class: it is no static class of C
_MISSING = object()


def is_library(name: str | None) -> bool:
    return (name or "").partition(".")[0] in ("torch", *sys.stdlib_module_names)


def _of_numpy(value: object) -> bool:
    """Whether it is one of NumPy's functions that compute with their arguments alone."""
    return type(value).__module__ == "numpy" and callable(value)


def check_watched(name: str, value: Any) -> None:
    """Raises Unfollowable for iterators, and for what runs unseen by the profiler, such as the
    functions of Cython, which may draw random numbers."""
    while isinstance(value, (functools.partial, types.MethodType)):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    kind = type(value)
    if isinstance(value, type):
        is_watched = value.__flags__ & _HEAP_TYPE or issubclass(value, numbers.Number)
        is_watched = is_watched or is_library(value.__module__)
    else:
        is_watched = not hasattr(kind, "__next__") and (
            not callable(value)
            or isinstance(value, (types.FunctionType, types.BuiltinFunctionType))
            or isinstance(_class_attribute(kind, "__call__"), types.FunctionType)
            or is_library(kind.__module__)
            or _of_numpy(value)
        )
    if not is_watched:
        raise Unfollowable(f"uses {name}, a {kind.__name__}")


def _class_attribute(kind: type, name: str) -> Any:
    return next((vars(c)[name] for c in kind.__mro__ if name in vars(c)), _MISSING)


class Values(NamedTuple):
    """Guards values, and what code with these names may read of them."""

    guards: GuardList
    names: set[str]

    def attribute(self, module: nn.Module, name: str) -> None:
        guards, ref, own = self.guards, weakref.ref(module), vars(module)
        if name == "_modules":
            guards.children(module)
        elif name in own:
            self.item((ref, None), name, own[name], f"its {name}")
        elif name in own["_modules"]:
            child = own["_modules"][name]
            expected = None if child is None else weakref.ref(child)
            guards.items.append(((ref, "_modules"), name, expected))
        elif name in own["_parameters"]:
            guards.parameters(module, [name])
        elif name in own["_buffers"]:
            if own["_buffers"][name] is None:
                guards.items.append(((ref, "_buffers"), name, None))
            else:
                guards.tensors.append(((ref, "_buffers"), name))
        elif (raw := _class_attribute(type(module), name)) is _MISSING:
            raise Unfollowable(f"asks for an attribute {name!r}")
        else:
            self.class_item(ref, name, raw, f"its {name}", 0)

    def item(self, container: Any, key: Any, value: Any, what: str, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            self.guards.tensors.append((container, key))
            return
        expected: object = weakref.ref(value) if isinstance(value, nn.Module) else value
        self.guards.items.append((container, key, expected))
        self.contents(value, what, depth)

    def class_item(self, owner: object, name: str, raw: Any, what: str, depth: int) -> None:
        """An attribute of a class: of the owner, or of the owner's class. Code is watched."""
        self.guards.class_items.append((owner, name, raw))
        if isinstance(raw, types.FunctionType) or not hasattr(type(raw), "__get__"):
            self.contents(raw, what, depth)

    def contents(self, value: Any, what: str, depth: int) -> None:
        """What the value contains, by whatever it is reached."""
        guards = self.guards
        is_code = isinstance(value, (type, types.FunctionType))
        if isinstance(value, _PLAIN) or _of_numpy(value):
            return
        if is_code and is_library(value.__module__):
            return
        if depth == 4:
            raise Unfollowable(f"reads {what}, which is deeply nested")
        if isinstance(value, Tensor):
            guards.tensors.append(([value], 0))
        elif isinstance(value, (list, dict)):
            guards.sizes.append((value, len(value)))
            for k, v in value.items() if isinstance(value, dict) else enumerate(value):
                self.item(value, k, v, what, depth + 1)
        elif isinstance(value, type):
            self._class(value, value, what, depth)
        elif parts := _constant_parts(value):
            for part in parts:
                self.contents(part, what, depth + 1)
        elif not (isinstance(value, (tuple, frozenset)) or is_code):
            if not _is_simple(value):
                raise Unfollowable(f"reads {what}, a {type(value).__name__}")
            attributes = vars(value)
            guards.types.append((value, type(value)))
            guards.sizes.append((attributes, len(attributes)))
            for k, v in attributes.items():
                self.item(attributes, k, v, what, depth + 1)
            self._class(value, type(value), what, depth)

    def _class(self, owner: object, kind: type, what: str, depth: int) -> None:
        """What may be read of a class: the owner, or the owner's class."""
        if owner is kind and type(kind) is not type and self.names & vars(type(kind)).keys():
            raise Unfollowable(f"reads {what}, which has a metaclass")
        for name in self.names:
            raw = _class_attribute(kind, name)
            if raw is not _MISSING and (owner is kind or name not in vars(owner)):
                self.class_item(owner, name, raw, what, depth + 1)


def _constant_parts(value: Any) -> tuple[Any, ...]:
    """What a value refers to as long as it is the same."""
    if isinstance(value, types.MethodType):
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.FunctionType):
        parts = value.__defaults__, value.__kwdefaults__, vars(value)
        return tuple(part for part in parts if part)
    return tuple(value) if isinstance(value, (tuple, frozenset)) else ()


def _is_simple(value: object) -> bool:
    """Whether its attributes are all that it has, such as a dataclass or a namespace."""
    names = {"__getattr__", "__getattribute__", "__len__", "__iter__"}
    parts = [item for kind in type(value).__mro__ for item in vars(kind).items()]
    return (
        hasattr(value, "__dict__")
        and not callable(value)
        and not any(
            isinstance(v, property) or (isinstance(v, types.FunctionType) and name in names)
            for name, v in parts
        )
    )
