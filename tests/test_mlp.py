"""mlp, a whole stack as one operator and one autograd node, equals native torch layer by layer."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from references import alone, assert_as_accurate_as_native, native
from shapes import DTYPES, LAYOUTS, grid
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import mlp_ext

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

MLP = torch.ops.mlp_ext.mlp.default
FORWARD = torch.ops.mlp_ext._mlp_forward.default
BACKWARD = torch.ops.mlp_ext._mlp_backward.default
ERRORS = (RuntimeError, ValueError, TypeError)
close = torch.testing.assert_close

Stack = tuple[Tensor, list[Tensor], list[Tensor | None], list[str]]  # what the operator takes

# leading sizes, widths, activations, and of which layers there is a bias
CASES: dict[str, tuple[tuple[int, ...], list[int], list[str], list[bool]]] = {
    "tutorial": ((10,), [10, 5, 1], ["relu", "sigmoid"], [True, True]),
    "one_layer": ((7,), [13, 5], ["tanh"], [True]),
    "four_layers": ((33,), [17, 9, 8, 5, 3], ["tanh", "identity", "relu", "sigmoid"], [True] * 4),
    "some_biases": ((9,), [4, 6, 5, 2], ["sigmoid", "relu", "identity"], [False, True, False]),
    "one_row": ((), [5, 4, 3], ["relu", "tanh"], [True, True]),
    "three_leading": ((2, 3, 4), [6, 5, 4], ["sigmoid", "tanh"], [True, False]),
    "empty_batch": ((0,), [4, 3, 2], ["relu", "sigmoid"], [True, True]),
    "empty_leading": ((2, 0, 3), [4, 3, 2], ["relu", "sigmoid"], [True, True]),
    "empty_inside": ((4,), [3, 0, 2], ["relu", "sigmoid"], [True, True]),
    "wide": ((64,), [200, 96, 10], ["relu", "identity"], [True, True]),
}
each_case = pytest.mark.parametrize("case", CASES)


def stack(case: str, dtype: torch.dtype = torch.float32) -> Stack:
    leading, widths, activations, biases = CASES[case]
    weights = [grid(n, k, dtype=dtype) / 4 for k, n in pairwise(widths)]
    return (
        grid(*leading, widths[0], dtype=dtype),
        weights,
        [grid(len(w), dtype=dtype) if b else None for w, b in zip(weights, biases, strict=True)],
        activations,
    )


def layers(
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    activations: list[str],
    act: Callable[..., Tensor] = native,
) -> Tensor:
    for w, b, activation in zip(weights, biases, activations, strict=True):
        input = act(input, w, b, activation)
    return input


def tensors(arguments: Stack) -> dict[str, Tensor]:
    input, weights, biases, _ = arguments
    named = {"input": input} | {f"weights[{i}]": w for i, w in enumerate(weights)}
    return named | {f"biases[{i}]": b for i, b in enumerate(biases) if b is not None}


def mapped(function: Callable[[Tensor], Tensor], arguments: Stack) -> Stack:
    input, weights, biases, activations = arguments
    return (
        function(input),
        [function(w) for w in weights],
        [b if b is None else function(b) for b in biases],
        activations,
    )


def learning(arguments: Stack, live: Callable[[str], bool] = lambda name: True) -> Stack:
    copied = mapped(lambda t: t.detach().clone(), arguments)
    for name, t in tensors(copied).items():
        t.requires_grad_(live(name))
    return copied


def results(
    function: Callable[..., Tensor], arguments: Stack, grad_output: Tensor
) -> dict[str, Tensor]:
    arguments = mapped(lambda t: t.detach().requires_grad_(), arguments)
    output = function(*arguments)
    output.backward(grad_output.to(output.dtype))
    return {"output": output.detach()} | {n: t.grad for n, t in tensors(arguments).items()}


def grad_output(arguments: Stack) -> Tensor:
    return grid(*arguments[0].shape[:-1], len(arguments[1][-1]), dtype=arguments[0].dtype)


def assert_matches_native(arguments: Stack, dy: Tensor) -> None:
    found = results(MLP, arguments, dy)
    expected = results(layers, mapped(alone, arguments), alone(dy))
    reference = results(layers, mapped(Tensor.double, arguments), dy)
    sums = mapped(lambda t: t.double().abs(), arguments)
    terms = results(layers, (*sums[:3], ["identity"] * len(sums[1])), dy.abs())
    assert found.keys() == expected.keys()
    for name in expected:
        assert_as_accurate_as_native(
            found[name], expected[name], reference[name], terms[name], name
        )


# ---- values and gradients ----


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_match_native(case: str, dtype: torch.dtype) -> None:
    arguments = stack(case, dtype)
    assert_matches_native(arguments, grad_output(arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["four_layers", "three_leading"])
def test_layout_of_what_it_is_given_does_not_matter(case: str, layout: str) -> None:
    arguments = stack(case)
    assert_matches_native(
        mapped(LAYOUTS[layout], arguments), LAYOUTS[layout](grad_output(arguments))
    )


@each_case
def test_equals_linear_act_layer_by_layer_to_the_bit(case: str) -> None:
    arguments = stack(case)
    dy = grad_output(arguments)

    def chained(*arguments: Any) -> Tensor:
        return layers(*arguments, act=mlp_ext.linear_act)

    found, expected = results(MLP, arguments, dy), results(chained, arguments, dy)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(MLP(*arguments), found["output"])
        outputs = FORWARD(*arguments)
    assert torch.equal(outputs[-1], found["output"]) and len(outputs) == len(arguments[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Callable[[], Any]) -> None:
    arguments = learning(stack("tutorial"))
    with mode():
        found = MLP(*arguments)
    assert not found.requires_grad and torch.equal(found, MLP(*arguments).detach())


# ---- what is computed, what is kept ----


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func.name(), args))
        return func(*args, **(kwargs or {}))

    def names(self) -> list[str]:
        return [name for name, _ in self.seen if name.startswith("mlp_ext")]


def test_forward_and_backward_are_one_operator_each() -> None:
    arguments = learning(stack("four_layers"))
    with Calls() as calls:
        output = MLP(*arguments)
    assert calls.names() == ["mlp_ext::_mlp_forward"]
    assert {type(edge[0]).__name__ for edge in output.grad_fn.next_functions if edge[0]} == {
        "AccumulateGrad"
    }
    dy = grad_output(arguments)
    with Calls() as calls:
        output.backward(dy)
    assert calls.names() == ["mlp_ext::_mlp_backward"]


NAMES = list(tensors(stack("some_biases")))


@pytest.mark.parametrize("lowest", NAMES)
def test_only_the_wanted_gradients_are_computed(lowest: str) -> None:
    arguments = learning(stack("some_biases"), lambda name: name == lowest)
    output, dy = MLP(*arguments), grad_output(arguments)
    with Calls() as calls:
        output.backward(dy)
    (mask,) = (args[6] for name, args in calls.seen if name == "mlp_ext::_mlp_backward")
    assert sum(mask) == 1
    twin = learning(arguments, lambda name: name == lowest)
    layers(*twin).backward(dy)
    close([t.grad for t in tensors(arguments).values()], [t.grad for t in tensors(twin).values()])


def test_backward_stops_above_frozen_layers() -> None:
    arguments = learning(stack("four_layers"), lambda name: name == "weights[3]")
    outputs = FORWARD(*mapped(Tensor.detach, arguments))
    layer = torch.ops.mlp_ext._linear_act_backward.default
    dy, mask = grad_output(arguments), [False] * 9
    mask[4] = True
    # Nothing of the lower layers is given, so it could not go on.
    given = ([None, None, None, dy], None, [None] * 4, [None, None, *outputs[2:]])
    (found,) = BACKWARD(*given, arguments[3], [], mask)
    _, expected, _ = layer(
        dy, outputs[3], outputs[2], None, arguments[3][3], [], [False, True, False]
    )
    assert torch.equal(found, expected)
    assert BACKWARD(*given, arguments[3], [], [False] * 9) == []


def subsets() -> Iterator[frozenset[str]]:
    names = list(tensors(stack("tutorial")))
    for on in product([True, False], repeat=len(names)):
        if any(on):
            yield frozenset(n for n, live in zip(names, on, strict=True) if live)


@pytest.mark.parametrize("live", list(subsets()), ids=lambda live: "+".join(sorted(live)))
def test_every_subset_saves_and_computes_what_native_does(live: frozenset[str]) -> None:
    def trained(function: Callable[..., Tensor]) -> tuple[int, list[Any]]:
        arguments = learning(given, live.__contains__)
        kept: dict[int, Tensor] = {}
        with saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            output = function(*arguments)
        output.backward(dy)
        return len(kept), [t.grad for t in tensors(arguments).values()]

    given = stack("tutorial")
    dy = grad_output(given)
    found, expected = trained(MLP), trained(layers)
    assert found[0] == expected[0]
    close(found[1], expected[1])


def test_change_in_place_of_what_backward_reads_is_caught() -> None:
    for name in ("input", "weights[1]", "output"):
        arguments = learning(stack("tutorial"))
        output = MLP(*arguments)
        with torch.no_grad():
            {**tensors(arguments), "output": output}[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_retained_graph_gives_the_same_again() -> None:
    arguments = learning(stack("four_layers"))
    output, leaves = MLP(*arguments), list(tensors(arguments).values())
    dy = grad_output(arguments)
    first = torch.autograd.grad(output, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(output, leaves, dy)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward(dy)


# ---- second derivatives, transforms ----


@pytest.mark.parametrize("frozen", ["", "input", "weights[0]", "weights[1]", "biases[0]"])
@pytest.mark.parametrize("case", ["tutorial", "one_row", "three_leading", "some_biases"])
def test_gradcheck_of_first_and_second_derivatives(case: str, frozen: str) -> None:
    leading, widths, activations, biases = CASES[case]
    leading, widths = leading[:1] and (2,), [min(width, 3) for width in widths]
    weights = [torch.randn(n, k, dtype=torch.float64) for k, n in pairwise(widths)]
    arguments: Stack = (
        torch.randn(*leading, widths[0], dtype=torch.float64),
        weights,
        [w[:, 0].clone() if b else None for w, b in zip(weights, biases, strict=True)],
        activations,
    )
    leaves = learning(arguments, lambda name: name != frozen)

    def function(*flat: Tensor) -> Tensor:
        given = iter(flat)
        return MLP(*mapped(lambda t: next(given), leaves))

    flat: list[Tensor] = []
    mapped(lambda t: flat.append(t) or t, leaves)  # type: ignore[func-returns-value]
    assert torch.autograd.gradcheck(function, flat, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, flat, fast_mode=True)


def test_gradient_penalty_matches_native() -> None:
    def penalty(function: Callable[..., Tensor]) -> list[Any]:
        leaves = learning(given)
        output = function(*leaves)
        (slope,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
        (output.sum() + slope.square().sum()).backward()
        return [t.grad for t in tensors(leaves).values()]

    given = stack("four_layers", torch.float64)
    close(penalty(MLP), penalty(layers))


def test_gradients_of_hidden_outputs_are_added() -> None:
    def learned(outputs: list[Tensor], leaves: Stack) -> list[Tensor]:
        total = sum(y.square().sum() for y in outputs)
        return list(torch.autograd.grad(total, list(tensors(leaves).values()), allow_unused=True))

    given = stack("four_layers", torch.float64)
    for chosen in (1, 2, 3, 4):
        found, expected = learning(given), learning(given)
        ys: list[Tensor] = []
        y = expected[0]
        for layer in zip(*expected[1:], strict=True):
            ys.append(y := native(y, *layer))
        close(learned(FORWARD(*found)[:chosen], found), learned(ys[:chosen], expected))


def test_backward_operator_has_derivatives() -> None:
    x, ws, bs, activations = stack("tutorial", torch.float64)
    outputs = FORWARD(x, ws, bs, activations)
    dy = torch.randn(10, 1, dtype=torch.float64).requires_grad_()
    x, ws = x.requires_grad_(), [w.requires_grad_() for w in ws]

    def function(dy: Tensor, x: Tensor, *ws: Tensor) -> tuple[Tensor, ...]:
        return tuple(BACKWARD([None, dy], x, list(ws), outputs, activations, [], [True] * 5))

    assert torch.autograd.gradcheck(function, (dy, x, *ws), fast_mode=True)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Stack], Any]] = {
    "grad": lambda f, s: torch.func.grad(lambda w: f(s[0], w, *s[2:]).sum())(s[1]),
    "jacrev": lambda f, s: torch.func.jacrev(lambda x: f(x, *s[1:]))(s[0]),
    "jacfwd": lambda f, s: torch.func.jacfwd(lambda x: f(x, *s[1:]))(s[0]),
    "hessian": lambda f, s: torch.func.hessian(lambda x: f(x, *s[1:]).square().sum())(s[0]),
    "jvp": lambda f, s: torch.func.jvp(lambda x: f(x, *s[1:]), (s[0],), (s[0] + 1,)),
    "vmap": lambda f, s: torch.func.vmap(lambda x: f(x, *s[1:]))(s[0]),
    "vmap_weight": lambda f, s: torch.func.vmap(lambda w: f(s[0], [w, s[1][1]], *s[2:]))(
        torch.stack([s[1][0], 2 * s[1][0]])
    ),
    "vmap_of_grad": lambda f, s: torch.func.vmap(
        torch.func.grad(lambda w, x: f(x, w, *s[2:]).sum()), (None, 0)
    )(s[1], s[0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_match_native(transform: str) -> None:
    given = stack("tutorial", torch.float64)
    close(TRANSFORMS[transform](MLP, given), TRANSFORMS[transform](layers, given))


def test_forward_mode_derivatives_match_native() -> None:
    given = stack("some_biases", torch.float64)
    for name in tensors(given):
        with forward_ad.dual_level():
            chosen = tensors(given)[name]

            def dual(t: Tensor, chosen: Tensor = chosen) -> Tensor:
                return forward_ad.make_dual(t, torch.ones_like(t)) if t is chosen else t

            duals = mapped(dual, given)
            found, expected = MLP(*duals), layers(*duals)
            close(forward_ad.unpack_dual(found), forward_ad.unpack_dual(expected))


# ---- a citizen of torch ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "frozen"),
    [
        *((case, "") for case in ("tutorial", "some_biases", "one_row", "empty_batch")),
        *(("some_biases", frozen) for frozen in ("input", "weights[0]")),
    ],
)
def test_opcheck_of_forward(case: str, frozen: str) -> None:
    arguments = learning(stack(case), lambda name: name != frozen)
    torch.library.opcheck(MLP, arguments)
    torch.library.opcheck(FORWARD, arguments)


@pytest.mark.parametrize("mask", [[True] * 5, [False, True, False, True, True], [False] * 5])
def test_opcheck_of_backward(mask: list[bool]) -> None:
    x, ws, bs, activations = stack("tutorial")
    outputs = FORWARD(x, ws, bs, activations)
    dys = [None, grad_output((x, ws, bs, activations))]
    torch.library.opcheck(BACKWARD, (dys, x, ws, outputs, activations, [], mask))


def test_compile_with_a_dynamic_batch_compiles_once() -> None:
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(MLP, fullgraph=True, dynamic=True, backend=graphs)
    _, *rest = learning(stack("tutorial"))
    for rows in (7, 3, 20):
        x = grid(rows, 10).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        leaves = list(tensors((x, *rest)).values())  # type: ignore[arg-type]
        found, expected = compiled(x, *rest), layers(x, *rest)  # type: ignore[arg-type]
        close(found, expected)
        dy = torch.ones_like(found)
        close(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_treats_each_layer_as_a_linear_layer(dtype: torch.dtype) -> None:
    def evaluated(function: Callable[..., Tensor], to: torch.dtype | None = None) -> list[Tensor]:
        leaves = learning(mapped(lambda t: t.to(to or t.dtype), given))
        with torch.autocast("cpu", dtype=dtype, enabled=to is None):
            output = function(*leaves)
        dy = torch.ones_like(output)
        return [output, *torch.autograd.grad(output, list(tensors(leaves).values()), dy)]

    given = stack("tutorial")
    everything = evaluated(MLP), evaluated(layers), evaluated(layers, torch.float64)
    for found, expected, reference in zip(*everything, strict=True):
        assert found.dtype == expected.dtype
        assert_as_accurate_as_native(found.to(dtype), expected.to(dtype), reference)


@each_case
def test_meta_tensors_carry_shape_and_dtype(case: str) -> None:
    arguments = learning(mapped(lambda t: t.to("meta"), stack(case, torch.bfloat16)))
    output = MLP(*arguments)
    assert output.shape == (*arguments[0].shape[:-1], len(arguments[1][-1]))
    output.sum().backward()
    for t in (output, *(t.grad for t in tensors(arguments).values())):
        assert (t.device.type, t.dtype) == ("meta", torch.bfloat16)


# ---- errors ----


def t(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(sizes, dtype=dtype)


# The change to a good call (input [64, 10], weights [5, 10] and [1, 5], biases [5] and None).
BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no_layers": (
        lambda: {"weights": [], "biases": [], "activations": []},
        "mlp: weights must have one for each layer, at least one, got none",
    ),
    "few_biases": (
        lambda: {"biases": [None]},
        "mlp: biases must have one, or None, for each of the 2 weights, got 1",
    ),
    "many_activations": (
        lambda: {"activations": ["relu"] * 3},
        "mlp: activations must have one for each of the 2 weights, got 3",
    ),
    "activation": (
        lambda: {"activations": ["relu", "swish"]},
        f"mlp: activations[1] must be one of {', '.join(mlp_ext.ACTIVATIONS)}, got 'swish'",
    ),
    "input_0d": (lambda: {"input": t()}, "mlp: input must be [*, K], got a 0-dimensional tensor"),
    "input_width": (
        lambda: {"input": t(64, 9)},
        "mlp: weights[0] must be [N, K=9] to match input [64, 9], got [5, 10]",
    ),
    "input_integer": (
        lambda: {"input": t(64, 10, dtype=torch.int64)},
        "mlp: input must be float32, float64, bfloat16 or float16, got int64",
    ),
    "weight_width": (
        lambda: {"weights": [t(5, 10), t(1, 6)]},
        "mlp: weights[1] must be [N, K=5] to match the 5 outputs of layer 0, got [1, 6]",
    ),
    "weight_1d": (
        lambda: {"weights": [t(5, 10), t(5)]},
        "mlp: weights[1] must be [N, K], got [5]",
    ),
    "weight_dtype": (
        lambda: {"weights": [t(5, 10), t(1, 5, dtype=torch.float64)]},
        "mlp: weights[1] must be float32 to match input, got float64",
    ),
    "bias_length": (
        lambda: {"biases": [t(4), None]},
        "mlp: biases[0] must be [N=5] to match weights[0] [5, 10], got [4]",
    ),
    "bias_2d": (lambda: {"biases": [None, t(1, 1)]}, "mlp: biases[1] must be [N=1], got [1, 1]"),
    "bias_dtype": (
        lambda: {"biases": [t(5, dtype=torch.bfloat16), None]},
        "mlp: biases[0] must be float32 to match input, got bfloat16",
    ),
}


@pytest.mark.parametrize(
    "surroundings", [nullcontext, FakeTensorMode, lambda: torch.device("meta")]
)
@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learns"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str, learns: bool, surroundings: Callable[[], Any]) -> None:
    change, message = BAD[case]
    with surroundings():
        good = {
            "input": t(64, 10),
            "weights": [t(5, 10).requires_grad_(learns), t(1, 5)],
            "biases": [t(5), None],
            "activations": ["relu", "sigmoid"],
        }
        assert MLP(**good).shape == (64, 1)
        with pytest.raises(ERRORS) as raised:
            MLP(**good | change())
    assert str(raised.value).splitlines()[0] == message


def test_devices_that_differ_are_named() -> None:
    with pytest.raises(ERRORS, match=r"^mlp: weights\[1\] must be on cpu to match input, got meta"):
        MLP(t(64, 10), [t(5, 10), t(1, 5).to("meta")], [None, None], ["relu", "relu"])


def test_nothing_is_computed_before_the_checks() -> None:
    with Calls() as calls, pytest.raises(ERRORS, match=r"^mlp: weights\[1\]"):
        MLP(t(64, 10), [t(5, 10), t(1, 6)], [None, None], ["relu", "relu"])
    assert calls.names() == ["mlp_ext::mlp"]


@pytest.mark.parametrize("place", range(5))
def test_bad_lists_of_the_backward_operator_are_named(place: int) -> None:
    x, ws, bs, activations = stack("tutorial")
    outputs, dy = FORWARD(x, ws, bs, activations), t(10, 1)
    names = ["grad_outputs", "weights", "outputs", "activations", "output_mask"]
    lists: list[Any] = [[None, dy], ws, outputs, activations, [True] * 5]
    lists[place] = lists[place][:-1]
    dys, ws, outputs, activations, mask = lists
    named = names[place] if names[place] != "activations" else "grad_outputs"
    with pytest.raises(ERRORS, match=rf"^_mlp_backward: {named} must have"):
        BACKWARD(dys, x, ws, outputs, activations, [], mask)


def test_backward_operator_needs_the_last_gradient_and_fitting_ones() -> None:
    x, ws, bs, activations = stack("tutorial")
    outputs = FORWARD(x, ws, bs, activations)
    rest = (x, ws, outputs, activations, [], [True] * 5)
    with pytest.raises(ERRORS, match=r"^_mlp_backward: grad_outputs\[1\], .* must be given"):
        BACKWARD([t(10, 5), None], *rest)
    with pytest.raises(ERRORS, match=r"^_mlp_backward: grad_outputs\[0\] must be \[10, 5\]"):
        BACKWARD([t(1, 5), t(10, 1)], *rest)
