"""bfloat16 on the tile unit of AMX. On other processors its instructions run in plain C++."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from references import EACH_KIND, assert_matches_native
from shapes import LAYOUTS, Shape, grad_output, operands
from steps import NETS, assert_steps_match_eager, training
from torch import Tensor
from torch.nn import functional as F

import mlp_ext
from mlp_ext import _C

pytestmark = pytest.mark.usefixtures("tiles", "poisoned_memory")

BFLOAT16 = torch.bfloat16
AMX = _C.dot_mode("bfloat16") == "amx"  # has it
ODD = Shape((67,), 65, 130)
SHAPES = [  # tails of tiles and of panels, and more than a block in each dimension
    *(Shape((M,), K, N) for M, K, N in [(1, 15, 16), (16, 17, 31), (17, 1, 33), (31, 32, 1)]),
    *(Shape((M,), K, N) for M, K, N in [(32, 33, 63), (33, 65, 15), (63, 31, 65), (64, 64, 64)]),
    *(Shape((M,), K, N) for M, K, N in [(1030, 33, 17), (65, 1030, 16), (15, 63, 1030)]),
    Shape((2, 3, 45), 40, 97),
    Shape((300,), 1025, 70),
    Shape((12_000,), 40, 33),  # the samples of dW are packed in parts
]
SUBSETS = [mask for mask in product([True, False], repeat=3) if any(mask)]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def tiles() -> Iterator[None]:
    _C.force_dot_mode("amx")
    _C.force_paths("amx", "amx")
    yield
    _C.force_paths(None, None)
    _C.force_dot_mode(None)


def test_the_plan_takes_it_for_what_it_supports() -> None:
    for shape in SHAPES:
        M = torch.Size(shape.leading).numel()
        kind = {"item_size": 2, "threads": 2, "forward": "amx", "backward": "amx"}
        plan = _C.plan(M, shape.K, shape.N, mode="amx", **kind)
        assert (plan["forward_path"], plan["backward_path"]) == ("amx", "amx")
        others = [_C.plan(M, shape.K, shape.N, mode=mode, **kind) for mode in ("fma", "bf16_dot")]
        assert all("amx" not in other.values() for other in others)


@pytest.mark.isa
@pytest.mark.parametrize("activation", EACH_KIND)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_match_native(shape: Shape, activation: str, threads: int) -> None:
    bias = (threads == 1) == (activation in ("relu", "tanh"))
    assert_matches_native(operands(shape, BFLOAT16, bias), activation, grad_output(shape, BFLOAT16))


@pytest.mark.parametrize("activation", mlp_ext.ACTIVATIONS)
def test_each_activation_matches_native(activation: str) -> None:
    dy = grad_output(ODD, BFLOAT16)
    assert_matches_native(operands(ODD, BFLOAT16), activation, dy)


@pytest.mark.slow
@pytest.mark.parametrize("N", [64, 66])
def test_results_beyond_the_caches_match_native(N: int, threads: int) -> None:
    """Rows of the output that begin at cache lines, and others."""
    shape = Shape((66_001,), 64, N)
    assert_matches_native(operands(shape, BFLOAT16), "relu", grad_output(shape, BFLOAT16))


@pytest.mark.parametrize("operand", ["input", "weight", "bias", "grad_output"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_layout(layout: str, operand: str) -> None:
    arranged = operands(ODD, BFLOAT16) | {"grad_output": grad_output(ODD, BFLOAT16)}
    arranged[operand] = LAYOUTS[layout](arranged[operand])
    dy = arranged.pop("grad_output")
    for activation in ("relu", "silu"):
        assert_matches_native(arranged, activation, dy)


@pytest.mark.parametrize("operand", ["input", "weight", "bias", "grad_output"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_special_values_match_native(operand: str, value: float) -> None:
    """Padding is not multiplied by them."""
    arranged = operands(ODD, BFLOAT16) | {"grad_output": grad_output(ODD, BFLOAT16)}
    arranged[operand].flatten()[-3] = value
    dy = arranged.pop("grad_output")
    for activation in EACH_KIND:
        assert_matches_native(arranged, activation, dy)


def all_of(shape: Shape, activation: str) -> Gradients:
    """The output and all gradients, of random operands."""
    torch.manual_seed(0)
    sizes = ((*shape.leading, shape.K), (shape.N, shape.K), (shape.N,))
    leaves = [torch.randn(size, dtype=BFLOAT16, requires_grad=True) for size in sizes]
    y = mlp_ext.linear_act(*leaves, activation)
    dx, dw, db = torch.autograd.grad(y, leaves, torch.randn_like(y))
    return y.detach(), dx, dw, db


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "silu"])
def test_each_gradient_is_the_same_alone(activation: str) -> None:
    x, w, b = operands(ODD, BFLOAT16).values()
    dy = grad_output(ODD, BFLOAT16)
    z = F.linear(x, w, b)
    saved = z if activation == "silu" else mlp_ext.linear_act(x, w, b, activation)
    backward = torch.ops.mlp_ext._linear_act_backward
    whole = backward(dy, saved, x, w, activation, [], [True] * 3)
    for mask in SUBSETS:
        part = backward(dy, saved, x, w, activation, [], mask)
        for wanted, one, all_ in zip(mask, part, whole, strict=True):
            assert torch.equal(one, all_) if wanted else one is None


@pytest.mark.parametrize("shape", [ODD, Shape((300,), 260, 515), SHAPES[-1]], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bits_do_not_depend_on_the_number_of_threads(shape: Shape, activation: str) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(all_of(shape, activation))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("options", ["plain", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("loss", ["mse", "classes"])
def test_training_steps_match_eager(
    monkeypatch: pytest.MonkeyPatch, loss: str, options: str, threads: int
) -> None:
    monkeypatch.setitem(NETS, "wide", ([65, 260, 131, 33], 150))
    assert_steps_match_eager(training("wide", loss, options, BFLOAT16), 3)


def test_a_step_of_rows_in_parts_matches_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """W is updated after the last part."""
    monkeypatch.setitem(NETS, "tall", ([64, 96, 33], 7_000))
    assert_steps_match_eager(training("tall", "mse", "momentum", BFLOAT16), 2)


def test_results_are_the_same_from_several_python_threads() -> None:
    _C.force_paths(None, None)  # which a thread has for itself
    shape = Shape((130,), 300, 97)
    expected = all_of(shape, "relu")
    batch = operands(shape, BFLOAT16)
    y = mlp_ext.linear_act(**batch)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: mlp_ext.linear_act(**batch), range(20)):
            assert torch.equal(found, y)
        again = pool.submit(all_of, shape, "relu").result()
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


needs_amx = pytest.mark.skipif(not AMX, reason="needs a processor with AMX")


@needs_amx
def test_torch_and_we_leave_the_tile_unit_to_each_other() -> None:
    """oneDNN configures the tiles, too, of other sizes for each shape."""
    natives = [operands(Shape((M,), 64, N), BFLOAT16) for M, N in ((5, 7), (64, 64), (100, 33))]
    shapes = [ODD, Shape((33,), 31, 17)]

    def native(batch: dict[str, Tensor]) -> Tensor:
        return F.linear(**batch)

    alone = [native(batch) for batch in natives]
    ours = [all_of(shape, "relu") for shape in shapes]

    def in_turn(_: int) -> bool:
        equal = True
        for batch, expected in zip(natives, alone, strict=True):
            for shape, found in zip(shapes, ours, strict=True):
                x = all_of(shape, "relu")
                equal &= all(torch.equal(a, b) for a, b in zip(x, found, strict=True))
                equal &= torch.equal(native(batch), expected)
        return equal

    assert all(map(in_turn, range(3)))


CHILD = """
import os, torch, mlp_ext
from torch.nn import functional as F
torch.set_num_threads(1)
x, w = torch.randn(64, 96).bfloat16(), torch.randn(80, 96).bfloat16()
def both():
    return mlp_ext.linear_act(x, w, None, "identity"), F.linear(x, w)
expected = both()
if os.fork() == 0:
    os._exit(not all(torch.equal(a, b) for a, b in zip(both(), expected)))
_, status = os.wait()
assert all(torch.equal(a, b) for a, b in zip(both(), expected))
print(mlp_ext._C.plan(64, 96, 80, 2, 1, mode="amx")["forward_path"], status)
"""


@needs_amx
def test_a_forked_child_has_the_tile_unit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.stdout, done.returncode) == ("amx 0\n", 0), done.stderr


def test_its_peak_is_measured() -> None:
    _C.force_dot_mode(None)
    assert all(_C.peak_flops(1e-3, 1, dtype) > 0 for dtype in ("float32", "bfloat16"))
    with pytest.raises(ValueError, match="dtype must be float32, float64"):
        _C.peak_flops(1e-3, 1, "int8")
