"""Every gradient equals native's, only the wanted ones are computed, autograd's rules hold."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from references import EACH_KIND, assert_matches_native, native, results
from shapes import (
    DTYPES,
    LARGE_SHAPES,
    LAYOUTS,
    ODD,
    ONE_ROW,
    SHAPES,
    SMALL,
    THREE_LEADING,
    Shape,
    grad_output,
    leaves,
    operands,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mlp_ext

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

NAMES = ["input", "weight", "bias"]
SUBSETS = [mask for mask in product([True, False], repeat=3) if any(mask)]
SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0]


@pytest.mark.isa
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("activation", EACH_KIND)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_match_native(
    shape: Shape, dtype: torch.dtype, activation: str, bias: bool
) -> None:
    assert_matches_native(operands(shape, dtype, bias), activation, grad_output(shape, dtype))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_large_gradients_match_native(shape: Shape, dtype: torch.dtype, threads: int) -> None:
    for activation in ("relu", "sigmoid"):
        assert_matches_native(operands(shape, dtype), activation, grad_output(shape, dtype))


@pytest.mark.slow
@pytest.mark.isa
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_gradients_beyond_the_caches_match_native(dtype: torch.dtype, threads: int) -> None:
    """Results of more than 8 MiB: rows of dx begin at cache lines, those of the output do not."""
    shape = Shape((33001 if dtype == torch.float32 else 66001,), 64, 66)
    assert_matches_native(operands(shape, dtype), "relu", grad_output(shape, dtype))


@pytest.mark.slow
@pytest.mark.isa
@pytest.mark.parametrize(
    "shape",
    [Shape((430_001,), 7, 5), Shape((4201,), 1, 501), Shape((3,), 1500, 1501)],
    ids=["narrow", "one_input", "few_rows"],
)
def test_results_of_one_pass_beyond_the_caches_match_native(shape: Shape, threads: int) -> None:
    for activation in ("relu", "silu"):
        assert_matches_native(operands(shape), activation, grad_output(shape))


@pytest.mark.slow
def test_bias_gradient_of_many_rows_keeps_its_digits() -> None:
    for shape in (Shape((100_000,), 2, 3), Shape((20_000,), 2, 600)):  # in one pass, and packed
        dy = torch.rand(*shape.leading, shape.N)
        assert_matches_native(operands(shape), "identity", dy)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [ONE_ROW, SMALL, ODD, THREE_LEADING], ids=str)
@pytest.mark.parametrize("tensor", [*NAMES, "grad_output"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_do_not_depend_on_layout(layout: str, tensor: str, shape: Shape) -> None:
    for dtype in DTYPES:
        arranged: dict[str, Any] = operands(shape, dtype) | {
            "grad_output": grad_output(shape, dtype)
        }
        arranged[tensor] = LAYOUTS[layout](arranged[tensor])
        dy = arranged.pop("grad_output")
        for activation in EACH_KIND:
            assert_matches_native(arranged, activation, dy)


@pytest.mark.slow
@pytest.mark.isa
@pytest.mark.parametrize("shape", [SMALL, ODD, Shape((64,), 200, 96)], ids=str)
@pytest.mark.parametrize("tensor", [*NAMES, "grad_output"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_special_values_match_native(
    dtype: torch.dtype, tensor: str, shape: Shape
) -> None:
    for value in SPECIAL:
        arranged: dict[str, Any] = operands(shape, dtype) | {
            "grad_output": grad_output(shape, dtype)
        }
        arranged[tensor].flatten()[-3] = value
        dy = arranged.pop("grad_output")
        for activation in EACH_KIND:
            assert_matches_native(arranged, activation, dy)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_has_no_slope_at_zero_and_passes_no_nan_there(dtype: torch.dtype) -> None:
    z = torch.tensor([-1.0, -0.0, 0.0, 1.0, torch.nan], dtype=dtype).requires_grad_()
    output = mlp_ext.linear_relu(z.new_zeros(1, 2), z.new_zeros(5, 2), z)
    (slope,) = torch.autograd.grad(output, z, torch.ones_like(output), retain_graph=True)
    assert slope.tolist() == [0, 0, 0, 1, 1]
    for unusual in (torch.nan, torch.inf):
        (slope,) = torch.autograd.grad(
            output, z, torch.full_like(output, unusual), retain_graph=True
        )
        assert slope[:3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean], ids=["sum", "mean"])
@pytest.mark.parametrize("activation", EACH_KIND)
def test_gradients_of_a_reduction_match_native(activation: str, reduce: Any) -> None:
    """sum().backward() hands in a grad_output of stride 0."""
    for shape, dtype in product([ONE_ROW, SMALL, ODD, THREE_LEADING], DTYPES):
        one = torch.ones((), dtype=dtype)
        assert_matches_native(operands(shape, dtype), activation, one, reduce)


class Calls(TorchDispatchMode):
    """Records what reaches the kernels of mlp_ext."""

    def __init__(self) -> None:
        super().__init__()
        self.backward: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mlp_ext._linear_act_backward.default:
            self.backward.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("subset", SUBSETS, ids=str)
@pytest.mark.parametrize("activation", EACH_KIND)
def test_only_the_gradients_asked_for_are_computed(
    activation: str, subset: tuple[bool, ...]
) -> None:
    for shape in (SMALL, THREE_LEADING, Shape((64,), 200, 96)):
        arranged, dy = leaves(shape, subset), grad_output(shape)
        output = mlp_ext.linear_act(**arranged, activation=activation)
        with Calls() as calls:
            output.backward(dy)
        (call,) = calls.backward
        assert list(call[6]) == list(subset)
        assert (call[2] is not None, call[3] is not None) == (subset[1], subset[0])
        expected = results(native, arranged, activation, dy)
        for name, live in zip(NAMES, subset, strict=True):
            wanted = expected[name] if live else None
            torch.testing.assert_close(arranged[name].grad, wanted)


@pytest.mark.parametrize("wanted", NAMES)
def test_autograd_grad_computes_the_wanted_gradient_alone(wanted: str) -> None:
    arranged = leaves(SMALL)
    output = mlp_ext.linear_act(**arranged, activation="sigmoid")
    with Calls() as calls:
        (found,) = torch.autograd.grad(output.sum(), arranged[wanted])
    assert list(calls.backward[0][6]) == [name == wanted for name in NAMES]
    (expected,) = torch.autograd.grad(
        native(**arranged, activation="sigmoid").sum(), arranged[wanted]
    )
    torch.testing.assert_close(found, expected)
    assert all(t.grad is None for t in arranged.values())


@pytest.mark.parametrize("activation", EACH_KIND)
def test_backward_twice_over_a_retained_graph_accumulates(activation: str) -> None:
    for shape in (SMALL, ODD):
        arranged = leaves(shape)
        output, dy = mlp_ext.linear_act(**arranged, activation=activation), grad_output(shape)
        output.backward(dy, retain_graph=True)
        first = {name: t.grad.clone() for name, t in arranged.items()}
        output.backward(dy)
        assert all(torch.equal(t.grad, 2 * first[name]) for name, t in arranged.items())
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            output.backward(dy)


@pytest.mark.parametrize("layout", ["gaps", "transposed", "expanded"])
@pytest.mark.parametrize("shape", [SMALL, ODD, THREE_LEADING], ids=str)
def test_gradients_are_contiguous(shape: Shape, layout: str) -> None:
    arranged = leaves(shape)
    output = mlp_ext.linear_act(**arranged)
    gradients = torch.autograd.grad(
        output, list(arranged.values()), LAYOUTS[layout](grad_output(shape))
    )
    assert all(gradient.is_contiguous() for gradient in gradients)


@pytest.mark.parametrize("shape", [SMALL, *LARGE_SHAPES], ids=str)
def test_gradients_are_bitwise_equal_from_run_to_run(shape: Shape, threads: int) -> None:
    arranged = {name: torch.randn_like(t) for name, t in operands(shape).items()}
    dy = torch.randn_like(grad_output(shape))
    first, *others = (results(mlp_ext.linear_act, arranged, "tanh", dy) for _ in range(4))
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.mark.parametrize("shape", [SMALL, ODD, Shape((64,), 200, 96)], ids=str)
def test_gradients_are_right_from_several_python_threads_at_once(shape: Shape) -> None:
    batches = [(operands(shape), grad_output(shape)) for _ in range(8)]
    expected = [results(native, batch, "relu", dy) for batch, dy in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(
                lambda batch: results(mlp_ext.linear_act, batch[0], "relu", batch[1]), batches
            )
            for f, e in zip(found, expected, strict=True):
                assert all(torch.equal(f[name], e[name]) for name in e)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    "shape", [Shape((3,), 4, 2), Shape((2, 2), 3, 2), Shape((), 3, 2)], ids=str
)
@pytest.mark.parametrize("activation", EACH_KIND)
def test_gradcheck_first_and_second_derivatives(activation: str, shape: Shape, bias: bool) -> None:
    sizes = {"input": (*shape.leading, shape.K), "weight": (shape.N, shape.K), "bias": (shape.N,)}
    tensors = [torch.randn(sizes[name], dtype=torch.float64) for name in NAMES[: 2 + bias]]
    for mask in product([True, False], repeat=len(tensors)):
        if any(mask):
            arguments = [
                t.clone().requires_grad_(live) for t, live in zip(tensors, mask, strict=True)
            ]

            def function(*arguments: Tensor) -> Tensor:
                x, w, *b = arguments
                return mlp_ext.linear_act(x, w, b[0] if b else None, activation)

            assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
            assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


def test_bias_gradient_with_frozen_weight_is_the_same_on_every_run() -> None:
    """The packed path cuts columns of dW for threads; without dW there is nothing to cut."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.rand(512, 256, requires_grad=True)
        w, b = torch.rand(256, 256), torch.rand(256, requires_grad=True)
        for _ in range(60):
            (db,) = torch.autograd.grad(mlp_ext.linear_relu(x, w, b).sum(), b)
            assert torch.equal(db, torch.full((256,), 512.0))
            _, db = torch.autograd.grad(mlp_ext.linear_relu(x, w, b).sum(), (x, b))
            assert torch.equal(db, torch.full((256,), 512.0))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("expanded", ["input", "grad_output", "neither"])
def test_one_weight_and_many_rows_of_any_stride(expanded: str) -> None:
    x = (
        torch.full((1, 1), 2.0).expand(8192, 1)
        if expanded == "input"
        else torch.full((8192, 1), 2.0)
    )
    g = torch.ones(1, 1).expand(8192, 1) if expanded == "grad_output" else torch.ones(8192, 1)
    w = torch.ones(1, 1, requires_grad=True)
    (dw,) = torch.autograd.grad(mlp_ext.linear_relu(x, w), w, g)
    assert dw.item() == 2 * 8192
