"""Finds the children that a module's forward calls one after another."""

from __future__ import annotations

import dis
import re
from collections.abc import Callable
from types import FunctionType

from torch import nn

from mlp_ext.fuse import original_class

# Instructions of code without branches that only loads arguments and attributes and calls them.
_STRAIGHT = re.compile(
    "CACHE|CALL|COPY|LOAD_ATTR|LOAD_FAST|LOAD_METHOD|NOP|PRECALL|PUSH_NULL|RESUME|RETURN_VALUE|"
    "STORE_FAST"
)
_OWN_CODE = ("__call__", "_call_impl", "__getattr__", "__getattribute__")


def called_in_turn(module: nn.Module) -> list[str] | None:
    """The names of the children that forward(self, x) calls, each with the last one's result.

    None if it may do anything else: the code is straight, every name in it is a child's, and it is
    run once on placeholders.
    """
    kind = original_class(module)
    forward = kind.forward
    if not isinstance(forward, FunctionType):
        return None
    code = forward.__code__
    has_own_code = any(getattr(kind, name) is not getattr(nn.Module, name) for name in _OWN_CODE)
    arguments = (code.co_argcount, code.co_kwonlyargcount, len(code.co_freevars + code.co_cellvars))
    opcodes = {instruction.opname for instruction in dis.get_instructions(code)}
    is_straight = all(_STRAIGHT.match(opcode) for opcode in opcodes)
    are_children = all(
        name in module._modules and name not in vars(module) and not hasattr(kind, name)
        for name in code.co_names
    )
    if has_own_code or arguments != (2, 0, 0) or not is_straight or not are_children:
        return None
    model = _Placeholder()
    try:
        output = forward(model, model._last)
    except Exception:
        return None
    return model._called if model._called and output is model._last else None


class _Placeholder:
    """A model whose children accept only what the child before returned."""

    def __init__(self) -> None:
        self._called: list[str] = []
        self._last = object()

    def __getattr__(self, name: str) -> Callable[[object], object]:
        def child(value: object) -> object:
            if value is not self._last:
                raise TypeError
            self._called.append(name)
            self._last = object()
            return self._last

        return child
