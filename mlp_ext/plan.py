"""Plans: the calls that a module makes instead of its own forward, as long as their guards hold.

A plan holds nothing alive. It refers to modules weakly and reads Parameters from them at each call,
so replaced weights are freed, and torch.utils.swap_tensors works.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as torch_module

from mlp_ext import _C
from mlp_ext.nn import Activation, find_override, find_special, option_items

_linear_act: Callable[..., Tensor] = torch.ops.mlp_ext.linear_act.default
_mlp: Callable[..., Tensor] = torch.ops.mlp_ext.mlp.default

# Global module hooks.
HOOKS_OF_ALL: tuple[dict[int, Any], ...] = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)


class GuardList:
    """Collects what a plan depends on, for _C.Guards."""

    def __init__(self) -> None:
        self.items: list[tuple[Any, Any, object]] = []
        self.sizes: list[tuple[Any, int]] = [(hooks, len(hooks)) for hooks in HOOKS_OF_ALL]
        self.types: list[tuple[object, type]] = []
        self.tensors: list[tuple[Any, Any]] = []
        self.class_items: list[tuple[object, str, object]] = []

    def guards(self) -> _C.Guards:
        return _C.Guards(self.items, self.sizes, self.types, self.tensors, self.class_items)

    def code(self, module: nn.Module) -> None:
        """That a call of the module runs its class's code and nothing else: its type, attributes
        and hooks. An added hook, buffer, parameter or child changes the size of one of its dicts.
        """
        ref = weakref.ref(module)
        self.types.append((ref, type(module)))
        self.sizes.append(((ref, None), len(vars(module))))
        for name, value in vars(module).items():
            if isinstance(value, dict):
                self.sizes.append(((ref, name), len(value)))

    def layer(self, module: nn.Module) -> None:
        """Also its options and parameters, but for their values."""
        self.code(module)
        ref = weakref.ref(module)
        self.items += [((ref, None), name, value) for name, value in option_items(module)]
        self.parameters(module, module._parameters)

    def parameters(self, module: nn.Module, names: Iterable[str]) -> None:
        place = (weakref.ref(module), "_parameters")
        for name in names:
            if isinstance(parameter := module._parameters[name], Tensor):
                self.tensors.append((place, name))
            else:
                self.items.append((place, name, parameter))

    def children(self, module: nn.Module) -> None:
        place = (weakref.ref(module), "_modules")
        self.sizes.append((place, len(module._modules)))
        for name, child in module._modules.items():
            is_module = isinstance(child, nn.Module)
            self.items.append((place, name, weakref.ref(child) if is_module else child))


class Plan:
    """`run`, and the guards under which it equals the module's own forward."""

    def __init__(self, module: nn.Module, run: Any, guards: _C.Guards) -> None:
        self._module, self.run, self._guards = weakref.ref(module), run, guards

    def is_for(self, module: nn.Module) -> bool:
        """Whether it was made for this module, as it is now. A replica that copied the module's
        __dict__ has a plan of another."""
        return self._module() is module and self._guards.holds()

    def __reduce__(self) -> tuple[Any, ...]:  # copies make their own
        return type(None), ()


def without_plans(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes as they are without fuse."""
    return {name: value for name, value in attributes.items() if name not in ("_plan", "_plans")}


def mlp_call(layers: list[nn.Module], activations: list[Activation]) -> _C.MlpCall:
    """Layers and their activations as one operator: a function of the input."""

    def call(weights: Any, biases: Any, input: Any) -> Any:
        if isinstance(input, Proxy):
            raise Untraceable
        return call_mlp(input, weights, biases, activations)

    return _C.MlpCall([weakref.ref(layer) for layer in layers], *flattened(activations), call)


def call_mlp(input: Any, weights: Any, biases: Any, activations: Sequence[Activation]) -> Any:
    """Layers and their activations as one operator, for inputs that are not plain tensors, too."""
    names, parameters = flattened(activations)
    if len(weights) == 1:
        return _linear_act(input, weights[0], biases[0], names[0], parameters)
    return _mlp(input, weights, biases, names, parameters)


class Untraceable(Exception):
    """Raised where torch.fx traces a fused module, to run the module's own forward instead."""


def flattened(activations: Sequence[Activation]) -> tuple[list[str], list[float]]:
    """Names and parameters as the operator mlp takes them."""
    parameters = [number for activation in activations for number in activation.parameters]
    return [activation.name for activation in activations], parameters


def find_obstacle(module: nn.Module) -> str:
    """Why a layer or activation must be called as a module; "" if an operator may compute it."""
    return find_override(module) or find_special(module)
