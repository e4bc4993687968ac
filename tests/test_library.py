"""bfloat16 around products of torch: large layers where it is multiplied in pairs or tiles, and our
own path for tiles is not taken.

Forced here, so that any processor runs it.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from references import EACH_KIND, assert_matches_native
from shapes import LAYOUTS, Shape, grad_output, grid, operands
from steps import NETS, assert_steps_match_eager, training
from torch import Tensor

import mlp_ext
from mlp_ext import _C

pytestmark = pytest.mark.usefixtures("tiles", "poisoned_memory")

BFLOAT16 = torch.bfloat16
NEVER = 2**62
FLAT = Shape((519,), 256, 130)
FEW_ROWS = Shape((2,), 1030, 1028)  # forward they take dots
NARROW = Shape((3, 15000), 24, 16)  # and more rows of dz than are added up at once
SHAPES = [FLAT, FEW_ROWS, NARROW]
SUBSETS = [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]


@pytest.fixture
def tiles() -> Iterator[None]:
    _C.use_machine({"amx": _C.machine("zen4")["amx"] | {"amx_rows": NEVER}})
    _C.force_dot_mode("amx")
    yield
    _C.force_dot_mode(None)
    _C.use_machine(None)


def test_these_shapes_take_it() -> None:
    for shape in SHAPES:
        M = torch.Size(shape.leading).numel()
        plan = _C.plan(M, shape.K, shape.N, item_size=2, threads=2, mode="amx")
        assert plan["forward_path"] == ("dots" if shape == FEW_ROWS else "library")
        assert plan["backward_path"] == "library"


@pytest.mark.parametrize(("K", "N"), [(257, 130), (256, 131)])
def test_odd_widths_do_not_take_it(K: int, N: int) -> None:
    """On a matrix unit torch's product reads beyond the end of such rows."""
    assert "library" not in _C.plan(519, K, N, 2, 2, mode="amx").values()
    pairs = _C.plan(519, K, N, 2, 2, mode="bf16_dot", machine="zen4")
    assert pairs["backward_path"] == "library"


@pytest.mark.parametrize("shape", [(4096, 65, 128), (256, 1025, 1024), (1025, 57, 512)], ids=str)
def test_nothing_beside_a_row_is_read(shape: tuple[int, int, int]) -> None:
    M, K, N = shape
    _C.force_dot_mode(None)  # as this processor multiplies

    def far_apart(t: Tensor) -> Tensor:  # with NaN between the rows
        big = t.new_full((len(t), t.shape[1] + 1000), torch.nan)
        return big[:, 7 : 7 + t.shape[1]].copy_(t)

    x, w, dy = (grid(*size, dtype=BFLOAT16) for size in ((M, K), (N, K), (M, N)))
    leaves = far_apart(x).requires_grad_(), far_apart(w).requires_grad_()
    y = mlp_ext.linear_act(*leaves, None, "identity")
    dx, dw = torch.autograd.grad(y, leaves, far_apart(dy))
    exact = [t.double() for t in (x, w, dy)]
    products = (exact[0] @ exact[1].t(), exact[2] @ exact[1], exact[2].t() @ exact[0])
    for actual, expected in zip((y, dx, dw), products, strict=True):
        assert ((actual.double() - expected).abs() <= 2**-8 * expected.abs().max()).all()


@pytest.mark.slow
@pytest.mark.isa
@pytest.mark.parametrize("activation", EACH_KIND)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_match_native(shape: Shape, activation: str, threads: int) -> None:
    bias = (threads == 1) == (activation in ("relu", "tanh"))
    assert_matches_native(operands(shape, BFLOAT16, bias), activation, grad_output(shape, BFLOAT16))


@pytest.mark.slow
@pytest.mark.parametrize("operand", ["input", "weight", "bias", "grad_output"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_layout(layout: str, operand: str) -> None:
    arranged = operands(FLAT, BFLOAT16) | {"grad_output": grad_output(FLAT, BFLOAT16)}
    arranged[operand] = LAYOUTS[layout](arranged[operand])
    dy = arranged.pop("grad_output")
    for activation in ("relu", "identity"):
        assert_matches_native(arranged, activation, dy)


@pytest.mark.slow
@pytest.mark.parametrize("operand", ["input", "weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_special_values_match_native(operand: str, value: float) -> None:
    arranged = operands(FLAT, BFLOAT16)
    arranged[operand].flatten()[-3] = value
    for activation in EACH_KIND:
        assert_matches_native(arranged, activation, grad_output(FLAT, BFLOAT16))


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
def test_each_gradient_is_the_same_alone(activation: str) -> None:
    x, w, b = operands(FLAT, BFLOAT16).values()
    dy, y = grad_output(FLAT, BFLOAT16), mlp_ext.linear_act(x, w, b, activation)
    backward = torch.ops.mlp_ext._linear_act_backward
    whole = backward(dy, y, x, w, activation, [], [True] * 3)
    for mask in SUBSETS:
        part = backward(dy, y, x, w, activation, [], mask)
        for wanted, one, all_ in zip(mask, part, whole, strict=True):
            assert torch.equal(one, all_) if wanted else one is None


def test_results_are_the_same_from_several_python_threads_and_in_inference_mode() -> None:
    batches = [operands(FLAT, BFLOAT16) for _ in range(4)]
    expected = [mlp_ext.linear_act(**batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda batch: mlp_ext.linear_act(**batch), batches)
            assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    with torch.inference_mode():
        assert torch.equal(mlp_ext.linear_act(**batches[0]), expected[0])


def test_autocast_to_another_dtype_around_backward_changes_nothing() -> None:
    gradients = []
    for enabled in (False, True):
        x, w, b = (t.requires_grad_() for t in operands(FLAT, BFLOAT16).values())
        y = mlp_ext.linear_relu(x, w, b)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            y.backward(torch.ones_like(y))
        gradients.append((x.grad, w.grad, b.grad))
        torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bf16_dot", "amx"])
@pytest.mark.parametrize("options", ["plain", "nesterov"])
@pytest.mark.parametrize("loss", ["mse", "classes"])
def test_training_steps_match_eager(
    monkeypatch: pytest.MonkeyPatch, loss: str, options: str, mode: str, threads: int
) -> None:
    """In pairs W is updated where dW is written, in tiles after it."""
    _C.force_dot_mode(mode)
    monkeypatch.setitem(NETS, "wide", ([300, 260, 230, 7], 300))
    assert_steps_match_eager(training("wide", loss, options, BFLOAT16), 3)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("enabled", [True, False])
def test_where_onednn_is_off_nothing_is_left_to_torch(enabled: bool) -> None:
    """Its other products of bfloat16 are slow."""
    x, w, b = (t.requires_grad_() for t in operands(FLAT, BFLOAT16).values())
    dy = grad_output(FLAT, BFLOAT16)
    with torch.backends.mkldnn.flags(enabled=enabled), torch.profiler.profile() as profile:
        mlp_ext.linear_relu(x, w, b).backward(dy)
    products = {"aten::addmm", "aten::mm"}
    assert products & {event.name for event in profile.events()} == (products if enabled else set())
