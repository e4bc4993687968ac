"""linear_act's output equals native torch's: any shape, dtype, layout and value of its inputs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from references import EACH_KIND, assert_matches_native, native
from shapes import (
    DTYPES,
    LARGE_SHAPES,
    LAYOUTS,
    MID,
    ODD,
    ONE_ROW,
    SHAPES,
    SMALL,
    THREE_LEADING,
    Shape,
    grid,
    operands,
)

import mlp_ext

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

CANCELLING = ("gelu", "gelu_tanh")  # z times 1 - 1, nearly, where z is far below 0: as in torch
SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("activation", EACH_KIND)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_match_native(shape: Shape, dtype: torch.dtype, activation: str, bias: bool) -> None:
    assert_matches_native(operands(shape, dtype, bias), activation)


@pytest.mark.parametrize("activation", ["relu", "silu"])  # whose backward needs y, z
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_also_returns_z(shape: Shape, activation: str) -> None:
    given = operands(shape)
    y, z = torch.ops.mlp_ext._linear_act_forward(*given.values(), activation, [])
    torch.testing.assert_close(z, native(**given, activation="identity"))
    torch.testing.assert_close(y, native(**given, activation=activation))


@pytest.mark.parametrize("shape", [ONE_ROW, SMALL, ODD, THREE_LEADING], ids=str)
@pytest.mark.parametrize("operand", ["input", "weight", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_do_not_depend_on_layout(layout: str, operand: str, shape: Shape) -> None:
    for dtype in DTYPES:
        arranged = operands(shape, dtype)
        arranged[operand] = LAYOUTS[layout](arranged[operand])
        for activation in EACH_KIND:
            assert_matches_native(arranged, activation)


@pytest.mark.parametrize("shape", [SMALL, ODD, Shape((64,), 200, 96)], ids=str)
@pytest.mark.parametrize("operand", ["input", "weight", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_match_native(dtype: torch.dtype, operand: str, shape: Shape) -> None:
    for value in SPECIAL:
        arranged = operands(shape, dtype)
        arranged[operand].flatten()[-3] = value
        for activation in EACH_KIND:
            assert_matches_native(arranged, activation)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_activations_keep_their_limits(rows: int, dtype: torch.dtype) -> None:
    z = torch.tensor([-torch.inf, -1000.0, -0.0, 0.0, 1000.0, torch.inf, torch.nan], dtype=dtype)
    limits = {
        "relu": [0.0, 0.0, 0.0, 0.0, 1000.0, torch.inf, torch.nan],
        "sigmoid": [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, torch.nan],
        "tanh": [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0, torch.nan],
    }
    for activation, expected in limits.items():
        by_bias = mlp_ext.linear_act(z.new_zeros(rows, 2), z.new_zeros(7, 2), z, activation)
        by_weight = mlp_ext.linear_act(z.new_ones(rows, 1), z[:, None], None, activation)
        for output in (by_bias, by_weight):
            assert torch.equal(
                output.nan_to_num(-7), z.new_tensor(expected).nan_to_num(-7).expand(rows, 7)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", EACH_KIND)
def test_activation_is_accurate_over_its_range(activation: str, dtype: torch.dtype) -> None:
    """Relative accuracy, so that the small outputs of a sigmoid or tanh are held to it as well."""
    z = torch.linspace(-20, 20, 4001, dtype=torch.float64).to(dtype)
    output = mlp_ext.linear_act(z[:, None], z.new_ones(1, 1), None, activation)[:, 0]
    reference = native(z.double()[:, None], z.new_ones(1, 1).double(), None, activation)[:, 0]
    limits = torch.finfo(dtype)
    error, allowed = (output.double() - reference).abs(), 4 * limits.eps * reference.abs()
    if activation in CANCELLING:
        allowed += 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * z.double().abs()
    assert (error <= allowed + 4 * limits.tiny).all()


@pytest.mark.parametrize("shape", [(1, 64, 64), (2, 64, 32), (1, 4096, 1), (64, 64, 1)])
def test_subnormal_inputs_of_small_layers_are_kept(shape: tuple[int, int, int]) -> None:
    """Larger ones may take them for 0, as torch does where its instructions for bfloat16 do."""
    M, K, N = shape
    x, w = 1e-39 * torch.randn(M, K), torch.full((N, K), 1e3)
    for dtype in (torch.float32, torch.bfloat16):
        assert_matches_native({"input": x.to(dtype), "weight": w.to(dtype)}, "identity")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_are_accumulated_in_float32_or_better(dtype: torch.dtype) -> None:
    """Real-valued inputs, where every partial sum is rounded."""
    for shape in (MID, Shape((5,), 5000, 3)):
        arranged = {name: torch.randn_like(t) for name, t in operands(shape, dtype).items()}
        assert_matches_native(arranged, "identity")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", EACH_KIND)
def test_half_precision_is_rounded_once(activation: str, dtype: torch.dtype) -> None:
    """Bias and activation are applied before the result is rounded, to within half a unit."""
    arranged, limits = operands(ODD, dtype), torch.finfo(dtype)
    exact = native(**{name: t.double() for name, t in arranged.items()}, activation=activation)
    error = mlp_ext.linear_act(**arranged, activation=activation).double() - exact
    allowed = 0.501 * limits.eps * exact.abs().clamp(min=limits.tiny)
    if activation in CANCELLING:
        z = native(**{name: t.double() for name, t in arranged.items()}, activation="identity")
        allowed += 4 * torch.finfo(torch.float32).eps * z.abs()
    assert (error.abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_large_values_match_native(shape: Shape, dtype: torch.dtype, threads: int) -> None:
    for activation in ("relu", "sigmoid"):
        assert_matches_native(operands(shape, dtype), activation)


@pytest.mark.parametrize("shape", [SMALL, *LARGE_SHAPES], ids=str)
def test_values_are_bitwise_equal_from_run_to_run(shape: Shape, threads: int) -> None:
    arranged = {name: torch.randn_like(t) for name, t in operands(shape).items()}
    first, *others = (mlp_ext.linear_act(**arranged, activation="tanh") for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("shape", [SMALL, ODD, MID], ids=str)
def test_values_are_right_from_several_python_threads_at_once(shape: Shape) -> None:
    batches = [operands(shape) for _ in range(8)]
    expected = [native(**batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda batch: mlp_ext.linear_act(**batch), batches)
            assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_inputs_are_left_as_they_were() -> None:
    for shape in (SMALL, ODD):
        arranged = operands(shape)
        before = {name: t.clone() for name, t in arranged.items()}
        output = mlp_ext.linear_act(**arranged, activation="identity")
        output.zero_()
        assert all(torch.equal(arranged[name], before[name]) for name in before)
        assert all(arranged[name]._version == 0 for name in before)


def test_output_is_contiguous() -> None:
    for layout in LAYOUTS.values():
        for shape in (ODD, THREE_LEADING):
            arranged = operands(shape)
            output = mlp_ext.linear_act(layout(arranged["input"]), layout(arranged["weight"]))
            assert output.is_contiguous()


def test_named_functions_are_linear_act() -> None:
    x, w, b = operands(SMALL).values()
    assert torch.equal(mlp_ext.linear_act(x, w, b), native(x, w, b, "relu"))
    for bias in (b, None):
        assert torch.equal(mlp_ext.linear_relu(x, w, bias), mlp_ext.linear_act(x, w, bias, "relu"))
        assert torch.equal(
            mlp_ext.linear_sigmoid(x, w, bias), mlp_ext.linear_act(x, w, bias, "sigmoid")
        )
        assert torch.equal(mlp_ext.linear_tanh(x, w, bias), mlp_ext.linear_act(x, w, bias, "tanh"))
    by_name = mlp_ext.linear_act(input=x, weight=w, bias=b, activation="tanh")
    assert torch.equal(by_name, mlp_ext.linear_act(x, w, b, "tanh"))
    assert torch.equal(mlp_ext.linear_relu(x, w), mlp_ext.linear_relu(x, w, bias=None))


def test_one_row_without_and_with_a_batch_dimension_agree() -> None:
    x = grid(5)
    w, b = grid(3, 5), grid(3)
    assert torch.equal(mlp_ext.linear_act(x, w, b), mlp_ext.linear_act(x[None], w, b)[0])


def test_activations_are_the_promised_ones() -> None:
    assert set(mlp_ext.ACTIVATIONS) >= {"identity", "relu", "sigmoid", "tanh"}
