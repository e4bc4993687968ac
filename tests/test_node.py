"""The node in autograd's graph behaves as torch's own do, for a layer and for a stack."""

import gc
import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from references import native
from shapes import grid
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import mlp_ext

pytestmark = pytest.mark.usefixtures("one_thread")

Function = Callable[..., Tensor]  # of x, two weights, two biases and the activations

NAMES = ["relu", "sigmoid"]
TWICE = "Trying to backward through the graph a second time"
close = torch.testing.assert_close


def by_layer(layer: Function) -> Function:
    def function(x: Tensor, w1: Tensor, w2: Tensor, b1: Any, b2: Any, names: Any = NAMES) -> Tensor:
        return layer(layer(x, w1, b1, names[0]), w2, b2, names[1])

    return function


def stack(x: Tensor, w1: Tensor, w2: Tensor, b1: Any, b2: Any, names: Any = NAMES) -> Tensor:
    output: Tensor = torch.ops.mlp_ext.mlp(x, [w1, w2], [b1, b2], names)
    return output


plain = by_layer(native)
FUSED = {"LinearActBackward": by_layer(mlp_ext.linear_act), "MlpBackward": stack}
each = pytest.mark.parametrize("node", FUSED)  # by the name of the node


def leaves(live: tuple[bool, ...] = (True,) * 5) -> list[Any]:
    torch.manual_seed(0)
    sizes = [(7, 4), (5, 4), (3, 5), (5,), (3,)]
    return [grid(*size).requires_grad_(on) for size, on in zip(sizes, live, strict=True)]


def gradients(output: Tensor, tensors: list[Any]) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().sum(), tensors))


# ---- what is seen of it ----


@each
def test_it_has_its_name_and_an_edge_for_each_input(node: str) -> None:
    x, w1, w2, b1, _ = leaves((False, True, True, True, True))
    found = FUSED[node](x, w1, w2, b1, None).grad_fn
    assert found.name() == node
    edges, inputs = found.next_functions, [None, w1, w2, b1, None]
    if node == "LinearActBackward":
        (hidden, place), *edges_above = edges
        assert (hidden.name(), place) == (node, 0)
        edges, inputs = (*hidden.next_functions, *edges_above), [None, w1, b1, w2, None]
    assert len(edges) == len(inputs)
    assert all((edge and edge.variable) is t for (edge, _), t in zip(edges, inputs, strict=True))


@each
def test_without_a_gradient_it_gives_none(node: str) -> None:
    tensors = leaves()
    output = FUSED[node](*tensors)
    output.grad_fn.register_prehook(lambda dy: (None,) * len(dy))
    output.sum().backward()
    assert [t.grad for t in tensors] == [None] * 5


@each
def test_anomaly_mode_names_it_and_shows_its_forward(node: str) -> None:
    tensors = leaves()
    with pytest.warns(UserWarning) as warned, torch.autograd.detect_anomaly():
        output = FUSED[node](*tensors)
        with pytest.raises(RuntimeError, match=f"'{node}' returned nan values in its 0th output"):
            output.backward(torch.full_like(output, torch.nan))
    (shown,) = [str(w.message) for w in warned if "Error detected" in str(w.message)]
    assert f"Error detected in {node}. Traceback of forward call" in shown
    assert "output = FUSED[node](*tensors)" in shown


# ---- what it saves ----


@each
def test_hooks_over_saved_tensors_see_each_once(node: str) -> None:
    tensors = leaves()
    packed: list[Tensor] = []
    unpacked: list[int] = []

    def pack(t: Tensor) -> int:
        packed.append(t.detach())
        return len(packed) - 1

    def unpack(place: int) -> Tensor:
        unpacked.append(place)
        return packed[place]

    with saved_tensors_hooks(pack, unpack):
        output = FUSED[node](*tensors)
    x, w1, w2, b1, _ = tensors
    saved = [x, w1, mlp_ext.linear_act(x, w1, b1, NAMES[0]), w2, output]
    saved += [saved[2]] if node == "LinearActBackward" else []  # once by each of two nodes
    contents = [sorted(t.detach().numpy().tobytes() for t in ts) for ts in (packed, saved)]
    assert contents[0] == contents[1] and not unpacked
    close(gradients(output, tensors), gradients(plain(*tensors), tensors))
    assert sorted(unpacked) == list(range(len(saved)))


@each
def test_change_in_place_tells_which_output(node: str) -> None:
    output = FUSED[node](*leaves())
    place, name = output.output_nr, node.removesuffix("Backward")
    assert place == (name == "Mlp")
    output.mul_(2)
    with pytest.raises(RuntimeError, match=rf"is output {place} of {name}(Backward)?, is at ver"):
        output.sum().backward()


@pytest.mark.parametrize("names", [NAMES, ["identity", "identity"]], ids="-".join)
@each
def test_second_backward_fails_where_native_s_does(node: str, names: list[str]) -> None:
    def outcome(function: Function, live: tuple[bool, ...]) -> str:
        output = function(*leaves(live), names).sum()
        output.backward()
        try:
            output.backward()
        except RuntimeError as error:
            return str(error)
        return "nothing was saved"

    outcomes = set()
    for live in product([True, False], repeat=5):
        if any(live):
            outcomes.add(outcome(FUSED[node], live)[: len(TWICE)])
            assert outcome(FUSED[node], live) == outcome(plain, live)
    assert outcomes == ({TWICE} if names is NAMES else {TWICE, "nothing was saved"})


@each
def test_a_graph_frees_what_it_saved(node: str) -> None:
    def kept(live: list[weakref.ref[Tensor]]) -> list[bool]:
        return [ref() is not None for ref in live]

    gc.disable()  # freed by counts alone: there is no cycle
    try:
        for backward in (True, False):
            x, *rest = leaves()
            inside = x + 1
            output = FUSED[node](inside, *rest)
            refs = [weakref.ref(inside), weakref.ref(output)]
            del inside
            assert kept(refs) == [True, True]
            if backward:
                output.sum().backward()
                assert kept(refs) == [False, True]
            del output
            assert kept(refs) == [False, False]
    finally:
        gc.enable()


# ---- ways through it ----


def reentrant(function: Function, tensors: list[Any]) -> list[Any]:
    checkpoint(function, *tensors, use_reentrant=True).square().sum().backward()
    return [t.grad for t in tensors]


WAYS: dict[str, Callable[[Function, list[Any]], list[Any]]] = {
    "checkpoint": lambda f, ts: gradients(checkpoint(f, *ts, use_reentrant=False), ts),
    "reentrant_checkpoint": reentrant,
    "batch_of_gradients": lambda f, ts: list(
        torch.autograd.grad(f(*ts), ts, torch.eye(21).view(21, 7, 3), is_grads_batched=True)
    ),
    "shared_inputs": lambda f, ts: gradients(f(ts[0][:4], ts[0], ts[0].t(), None, None), ts[:1]),
}


@pytest.mark.parametrize("way", WAYS)
@each
def test_gradients_match_native(node: str, way: str) -> None:
    close(WAYS[way](FUSED[node], leaves()), WAYS[way](plain, leaves()))


@pytest.mark.slow
@each
def test_compiled_autograd_gives_native_s_gradients(node: str) -> None:
    torch.compiler.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        backward = torch.compile(lambda loss: loss.backward(), backend="aot_eager")
        before = counters["compiled_autograd"]["captures"]
        for names in (NAMES, ["tanh", "relu"]):  # what was compiled for one does not serve both
            tensors, twins = leaves(), leaves()
            backward(FUSED[node](*tensors, names).square().sum())
            plain(*twins, names).square().sum().backward()
            close([t.grad for t in tensors], [t.grad for t in twins])
        assert counters["compiled_autograd"]["captures"] == before + 2
