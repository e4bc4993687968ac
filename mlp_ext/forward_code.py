"""Fuses the layers in a module's forward code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import fx, nn

from mlp_ext.following import Signature, follow
from mlp_ext.graph import (
    Pair,
    activation_of_node,
    find_runs,
    input_of,
    linear_operands,
    replace_run,
)
from mlp_ext.guarding import Unfollowable
from mlp_ext.nn import Activation, LinearAct, activation_of, find_special
from mlp_ext.plan import GuardList, Plan, call_mlp, find_obstacle, mlp_call
from mlp_ext.sequential import is_layer


class FusedCode(NamedTuple):
    """A plan for a forward, and what it fuses."""

    plan: Plan
    pairs: dict[str, Activation]  # of each fused Linear, by its path in the module


def fuse_code(
    module: nn.Module, forward: Callable[..., Any], signature: Signature, level: str
) -> FusedCode:
    """The plan of module's `forward` for calls of this signature. Raises Unfollowable."""
    try:
        graph, guards = follow(module, forward, signature)
    except Unfollowable:
        graph, guards = follow(module, forward, signature, inlines=False)
    pairs = _fuse(graph, module, guards, level)
    return FusedCode(Plan(module, _compiled(graph), guards.guards()), pairs)


def _compiled(graph: fx.Graph) -> Callable[..., Any]:
    """A function of the module and the tensors."""
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<fused forward>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function


def _fuse(
    graph: fx.Graph, module: nn.Module, guards: GuardList, level: str
) -> dict[str, Activation]:
    """Fuses the pairs of the graph; returns the fused layers' paths and activations."""

    def called(node: fx.Node) -> nn.Module | None:
        """The child that a node calls with one tensor."""
        given = len(node.args) + len(node.kwargs)
        is_call = node.op == "call_module" and given == 1 and node.kwargs.keys() <= {"input"}
        child = module.get_submodule(str(node.target)) if is_call else None
        return None if child is None or find_obstacle(child) else child

    def is_linear(node: fx.Node) -> bool:
        if node.op == "call_function" and node.target is F.linear:
            return all(_is_parameter(module, operand) for operand in linear_operands(node)[1:])
        child = called(node)
        return isinstance(child, nn.Linear) and not isinstance(child, LinearAct) and is_layer(child)

    def activation(node: fx.Node) -> Activation | None:
        child = called(node)
        return activation_of(child) if child else activation_of_node(node)

    found: dict[str, Activation] = {}

    def fused(graph: fx.Graph, run: list[Pair]) -> fx.Node:
        activations = [pair.activation for pair in run]
        layers = [called(pair.linear) for pair in run]
        if layers[0] is None:
            return _functional(graph, run[0])
        call = mlp_call([layer for layer in layers if layer], activations)
        return graph.call_function(_function(call), (cast(fx.Node, input_of(run[0].linear)),))

    runs = find_runs(graph, is_linear, activation, one_layer=level != "stack")
    for run in runs:
        for pair in run:
            for child in (called(pair.linear), called(pair.activation_node)):
                if child:
                    guards.layer(child)
            if pair.linear.op == "call_module":
                path = str(pair.linear.target)
            else:
                weight = linear_operands(pair.linear)[1]
                path = str(weight.target).rpartition(".")[0]
            found[path] = pair.activation
    for run in runs:
        replace_run(run, fused)
    return found


def _is_parameter(module: nn.Module, operand: object) -> bool:
    """Whether an operand of F.linear is None or a plain Parameter, read where it is used."""
    if operand is None:
        return True
    if not isinstance(operand, fx.Node) or operand.op != "get_attr":
        return False
    owner = module.get_submodule(str(operand.target).rpartition(".")[0])
    return not find_special(owner)


def _function(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """As a function with a name, which torch.fx needs to write a call of it."""

    def fused(input: Any) -> Any:
        return call(input)

    return fused


def _functional(graph: fx.Graph, pair: Pair) -> fx.Node:
    def fused(input: Any, weight: Any, bias: Any) -> Any:
        return call_mlp(input, [weight], [bias], [pair.activation])

    return graph.call_function(fused, linear_operands(pair.linear))
