"""Sequential: an nn.Sequential that runs its linear layers and activations as one operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from mlp_ext import _C
from mlp_ext.errors import CAUGHT, check_input, rename
from mlp_ext.nn import (
    Activation,
    FusedActivation,
    LinearAct,
    activation_of,
    find_addition,
    find_special,
    option_items,
    type_name,
)

_mlp: Callable[..., Tensor] = torch.ops.mlp_ext.mlp.default


class Sequential(nn.Sequential):
    r"""An nn.Sequential in which each run of linear layers and activations is one operator.

    .. math:: y_0 = x, \quad y_l = \sigma_l(y_{l-1} W_l^T + b_l)

    Everything but forward is nn.Sequential's: children, state_dict, repr, indices and slices. A run
    consists of nn.Linear layers, each alone or followed by an activation of torch.nn that has a
    layer in mlp_ext (ReLU, GELU, ...), and of those layers (LinearReLU, LinearGELU, ...). It is one
    call of ``torch.ops.mlp_ext.mlp`` and one autograd node (backpropagation: Rumelhart, Hinton and
    Williams, Nature 1986), with the values and derivatives of calling its children one by one.
    Other children are called as modules, and so are children with hooks, parametrizations, instance
    attributes or special parameters; with global module hooks, all children are. Later changes of
    children, options or hooks take effect in the next call.

    Shape: input [*, K] where the first layer is Linear(K, N), with any number of leading
    dimensions; output [*, N] of the last layer.
    Dtypes: in a run float32, float64, bfloat16, float16, the same for input and parameters; under
    autocast like nn.Linear.
    Raises, before the run computes anything, TypeError for another dtype and RuntimeError for
    shapes or devices that do not match, as "Sequential: input must be [*, K=10], got [64, 9]".
    """

    def forward(self, input: Any) -> Any:
        if torch.compiler.is_compiling():
            return _traced(self, input)
        plan = self.__dict__.get("_plan")
        if plan is None or not plan.guards.holds():
            plan = self.__dict__["_plan"] = _Plan(self)
        call: Any = None
        try:
            for call in plan.calls:
                input = call(input)
        except CAUGHT as error:
            if isinstance(call, _C.MlpCall):  # other children raise their own errors
                check_input("Sequential", input, call.weights[0])
                rename(error, "Sequential")
            raise
        return input

    def __getstate__(self) -> dict[str, Any]:  # for pickle and copy
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}


class FusedSequential(Sequential):
    """The class of an nn.Sequential after fuse(level="stack"); unfuse turns it back."""

    def _get_name(self) -> str:
        return "Sequential"


class Step(NamedTuple):
    """A run, as the indices of its layers among the children, or one child to call as a module."""

    indices: tuple[int, ...]
    activations: tuple[Activation, ...]  # () for a module to call


_IDENTITY = Activation("identity")


def find_steps(children: Sequence[nn.Module | None]) -> list[Step]:
    """The runs and calls of a Sequential with these children."""
    steps: list[Step] = []
    if any(_HOOKS_OF_ALL):
        return [Step((index,), ()) for index in range(len(children))]
    open_run = False  # whether the last step is a run that the next child may continue
    for index, child in enumerate(children):
        activation = None if find_obstacle(child) else _activation(child)
        indices, activations = steps[-1] if open_run else ((), ())
        if _is_layer(child) and activation:
            steps[len(steps) - open_run :] = [Step((*indices, index), (*activations, activation))]
            open_run = True
        elif open_run and activation == _IDENTITY:
            pass
        elif open_run and activation and activations[-1] == _IDENTITY:
            steps[-1] = Step(indices, (*activations[:-1], activation))
        else:
            steps.append(Step((index,), ()))
            open_run = False
    return steps


def find_obstacle(child: nn.Module | None) -> str:
    """Why this Linear or activation cannot be part of a run; "" if it can."""
    if child is None or not _activation(child):
        return f"is a {type_name(child)}, not exactly a torch.nn.Linear"
    return find_addition(child) or find_special(child)


def _is_layer(child: nn.Module | None) -> bool:
    return type(child) is nn.Linear or type(child) in LinearAct.by_module.values()


def _activation(child: nn.Module | None) -> Activation | None:
    """The activation of a child in a run; None if it is neither a layer nor a known activation."""
    if isinstance(child, LinearAct):
        return child.read() if _is_layer(child) else None
    if type(child) in (nn.Linear, nn.Identity, FusedActivation):
        return _IDENTITY
    return activation_of(child)


def _flattened(activations: Sequence[Activation]) -> tuple[list[str], list[float]]:
    """Names and parameters as the operator mlp takes them."""
    parameters = [number for activation in activations for number in activation.parameters]
    return [activation.name for activation in activations], parameters


# Global module hooks.
_HOOKS_OF_ALL: tuple[dict[int, Any], ...] = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)


class _Plan:
    """The calls of a Sequential, and guards over everything that find_steps has read."""

    def __init__(self, model: Sequential) -> None:
        modules: dict[str, Any] = model._modules
        children = [*modules.values()]
        self.calls: list[Callable[[Any], Any]] = []
        weights = []  # the first of each run, to guard the dtype
        for indices, activations in find_steps(children):
            layers: list[Any] = [children[index] for index in indices]
            if activations:
                ws = [_held(layer, "weight") for layer in layers]
                bs = [_held(layer, "bias") for layer in layers]
                names, parameters = _flattened(activations)
                function = partial(_call_mlp, ws, bs, names, parameters)
                self.calls.append(_C.MlpCall(ws, bs, names, parameters, function))
                weights.append(ws[0])
            else:
                self.calls.append(layers[0])

        known = [child for child in children if child is not None and _activation(child)]
        named = [child._parameters for child in known]
        parts: list[dict[Any, Any]] = [modules, *named]
        items = [(d, key, value) for d in parts for key, value in d.items()]
        types = [(value, type(value)) for _, _, value in items]
        # Additions (hooks, buffers, children) change the length of one of these dicts, and the
        # dicts themselves may be replaced, as by del model[0].
        attributes = [vars(child) for child in known]
        owned = [(a, name, d) for a in attributes for name, d in a.items() if isinstance(d, dict)]
        items += [(vars(model), "_modules", modules), *owned]
        items += [item for child in children if child is not None for item in option_items(child)]
        dicts: list[dict[Any, Any]] = [*parts, *_HOOKS_OF_ALL, *attributes]
        dicts += [d for _, _, d in owned]
        self.guards = _C.Guards(items, [(d, len(d)) for d in dicts], types, weights)


def _held(layer: nn.Module, name: str) -> Any:
    """layer.name, without an attribute access that torch.fx would trace."""
    held = layer._parameters
    return held[name] if name in held else getattr(layer, name)


def _call_mlp(weights: Any, biases: Any, activations: Any, parameters: Any, input: Any) -> Any:
    return _mlp(input, weights, biases, activations, parameters)


def _traced(model: Sequential, input: Any) -> Any:
    """Forward for torch.compile and torch.export, which have their own guards on modules."""
    children = [*model._modules.values()]
    for indices, activations in find_steps(children):
        layers = [children[index] for index in indices]
        if activations:
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
            input = _mlp(input, weights, biases, *_flattened(activations))
        else:
            input = layers[0](input)
    return input
