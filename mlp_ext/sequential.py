"""Sequential: an nn.Sequential that runs its linear layers and activations as one operator."""

from __future__ import annotations

from collections.abc import Sequence as Children
from typing import Any, NamedTuple

import torch
from torch import nn

from mlp_ext import _C
from mlp_ext.errors import CAUGHT, check_input, rename
from mlp_ext.nn import Activation, LinearAct, activation_of, computes_as
from mlp_ext.plan import (
    HOOKS_OF_ALL,
    GuardList,
    Plan,
    Untraceable,
    call_mlp,
    find_obstacle,
    mlp_call,
    without_plans,
)


class Sequential(nn.Sequential):
    """An `nn.Sequential` in which each run of linear layers and activations is one operator.

        y_0 = x,   y_l = act_l(y_{l-1} W_l^T + b_l)

    Arguments, children, `state_dict`, repr, indices and slices are those of `nn.Sequential`. A run
    consists of `nn.Linear` and layers such as `LinearReLU`, each with or without an activation of
    `torch.nn` after it. It is one autograd node, with the values and derivatives of calling the
    children one by one.

    Other children are called as modules. So are children with hooks, parametrizations, instance
    attributes or special parameters. Later changes of children, options or hooks take effect in the
    next call.

    Shape:
        - Input: `(*, K)`, where the first layer is `nn.Linear(K, ...)`, with any number of leading
          dimensions; float32, float64, bfloat16 or float16, the dtype of the parameters.
        - Output: `(*, N)`, where the last layer is `nn.Linear(..., N)`.

    Raises:
        TypeError: the input of a run is not a tensor.
        RuntimeError: the input's shape, dtype or device does not match the first weight of a run.
            Raised before the run computes anything.

    Examples:
        >>> model = mlp_ext.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 1), nn.Sigmoid())
        >>> model(torch.randn(128, 20)).shape
        torch.Size([128, 1])
    """

    def forward(self, input: Any) -> Any:
        return forward(self, input, "stack")

    def __getstate__(self) -> dict[str, Any]:  # for pickle and copy
        return without_plans(vars(self))


def forward(model: nn.Module, input: Any, level: str) -> Any:
    """The forward of a Sequential that is fused at this level."""
    if torch.compiler.is_exporting():  # programs have PyTorch's operators only
        return nn.Sequential.forward(model, input)  # type: ignore
    if torch.compiler.is_compiling():
        return _compiled(model, input, level)
    plan: Plan | None = vars(model).get("_plan")
    if plan is None or not plan.is_for(model):
        plan = vars(model)["_plan"] = _plan(model, level)
    modules: dict[str, Any] = model._modules
    call: _C.MlpCall | None
    for call, keys in plan.run:
        if call is None:
            input = modules[keys[0]](input)
            continue
        try:
            input = call(input)
        except (Untraceable, *CAUGHT) as error:
            if not (isinstance(error, Untraceable) or getattr(input, "is_nested", False)):
                check_input("Sequential", input, call.weights[0])
                rename(error, "Sequential")
                raise
            for key in keys:
                input = modules[key](input)
    return input


class Step(NamedTuple):
    """A run, as the indices of its layers among the children, or one child to call as a module."""

    indices: tuple[int, ...]
    activations: tuple[Activation, ...]  # () for a module to call


_IDENTITY = Activation("identity")


def find_steps(children: Children[nn.Module | None], level: str) -> list[Step]:
    """The runs and calls of a Sequential with these children.

    At level "stack", a run is as long as possible; at level "layers", it is an nn.Linear and the
    activation after it.
    """
    steps: list[Step] = []
    if any(HOOKS_OF_ALL):
        return [Step((index,), ()) for index in range(len(children))]
    open_run = False  # whether the last step is a run that the next child may continue
    for index, child in enumerate(children):
        activation = None
        if isinstance(child, nn.Module) and not find_obstacle(child):
            activation = _activation(child)
        indices, activations = steps[-1] if open_run else ((), ())
        if activation and is_layer(child):
            steps[len(steps) - open_run :] = [Step((*indices, index), (*activations, activation))]
            open_run = True
        elif open_run and activation == _IDENTITY:
            pass
        elif open_run and activation and activations[-1] == _IDENTITY:
            steps[-1] = Step(indices, (*activations[:-1], activation))
        else:
            steps.append(Step((index,), ()))
            open_run = False
    if level == "stack":
        return steps
    return [pair for step in steps for pair in _pairs(step, children)]


def _pairs(run: Step, children: Children[nn.Module | None]) -> list[Step]:
    """A run as steps of one layer. A layer without an activation is called as a module."""
    if not run.activations:
        return [run]
    fused = [
        () if isinstance(children[index], LinearAct) or activation == _IDENTITY else (activation,)
        for index, activation in zip(*run, strict=True)
    ]
    return [Step((index,), pair) for index, pair in zip(run.indices, fused, strict=True)]


def is_layer(child: nn.Module | None) -> bool:
    """Whether its class computes what nn.Linear or one of the fused layers does."""
    kinds: list[type] = [nn.Linear, *LinearAct.by_module.values()]
    return any(computes_as(type(child), kind) for kind in kinds)


def _activation(child: nn.Module) -> Activation | None:
    """The activation of a child in a run; None if it is neither a layer nor a known activation."""
    if isinstance(child, LinearAct):
        return child.read() if is_layer(child) else None
    if is_layer(child) or type(child) is nn.Identity:
        return _IDENTITY
    return activation_of(child)


def _plan(model: nn.Module, level: str) -> Plan:
    keys: list[str] = [*model._modules]
    children: list[Any] = [*model._modules.values()]
    run: list[Any] = []  # a call, or None, and the children that it covers
    steps = find_steps(children, level)
    ends = [*(step.indices[0] for step in steps[1:]), len(keys)]
    for (indices, activations), end in zip(steps, ends, strict=False):  # none if it is empty
        layers = [children[index] for index in indices]
        call = mlp_call(layers, [*activations]) if activations else None
        run.append((call, keys[indices[0] : end]))
    guards = GuardList()
    guards.children(model)
    for child in children:
        if isinstance(child, nn.Module) and _activation(child):
            guards.layer(child)
    return Plan(model, run, guards.guards())


def _compiled(model: nn.Module, input: Any, level: str) -> Any:
    """Forward for torch.compile, which has its own guards on modules."""
    children = [*model._modules.values()]
    for indices, activations in find_steps(children, level):
        layers: list[Any] = [children[index] for index in indices]
        if activations:
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
            input = call_mlp(input, weights, biases, activations)
        else:
            input = layers[0](input)
    return input
