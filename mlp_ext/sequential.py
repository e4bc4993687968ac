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
from mlp_ext.nn import FusedActivation, LinearAct, find_addition, find_special, type_name

_mlp: Callable[..., Tensor] = torch.ops.mlp_ext.mlp.default


class Sequential(nn.Sequential):
    r"""An nn.Sequential in which each run of linear layers and activations is one operator.

    .. math:: y_0 = x, \quad y_l = \sigma_l(y_{l-1} W_l^T + b_l)

    Everything but forward is nn.Sequential's: children, state_dict, repr, indices and slices. A run
    goes on as long as the children are nn.Linear, each alone or with nn.ReLU, nn.Sigmoid or nn.Tanh
    after it, or layers of mlp_ext, as LinearReLU. It is one call of ``torch.ops.mlp_ext.mlp`` and
    one autograd node, with backpropagation (Rumelhart, Hinton and Williams, Nature 1986) written
    out; values and derivatives are those of the children called in turn. Any other child is called
    as it is, and so is one that was given a hook, a parametrization, an attribute of its own or a
    special parameter; all of them are where a module was registered a hook for all modules. What is
    changed later, a child or a hook, holds from the next call on.

    Shape: input [*, K] where the first layer is Linear(K, N), * any dimensions, also none; output
    [*, N] of the last layer.
    Dtypes: in a run float32, float64, bfloat16, float16; input and parameters alike, under autocast
    as nn.Linear.
    Raises, before the run computes anything, TypeError for another dtype and RuntimeError for
    shapes or devices that do not fit, as "Sequential: input must be [*, K=10], got [64, 9]".
    """

    def forward(self, input: Any) -> Any:
        if torch.compiler.is_compiling():
            return _traced(self, input)
        plan = self.__dict__.get("_plan")
        if plan is None or not plan.watch.holds():
            plan = self.__dict__["_plan"] = _Plan(self)
        call: Any = None
        try:
            for call in plan.calls:
                input = call(input)
        except CAUGHT as error:
            if isinstance(call, _C.Run):  # other children speak for themselves
                check_input("Sequential", input, call.weights[0])
                rename(error, "Sequential")
            raise
        return input

    def __getstate__(self) -> dict[str, Any]:  # for pickle and copy
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}


class FusedSequential(Sequential):
    """What fuse(level="stack") makes of an nn.Sequential, the same object; unfuse makes it one."""

    def _get_name(self) -> str:
        return "Sequential"


class Step(NamedTuple):
    """A run, by the places of its layers among the children; or one child to call as it is."""

    places: tuple[int, ...]
    activations: tuple[str, ...]  # () for a child to call


def find_steps(children: Sequence[nn.Module | None]) -> list[Step]:
    """How a Sequential goes about these children."""
    steps: list[Step] = []
    if any(_HOOKS_OF_ALL):
        return [Step((place,), ()) for place in range(len(children))]
    open_run = False  # whether the last step is a run that may go on
    for place, child in enumerate(children):
        activation = "" if find_obstacle(child) else _activation(child)
        places, activations = steps[-1] if open_run else ((), ())
        if _is_layer(child) and activation:
            steps[len(steps) - open_run :] = [Step((*places, place), (*activations, activation))]
            open_run = True
        elif open_run and activation == "identity":
            pass
        elif open_run and activation and activations[-1] == "identity":
            steps[-1] = Step(places, (*activations[:-1], activation))
        else:
            steps.append(Step((place,), ()))
            open_run = False
    return steps


def find_obstacle(child: nn.Module | None) -> str:
    """Why this Linear or activation is called as it is; "" if nothing speaks against a run."""
    if child is None or not _activation(child):
        return f"is a {type_name(child)}, not exactly a torch.nn.Linear"
    own = ("in_features", "out_features") if _is_layer(child) else ("inplace", "pair")
    return find_addition(child, *own) or find_special(child)


def _is_layer(child: nn.Module | None) -> bool:
    return type(child) is nn.Linear or type(child) in LinearAct.by_module.values()


def _activation(child: nn.Module | None) -> str:
    """What a child adds to a run; "" if it is neither a layer nor an activation that is known."""
    if isinstance(child, LinearAct):
        return child.activation if _is_layer(child) else ""
    if type(child) in (nn.Linear, nn.Identity, FusedActivation):
        return "identity"
    layer = LinearAct.by_module.get(type(child))
    return layer.activation if layer else ""


# The calls of all modules pass through these.
_HOOKS_OF_ALL: tuple[dict[int, Any], ...] = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)


class _Plan:
    """The calls of a Sequential, and a watch over whatever find_steps looked at for them."""

    def __init__(self, model: Sequential) -> None:
        modules: dict[str, Any] = model._modules
        children = [*modules.values()]
        self.calls: list[Callable[[Any], Any]] = []
        weights = []  # of one dtype in a run
        for places, activations in find_steps(children):
            layers: list[Any] = [children[place] for place in places]
            if activations:
                ws = [_held(layer, "weight") for layer in layers]
                bs = [_held(layer, "bias") for layer in layers]
                function = partial(_call_mlp, ws, bs, activations)
                self.calls.append(_C.Run(ws, bs, activations, function))
                weights.append(ws[0])
            else:
                self.calls.append(layers[0])

        known = [child for child in children if child is not None and _activation(child)]
        named = [child._parameters for child in known]
        parts: list[dict[Any, Any]] = [modules, *named]
        items = [(d, key, value) for d in parts for key, value in d.items()]
        types = [(value, type(value)) for _, _, value in items]
        # Hooks, buffers, children: what makes one of these dicts longer or shorter is an addition,
        # and each may be replaced by another, as del model[0] does.
        attributes = [vars(child) for child in known]
        owned = [(a, name, d) for a in attributes for name, d in a.items() if isinstance(d, dict)]
        items += [(vars(model), "_modules", modules), *owned]
        dicts: list[dict[Any, Any]] = [*parts, *_HOOKS_OF_ALL, *attributes]
        dicts += [d for _, _, d in owned]
        self.watch = _C.Guards(items, [(d, len(d)) for d in dicts], types, weights)


def _held(layer: nn.Module, name: str) -> Any:
    """layer.name, but torch.fx, when it traces, makes no access of the model's of it."""
    held = layer._parameters
    return held[name] if name in held else getattr(layer, name)


def _call_mlp(weights: Any, biases: Any, activations: Any, input: Any) -> Any:
    return _mlp(input, weights, biases, activations)


def _traced(model: Sequential, input: Any) -> Any:
    """Forward for torch.compile and torch.export, which keep their own watch over the modules."""
    children = [*model._modules.values()]
    for places, activations in find_steps(children):
        layers = [children[place] for place in places]
        if activations:
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
            input = _mlp(input, weights, biases, activations)
        else:
            input = layers[0](input)
    return input
