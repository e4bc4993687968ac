"""On a GPU: every path of the plan, streams, graphs, several devices, sizes beyond 32 bits."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from references import EACH_KIND, assert_matches_native, native, results
from shapes import DTYPES, LAYOUTS, Operands, Shape, grad_output, operands
from test_activations import CASES as ACTIVATION_CASES
from test_activations import Case
from torch import Tensor

import mlp_ext
from mlp_ext import _C

if not torch.cuda.is_available():
    pytest.skip("torch finds no cuda device here", allow_module_level=True)

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("on_cuda", "poisoned_memory", "exact_sums")]

# One of each path; the last rows are not aligned to 16 bytes, which CUTLASS does not take.
SMALL, TALL = Shape((64,), 200, 96), Shape((16411,), 64, 64)
LARGE, UNALIGNED = Shape((520,), 2048, 1032), Shape((515,), 1031, 771)
NARROW = Shape((65539,), 17, 16)  # in 16 bits too
PATHS = [SMALL, TALL, LARGE, UNALIGNED, NARROW]
NAMES = ["input", "weight", "bias"]

close = torch.testing.assert_close
each_path = pytest.mark.parametrize("shape", PATHS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_activation = pytest.mark.parametrize("activation", EACH_KIND)


@pytest.fixture
def exact_sums() -> Iterator[None]:
    """cuBLAS may round parts of a sum to 16 bits, in some kernels: zeros would get either sign."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


def random(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Operands, Tensor]:
    drawn = {name: torch.randn_like(t) for name, t in operands(shape, dtype).items()}
    return drawn, torch.randn_like(grad_output(shape, dtype))


def test_shapes_here_take_each_path() -> None:
    major, minor = torch.cuda.get_device_capability()

    def plan(shape: Shape, dtype: str) -> dict[str, Any]:
        sizes = (shape.leading[0], shape.K, shape.N)
        return _C.cuda_plan(*sizes, dtype, "tanh", 10 * major + minor)

    plans = [plan(shape, "float32") for shape in PATHS]
    assert [plan["forward"] for plan in plans] == ["small", "tall", "large", "large", "tall"]
    assert [plan["backward"] for plan in plans] == ["small", "tall", "large", "large", "tall"]
    assert plan(NARROW, "bfloat16")["forward"] == plan(NARROW, "bfloat16")["backward"] == "tall"
    if major == 9:
        assert plan(LARGE, "bfloat16")["epilogue"] == "cutlass"


@each_activation
@each_dtype
@each_path
def test_each_path_matches_native(shape: Shape, dtype: torch.dtype, activation: str) -> None:
    assert_matches_native(operands(shape, dtype), activation, grad_output(shape, dtype))
    assert_matches_native(operands(shape, dtype, bias=False), activation, grad_output(shape, dtype))


@pytest.mark.parametrize("case", ACTIVATION_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_path
def test_every_activation_matches_native(shape: Shape, dtype: torch.dtype, case: Case) -> None:
    name, parameters = case.activation
    dy = grad_output(shape, dtype)
    assert_matches_native(operands(shape, dtype), name, dy, parameters=parameters)


@pytest.mark.parametrize("activation", ["relu", "silu"])  # whose backward needs y, z
@each_dtype
@each_path
def test_forward_also_returns_z(shape: Shape, dtype: torch.dtype, activation: str) -> None:
    given = operands(shape, dtype)
    y, z = torch.ops.mlp_ext._linear_act_forward(*given.values(), activation, [])
    exact = {name: t.double() for name, t in given.items()}
    close(z, native(**exact, activation="identity").to(dtype))
    close(y, native(**exact, activation=activation).to(dtype))


@each_activation
@each_dtype
@each_path
def test_random_values_match_native(shape: Shape, dtype: torch.dtype, activation: str) -> None:
    drawn, dy = random(shape, dtype)
    drawn["weight"] *= shape.K**-0.5
    if activation == "relu":  # z near 0 may round to either side of its kink
        assert_matches_native(drawn, activation)
    else:
        assert_matches_native(drawn, activation, dy)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -0.0])
@pytest.mark.parametrize("tensor", [*NAMES, "grad_output"])
@each_dtype
@each_path
def test_special_values_match_native(
    shape: Shape, dtype: torch.dtype, tensor: str, value: float
) -> None:
    arranged: dict[str, Any] = operands(shape, dtype) | {"grad_output": grad_output(shape, dtype)}
    arranged[tensor].flatten()[-3] = value
    dy = arranged.pop("grad_output")
    for activation in EACH_KIND:
        assert_matches_native(arranged, activation, dy)


@each_dtype
@pytest.mark.parametrize("tf32", [False, True])
def test_relu_keeps_nan_whatever_kernel_makes_the_product(dtype: torch.dtype, tf32: bool) -> None:
    """cuBLASLt's epilogue makes 0 of NaN in some of its kernels, as in torch._addmm_activation."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        for M, K, N in product((1, 16, 515, 4096), (8, 24, 517, 2048), (8, 64, 255, 2048)):
            given = operands(Shape((M,), K, N), dtype)
            given["input"][M // 2, K // 3] = torch.nan
            given["bias"][N // 2] = torch.nan
            expected = torch.relu(torch.nn.functional.linear(**given)).isnan()
            assert torch.equal(mlp_ext.linear_relu(**given).isnan(), expected), (M, K, N)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("tensor", [*NAMES, "grad_output"])
@pytest.mark.parametrize("layout", LAYOUTS)
@each_path
def test_each_path_takes_any_layout(shape: Shape, layout: str, tensor: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arranged: dict[str, Any] = operands(shape, dtype) | {
            "grad_output": grad_output(shape, dtype)
        }
        arranged[tensor] = LAYOUTS[layout](arranged[tensor])
        dy = arranged.pop("grad_output")
        for activation in ("relu", "sigmoid"):
            assert_matches_native(arranged, activation, dy)


@pytest.mark.parametrize("wanted", [*NAMES, "none"])
@each_path
def test_each_gradient_alone_is_as_with_the_others(shape: Shape, wanted: str) -> None:
    drawn, dy = random(shape)
    together = results(mlp_ext.linear_act, drawn, "tanh", dy)
    if wanted == "none":
        assert torch.equal(mlp_ext.linear_act(**drawn, activation="tanh"), together["output"])
        return
    leaf = drawn[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(mlp_ext.linear_act(**drawn, activation="tanh"), leaf, dy)
    close(alone, together[wanted])


@each_dtype
@each_path
def test_results_are_bitwise_equal_from_run_to_run(shape: Shape, dtype: torch.dtype) -> None:
    drawn, dy = random(shape, dtype)
    first, *others = (results(mlp_ext.linear_act, drawn, "tanh", dy) for _ in range(4))
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("width", [5, 64, 5000])
@each_activation
def test_few_rows_of_any_width_match_native(rows: int, width: int, activation: str) -> None:
    for shape in (Shape((rows,), width, 7), Shape((rows,), 7, width), Shape((rows,), width, 5000)):
        assert_matches_native(operands(shape), activation, grad_output(shape))


@each_activation
@each_dtype
def test_an_empty_sum_is_the_bias(dtype: torch.dtype, activation: str) -> None:
    for shape in (Shape((70000,), 0, 33), Shape((3,), 0, 5000), Shape((70000,), 33, 0)):
        assert_matches_native(operands(shape, dtype), activation, grad_output(shape, dtype))


# ---- TF32 ----


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@each_path
def test_float32_is_as_precise_as_torch_is_set(shape: Shape, precision: str) -> None:
    drawn, dy = random(shape)
    assert_matches_native(drawn, "identity", dy)


# ---- streams, graphs, devices ----


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@each_path
def test_streams_do_not_meet_and_nothing_waits(shape: Shape, no_synchronisation: None) -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    drawn = [random(shape) for _ in streams]
    expected = [results(mlp_ext.linear_act, d, "sigmoid", dy) for d, dy in drawn]
    found = []
    for stream, (d, dy) in zip(streams, drawn, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                last = results(mlp_ext.linear_act, d, "sigmoid", dy)
            found.append(last)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    for f, e in zip(found, expected, strict=True):
        assert all(torch.equal(f[name], e[name]) for name in e)


@each_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_path
def test_captured_in_a_graph_it_follows_new_values(
    shape: Shape, dtype: torch.dtype, activation: str
) -> None:
    held, dy = random(shape, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(mlp_ext.linear_act, held, activation, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = results(mlp_ext.linear_act, held, activation, dy)
    for _ in range(2):
        fresh, fresh_dy = random(shape, dtype)
        for t, value in zip([*held.values(), dy], [*fresh.values(), fresh_dy], strict=True):
            t.copy_(value)
        graph.replay()
        expected = results(mlp_ext.linear_act, fresh, activation, fresh_dy)
        assert all(torch.equal(captured[name], expected[name]) for name in expected)


@pytest.mark.parametrize("moved", NAMES)
def test_tensors_on_processor_and_gpu_are_an_error_that_names_both(moved: str) -> None:
    mixed = operands(SMALL)
    mixed[moved] = mixed[moved].cpu()
    with pytest.raises(RuntimeError, match=r"linear_act: .*(cuda:0.*cpu|cpu.*cuda:0)"):
        mlp_ext.linear_act(**mixed)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
def test_tensors_on_two_gpus_are_an_error_that_names_both() -> None:
    mixed = operands(SMALL)
    with pytest.raises(RuntimeError, match=r"weight must be on cuda:0.*got cuda:1"):
        mlp_ext.linear_act(**mixed | {"weight": mixed["weight"].to("cuda:1")})


@two_gpus
@each_path
def test_any_gpu_computes_whichever_is_current(shape: Shape) -> None:
    drawn, dy = random(shape)
    there = {name: t.to("cuda:1") for name, t in drawn.items()}
    found = results(mlp_ext.linear_act, there, "tanh", dy.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for name, expected in results(mlp_ext.linear_act, drawn, "tanh", dy).items():
        assert found[name].device == torch.device("cuda:1")
        close(found[name].to("cuda:0"), expected)


# ---- sizes ----


@pytest.mark.parametrize(
    "shape", [Shape((2**25 + 3,), 64, 64), Shape((2**17 + 3,), 64, 2**14)], ids=str
)
def test_more_than_2_to_the_31_elements(shape: Shape) -> None:
    """The last rows are right, and db counts every row."""
    (rows,), K, N = shape
    needed = 2 * (3 * rows * N + 2 * rows * K)
    if torch.cuda.mem_get_info()[0] < 1.2 * needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of GPU memory")
    arranged = operands(Shape((1,), K, N), torch.bfloat16)
    arranged["input"] = torch.zeros(rows, K, dtype=torch.bfloat16)
    arranged["input"][-100:] = 1
    leaves = {name: t.requires_grad_() for name, t in arranged.items()}
    output = mlp_ext.linear_act(**leaves, activation="tanh")
    ends = {"first": slice(None, 100), "last": slice(-100, None)}
    for end in ends.values():
        expected = native(leaves["input"][end], leaves["weight"], leaves["bias"], "tanh")
        close(output[end], expected)
    output.backward(torch.ones((), dtype=torch.bfloat16).expand_as(output))
    slope = 1 - output[[0, -1]].detach().double().square()
    counted = (rows - 100) * slope[0] + 100 * slope[1]
    close(leaves["bias"].grad.double(), counted, rtol=2**-7, atol=1e-2)
    dz = slope.to(torch.bfloat16).double()
    dx = leaves["input"].grad
    close(dx[[0, -1]].double(), dz @ leaves["weight"].double(), rtol=2**-5, atol=0.1)
