"""Linear and activation pairs in graphs of torch.fx, whoever traced them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from mlp_ext.nn import Activation, activation_of

# Functions and methods that compute what a module of torch.nn computes. After the input, they take
# the options of its constructor, in the same order and with the same defaults. clamp(min=0) is not
# relu: its derivative at 0 is 1.
CALLS: dict[object, type[nn.Module]] = {
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    F.relu: nn.ReLU,
    torch.sigmoid: nn.Sigmoid,
    torch.sigmoid_: nn.Sigmoid,
    torch.special.expit: nn.Sigmoid,
    F.sigmoid: nn.Sigmoid,
    torch.tanh: nn.Tanh,
    torch.tanh_: nn.Tanh,
    F.tanh: nn.Tanh,
    F.leaky_relu: nn.LeakyReLU,
    F.leaky_relu_: nn.LeakyReLU,
    F.elu: nn.ELU,
    F.elu_: nn.ELU,
    torch.selu: nn.SELU,
    torch.selu_: nn.SELU,
    F.selu: nn.SELU,
    F.silu: nn.SiLU,
    F.gelu: nn.GELU,
    F.softplus: nn.Softplus,
    F.hardtanh: nn.Hardtanh,
    F.hardtanh_: nn.Hardtanh,
    F.relu6: nn.ReLU6,
    F.mish: nn.Mish,
    # Methods
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "sigmoid_": nn.Sigmoid,
    "tanh": nn.Tanh,
    "tanh_": nn.Tanh,
}


def activation_of_node(node: Node) -> Activation | None:
    """The activation that a call of a function or method applies to its input; None if it is
    another function, or an option is not a number.

    The node of F.leaky_relu(z, 0.3) gives ("leaky_relu", (0.3,)), that of F.relu6(z) gives
    ("hardtanh", (0.0, 6.0)).
    """
    module = CALLS.get(node.target) if node.op in ("call_function", "call_method") else None
    if module is None:
        return None
    options = {name: value for name, value in node.kwargs.items() if name != "input"}
    try:
        return activation_of(module(*node.args[1:], **options))
    except (AssertionError, TypeError):  # such as out=, or a Node in a comparison
        return None


def input_of(node: Node) -> object:
    """The input of a call such as F.relu(z), z.relu(), F.relu(input=z) or self.relu(z)."""
    return node.args[0] if node.args else node.kwargs.get("input")


def linear_operands(node: Node) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a call of F.linear, however they are passed."""

    def operands(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
        return input, weight, bias

    return operands(*node.args, **node.kwargs)


class Pair(NamedTuple):
    """A linear layer and the activation that alone reads its output."""

    linear: Node
    activation_node: Node
    activation: Activation


def find_pairs(
    graph: Graph,
    is_linear: Callable[[Node], bool],
    activation: Callable[[Node], Activation | None] = activation_of_node,
) -> list[Pair]:
    """The pairs that one operator may compute at the place of the linear layer, in order.

    Nothing else may read the layer's output, so no code can see or change it in between, and an
    activation in place is the same as another. Between the two, nothing may be called only for its
    effect, such as the start or end of no_grad or autocast.
    """
    pairs = []
    linear: Node
    for linear in graph.nodes:
        if len(linear.users) != 1 or not is_linear(linear):
            continue
        reader: Node = next(iter(linear.users))
        found = activation(reader)
        if found and input_of(reader) is linear and not _effect_between(linear, reader):
            pairs.append(Pair(linear, reader, found))
    return pairs


def _effect_between(first: Node, last: Node) -> bool:
    node = first.next
    while node is not last:
        # A context is entered by a call without tensors, and left by one that nobody reads.
        if not node.users or (node.op == "call_function" and not node.all_input_nodes):
            return True
        node = node.next
    return False


def find_runs(
    graph: Graph,
    is_linear: Callable[[Node], bool],
    activation: Callable[[Node], Activation | None],
    one_layer: bool,
) -> list[list[Pair]]:
    """The pairs, or runs of layers in which each alone reads the output of the one before.

    In a run, a layer without an activation has the identity, and itself as activation_node.
    """
    pairs = find_pairs(graph, is_linear, activation)
    if one_layer:
        return [[pair] for pair in pairs]
    by_linear = {pair.linear: pair for pair in pairs}
    runs: dict[Node, list[Pair]] = {}  # by the node of the output
    for node in graph.nodes:
        if not is_linear(node):
            continue
        pair = by_linear.get(node) or Pair(node, node, Activation("identity"))
        before = input_of(node)
        follows = (
            isinstance(before, Node)
            and before in runs
            and len(before.users) == 1
            and node.op == runs[before][0].linear.op == "call_module"
            and not _effect_between(before, node)
        )
        run = runs.pop(cast(Node, before)) if follows else []
        runs[pair.activation_node] = [*run, pair]
    return [run for run in runs.values() if len(run) > 1 or run[0].linear in by_linear]


def replace_run(run: list[Pair], fused: Callable[[Graph, list[Pair]], Node]) -> None:
    """Replaces a run by the node that `fused` creates, at the place of the first layer."""
    first, last = run[0].linear, run[-1].activation_node
    with first.graph.inserting_before(first):
        node = fused(first.graph, run)
    node.meta.update(last.meta)
    last.replace_all_uses_with(node)
    for pair in reversed(run):
        for old in dict.fromkeys((pair.activation_node, pair.linear)):
            first.graph.erase_node(old)


def replace_pairs(pairs: list[Pair], fused: Callable[[Graph, Pair], Node]) -> None:
    """Replaces each pair by the node that `fused` creates, at the place of the linear layer."""
    for pair in pairs:
        replace_run([pair], lambda graph, run: fused(graph, run[0]))
