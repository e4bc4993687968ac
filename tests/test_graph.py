"""Pairs of Linear and activation in graphs of torch.fx: found, and only where they may be one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, symbolic_trace

from mlp_ext.functional import linear_act
from mlp_ext.graph import (
    CALLS,
    Pair,
    activation_of_node,
    find_pairs,
    linear_operands,
    replace_pairs,
)
from mlp_ext.nn import Activation

Function = Callable[..., Tensor]


def is_linear(node: Node) -> bool:
    return node.target is F.linear


def fused(graph: Graph, pair: Pair) -> Node:
    return graph.call_function(linear_act, (*linear_operands(pair.linear), *pair.activation))


def fuse(function: Function) -> tuple[GraphModule, list[Pair]]:
    """The function with its pairs replaced, and those pairs."""
    traced = symbolic_trace(function)
    pairs = find_pairs(traced.graph, is_linear)
    replace_pairs(pairs, fused)
    traced.graph.lint()
    traced.recompile()
    return traced, pairs


def operands() -> list[Tensor]:
    x, w, b = torch.randn(6, 5), torch.randn(4, 5), torch.randn(4)
    return [t.double().requires_grad_() for t in (3 * x, w, b)]


def check(function: Function, pairs: int) -> None:
    """`function` has so many pairs, and replacing them keeps values and gradients."""
    inputs, (traced, found) = operands(), fuse(function)
    assert len(found) == pairs
    assert [n.target for n in traced.graph.nodes].count(linear_act) == pairs
    results = [f(*(t * 1 for t in inputs)) for f in (function, traced)]
    torch.testing.assert_close(*results)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in results]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("function", [c for c in CALLS if callable(c)], ids=lambda f: f.__name__)
def test_every_function_is_the_activation_of_its_module(function: Function) -> None:
    graph = Graph()
    node = graph.call_function(function, (graph.placeholder("z"),))
    activation = activation_of_node(node)
    assert activation
    x, w, b = (t.detach() for t in operands())
    want = function(F.linear(x, w, b))
    torch.testing.assert_close(linear_act(x, w, b, *activation), want)


@pytest.mark.parametrize("method", [c for c in CALLS if isinstance(c, str)])
def test_every_method_is_the_activation_of_its_module(method: str) -> None:
    check(lambda x, w, b: getattr(F.linear(x, w, b), method)(), 1)


@pytest.mark.parametrize(
    "function, activation",
    [
        (lambda z: F.relu(z, inplace=True), Activation("relu")),
        (lambda z: F.leaky_relu(z, 0.3), Activation("leaky_relu", (0.3,))),
        (lambda z: F.leaky_relu(z, negative_slope=0.2, inplace=True), ("leaky_relu", (0.2,))),
        (lambda z: F.elu(z, 2), ("elu", (2.0,))),
        (lambda z: F.gelu(z, approximate="tanh"), ("gelu_tanh", ())),
        (lambda z: F.gelu(input=z), ("gelu", ())),
        (lambda z: F.softplus(z, 2, threshold=5.0), ("softplus", (2.0, 5.0))),
        (lambda z: F.hardtanh(z, -2, 2.5), ("hardtanh", (-2.0, 2.5))),
        (lambda z: F.relu6(z, True), ("hardtanh", (0.0, 6.0))),
    ],
)
def test_options_are_read_as_torch_reads_them(function: Function, activation: object) -> None:
    (node,) = [n for n in symbolic_trace(function).graph.nodes if n.op == "call_function"]
    assert activation_of_node(node) == activation
    check(lambda x, w, b: function(F.linear(x, w, b)), 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda z, a: F.leaky_relu(z, a),
        lambda z, a: F.softplus(z, threshold=a),
        lambda z, a: F.hardtanh(z, 0.0, a),
        lambda z, a: torch.tanh(z, out=a),
        lambda z, a: torch.tanh(a.new_tensor(1.0)) + z.abs(),
    ],
)
def test_an_option_that_is_no_number_is_not_read(function: Function) -> None:
    graph = symbolic_trace(lambda x, w, b, a: function(F.linear(x, w, b), a)).graph
    assert not find_pairs(graph, is_linear)


def test_clamp_is_not_relu() -> None:
    """clamp(min=0) has the derivative 1 at 0, relu 0: it is not the same activation."""
    check(lambda x, w, b: F.linear(x * 0, w, b * 0).clamp(min=0), 0)


def test_layers_in_a_row_and_in_parallel() -> None:
    def row(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = F.relu(F.linear(x, w, b))
        return F.linear(h, w.mT).sigmoid() + x

    def parallel(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        first, second = F.linear(x, w, b), F.linear(x, w, bias=b)
        return torch.tanh(first) * F.silu(second)

    check(row, 2)
    check(lambda x, w, b: F.relu(F.linear(input=x, weight=w)) + b, 1)
    check(parallel, 2)


def _in_place(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    z.add_(1.0)
    return F.relu(z)


def _relu_in_place(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    F.relu_(z)
    return z


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: F.relu(z := F.linear(x, w, b)) + z,
        lambda x, w, b: F.relu(F.linear(x, w, b) + 1),
        lambda x, w, b: F.linear(x, w, b).abs(),
        _in_place,
        _relu_in_place,
    ],
    ids=["read-twice", "not-next", "no-activation", "changed", "relu-in-place"],
)
def test_other_code_keeps_its_meaning(function: Function) -> None:
    check(function, 0)


def test_a_context_between_the_two_keeps_them_apart() -> None:
    graph = Graph()
    x, w, b = (graph.placeholder(name) for name in "xwb")
    z = graph.call_function(F.linear, (x, w, b))
    graph.call_function(torch._C._set_grad_enabled, (False,))
    graph.output(graph.call_function(F.relu, (z,)))
    assert not find_pairs(graph, is_linear)


def test_what_changes_the_input_afterwards_is_not_seen() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = F.linear(x.detach(), w, b)
        y = x.detach().add_(1)
        return F.relu(z) + y.sum()

    inputs, (traced, pairs) = operands(), fuse(function)
    want = function(*(t * 1 for t in inputs))
    torch.testing.assert_close(traced(*(t * 1 for t in inputs)), want)
    assert len(pairs) == 1


def test_modules_of_a_model_by_callbacks() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    graph = symbolic_trace(model).graph

    def module(node: Node) -> object:
        return model.get_submodule(str(node.target)) if node.op == "call_module" else None

    pairs = find_pairs(
        graph,
        lambda node: isinstance(module(node), nn.Linear),
        lambda node: Activation("relu") if isinstance(module(node), nn.ReLU) else None,
    )
    assert [(p.linear.target, p.activation_node.target, p.activation.name) for p in pairs] == [
        ("0", "1", "relu")
    ]
