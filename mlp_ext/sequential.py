"""Sequential: an nn.Sequential that runs its linear layers and activations as one operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from mlp_ext.nn import DTYPES, FusedActivation, LinearAct, find_addition, find_special, type_name

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
    shapes or devices that do not fit, as "mlp: weights[1] must be [N, K=5] to match the 5 outputs
    of layer 0, got [1, 6]".
    """

    def forward(self, input: Any) -> Any:
        if torch.compiler.is_compiling():
            return _traced(self, input)
        plan = self.__dict__.get("_plan")
        if plan is None or not plan.holds([*self._modules.values()]):
            plan = self.__dict__["_plan"] = _Plan([*self._modules.values()])
        for child, weights, biases, activations in plan.calls:
            input = _mlp(input, weights, biases, activations) if activations else child(input)
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
    """The steps over the very children and parameters, for as long as they are what they were.

    Whatever find_steps looked at is looked at again by holds, on every call, hence in as few
    steps of the interpreter as can be.
    """

    def __init__(self, children: list[nn.Module]) -> None:
        steps = find_steps(children)
        layers: list[list[Any]] = [
            [children[place] for place in step.places if step.activations] for step in steps
        ]
        self.children = children
        self.calls = [
            (
                children[step.places[0]],
                [layer.weight for layer in run],
                [layer.bias for layer in run],
                step.activations,
            )
            for step, run in zip(steps, layers, strict=True)
        ]
        known = [child for child in children if _activation(child)]
        self.named = [child._parameters for child in known if child._parameters]
        self.parameters = [p for named in self.named for p in named.values()]
        self.types = [*map(type, chain(children, self.parameters))]
        # Hooks, buffers, children: what makes one of these longer or shorter is an addition.
        attributes = [vars(child) for child in known]
        collections: list[Sized] = [*_HOOKS_OF_ALL, *attributes]
        collections += [d for a in attributes for d in a.values() if isinstance(d, dict)]
        self.empty = [c for c in collections if not c]  # nearly all, and any() is fastest
        self.filled = [c for c in collections if c]
        self.lengths = [*map(len, self.filled)]
        self.weights = [weights[0] for _, weights, _, _ in self.calls if weights]

    def holds(self, children: list[nn.Module]) -> bool:
        parameters = [*chain.from_iterable(map(dict.values, self.named))]
        return (
            len(children) == len(self.children)
            and all(map(is_, children, self.children))
            and len(parameters) == len(self.parameters)
            and all(map(is_, parameters, self.parameters))
            and [*map(type, chain(children, parameters))] == self.types
            and not any(self.empty)
            and [*map(len, self.filled)] == self.lengths
            and all(weight.dtype in DTYPES for weight in self.weights)
        )


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
