"""The CUDA kernels' own source, run on the CPU by tests/cuda_on_cpu/model.h, equals native torch.

Every run is repeated with the threads in other orders: results must be the same to the bit, no
access out of bounds or misaligned, no race for memory, no barrier missed.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_kernels import FAMILIES, Runner, compile_all, linear_act, load_once
from once import Once
from processors import SANITIZERS
from references import EACH_KIND, assert_matches_native
from shapes import DTYPES, Shape, grad_output, operands
from test_activations import CASES as ACTIVATION_CASES
from test_activations import Case
from torch import Tensor
from torch.nn import functional as F

import mlp_ext
from mlp_ext import _C

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def kernels(once: Once) -> ctypes.CDLL:
    return load_once(once, "small", "tall", "pointwise")


def sizes(text: str) -> list[Shape]:
    numbers = [[int(n) for n in size.split("x")] for size in text.split()]
    return [Shape((M,), K, N) for M, K, N in numbers]


SHAPES = {
    "small": sizes("0x4x3 4x0x3 1x1x1 3x5x2 16x16x16 17x15x33 5x130x18 33x65x17 2x129x1 70x20x3"),
    "tall": sizes(
        "0x4x3 1x1x1 64x64x64 65x63x61 61x31x64 200x32x16 131x128x20 33x128x16 67x17x128 "
        "21x13x128 300x4x4 129x3x5 90x12x8"
    ),
    "passes": sizes("0x2x3 1x2x1 7x2x3 64x2x32 33x2x257 300x2x40 5x2x1000 1000x2x8"),
}


def takes(family: str, shape: Shape, dtype: torch.dtype) -> bool:
    """The kernels of narrow layers hold so many weights alone."""
    name = str(dtype).removeprefix("torch.")
    plan = _C.cuda_plan(shape.leading[0], shape.K, shape.N, name, "relu", 90, path="tall")
    return family != "tall" or plan["forward"] == "tall"


def case(family: str, shape: Shape, dtype: torch.dtype) -> Any:
    """The quick tests take small shapes, in float32 and bfloat16."""
    most = {torch.float32: 2**15, torch.bfloat16: 2**13}
    is_quick = shape.leading[0] * shape.K * shape.N <= most.get(dtype, -1)
    return pytest.param(family, shape, dtype, marks=[] if is_quick else [pytest.mark.slow])


CASES = [
    case(family, shape, dtype)
    for family, shapes in SHAPES.items()
    for shape in shapes
    for dtype in DTYPES
    if takes(family, shape, dtype)
]


@pytest.mark.parametrize(("family", "shape", "dtype"), CASES, ids=str)
def test_kernels_match_native(
    family: str,
    shape: Shape,
    dtype: torch.dtype,
    kernels: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlp_ext, "linear_act", linear_act(family, Runner(kernels)))
    for activation in EACH_KIND:
        bias = activation != "tanh"  # without one once
        assert_matches_native(operands(shape, dtype, bias), activation, grad_output(shape, dtype))


@pytest.mark.parametrize("case", ACTIVATION_CASES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_activation_matches_native(
    family: str, case: Case, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp_ext, "linear_act", linear_act(family, Runner(kernels)))
    name, parameters = case.activation
    for dtype, shape in ((torch.float32, Shape((21,), 16, 8)), (torch.bfloat16, Shape((9,), 5, 7))):
        dy = grad_output(shape, dtype)
        assert_matches_native(operands(shape, dtype), name, dy, parameters=parameters)


# Of each loss of elements its name, torch's function, parameters, and whether it has pos_weight.
LOSSES: list[tuple[str, Callable[..., Tensor], dict[str, float], bool]] = [
    ("mse", F.mse_loss, {}, False),
    ("bce", F.binary_cross_entropy, {}, False),
    ("bce_with_logits", F.binary_cross_entropy_with_logits, {}, False),
    ("bce_with_logits", F.binary_cross_entropy_with_logits, {}, True),
    ("l1", F.l1_loss, {}, False),
    ("smooth_l1", F.smooth_l1_loss, {"beta": 0.3}, False),
    ("huber", F.huber_loss, {"delta": 0.2}, False),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "function", "parameters", "weighted"), LOSSES)
def test_losses_match_native(
    name: str,
    function: Callable[..., Tensor],
    parameters: dict[str, float],
    weighted: bool,
    dtype: torch.dtype,
    kernels: ctypes.CDLL,
) -> None:
    index = [*_C.losses()].index(name)
    for M, N in ((1, 1), (64, 32), (33, 257), (300, 40), (1000, 8)):
        y, target = ((torch.rand(M, N) * 0.8 + 0.1).to(dtype) for _ in range(2))
        weight = (torch.rand(N) + 0.5).to(dtype) if weighted else None
        found = {"dy": torch.full_like(y, torch.nan), "db": torch.full_like(y[0, :1], torch.nan)}
        run = Runner(kernels, processors=4)
        given = {"y": y, "x": target, "w": weight}
        run("element_loss", (M, index, N), "relu", given, found, (*parameters.values(),))
        exact = y.double().requires_grad_()
        options = parameters if weight is None else {"pos_weight": weight.double()}
        loss = function(exact, target.double(), **options)
        loss.backward()
        rtol = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 2**-7)
        torch.testing.assert_close(found["db"][0].double(), loss.detach(), rtol=rtol, atol=0)
        torch.testing.assert_close(found["dy"].double(), exact.grad, rtol=rtol, atol=rtol / M / N)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_take_strides_offsets_and_repeated_rows(
    family: str, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows apart with NaN between them, from an odd element on, and rows of stride 0."""
    monkeypatch.setattr(mlp_ext, "linear_act", linear_act(family, Runner(kernels)))
    shape = Shape((35,), 24, 16)
    for dtype, apart in product(DTYPES, (1, 8)):  # misaligned, aligned

        def rows_apart(t: Tensor, apart: int = apart) -> Tensor:
            big = t.new_full((t.shape[0], t.shape[1] + apart), torch.nan)
            return big[:, apart:].copy_(t)

        arranged = operands(shape, dtype)
        arranged |= {name: rows_apart(arranged[name]) for name in ("input", "weight")}
        for dy in (rows_apart(grad_output(shape, dtype)), grad_output(shape, dtype)[:1]):
            assert_matches_native(arranged, "sigmoid", dy.expand(*shape.leading, shape.N))


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_make_only_the_wanted_gradients(family: str, kernels: ctypes.CDLL) -> None:
    run = linear_act(family, Runner(kernels))
    shape = Shape((37,), 20, 12)
    dy = grad_output(shape)
    whole = {k: t.clone().requires_grad_() for k, t in operands(shape).items()}
    run(**whole, activation="relu").backward(dy)
    for live in product([True, False], repeat=3):
        if not any(live):
            continue
        leaves = {
            k: t.detach().requires_grad_(on) for (k, t), on in zip(whole.items(), live, strict=True)
        }
        run(**leaves, activation="relu").backward(dy)
        for name, leaf in leaves.items():
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, whole[name].grad, rtol=1e-6, atol=1e-6)
            else:
                assert leaf.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_follow_special_values(
    family: str, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp_ext, "linear_act", linear_act(family, Runner(kernels)))
    shape = Shape((18,), 6, 5)
    for value in (torch.nan, torch.inf, -torch.inf, -0.0, 1e30, -1e30):
        arranged = operands(shape)
        arranged["input"][7, 3] = value
        for activation in EACH_KIND:
            assert_matches_native(arranged, activation, grad_output(shape))


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_fit_any_number_of_processors(
    family: str, processors: int, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp_ext, "linear_act", linear_act(family, Runner(kernels, processors)))
    shape = Shape((520,), 9, 12)
    assert_matches_native(operands(shape), "relu", grad_output(shape))


@pytest.mark.slow
def test_kernels_pass_the_sanitizers(tmp_path: Path) -> None:
    files = ["small", "tall", "pointwise", "step", "main"]
    program = compile_all(tmp_path / "kernels", files, *SANITIZERS, "-O0")
    # Fibers have stacks of their own, and a kernel's run is not to be followed to its end.
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    done = subprocess.run(
        [program],
        env=os.environ | options,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout == f"{7 * 3 * 4 * 2} runs\n"
