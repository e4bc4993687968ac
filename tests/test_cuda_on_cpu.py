"""The CUDA kernels' own source, run on the CPU by tests/cuda_on_cpu/model.h, equals native torch.

Every run is repeated with the threads in other orders: results must be the same to the bit, no
access out of bounds or misaligned, no race for memory, no barrier missed.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from references import assert_matches_native
from shapes import DTYPES, Shape, grad_output, operands
from torch import Tensor
from torch.nn import functional as F

import mlp_ext

SOURCES = Path(__file__).parent / "cuda_on_cpu"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
INCLUDES = [f"-I{SOURCES}", f"-I{SOURCES.parents[1] / 'csrc'}"]
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
SHARED = 228 * 1024  # bytes of an H100's multiprocessor
TENSORS = ("x", "w", "bias", "y", "dy", "dx", "dw", "db", "dz")


class Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "activation")),
        *((name, ctypes.c_int64) for name in ("M", "K", "N")),
        *((name, Buffer) for name in TENSORS),
        *((name, ctypes.c_int64) for name in ("processors", "shared")),
        *((name, ctypes.c_int32) for name in ("order", "seed")),
    ]


def buffer(t: Tensor | None) -> Buffer:
    if t is None:
        return Buffer(None, 0, 0)
    last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return Buffer(t.data_ptr(), last + 1 if t.numel() else 0, t.stride(0) if t.dim() == 2 else 0)


def compile_all(folder: Path, names: list[str], flags: list[str], output: str) -> Path:
    def run(*arguments: str | Path) -> None:
        done = subprocess.run(["g++", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    objects = [folder / f"{name}.o" for name in names]
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda name, to: run(*FLAGS, *flags, *INCLUDES, "-c", SOURCES / name, "-o", to),
                [f"{name}.cpp" for name in names],
                objects,
            )
        )
    run(*flags, *(["-shared"] if output.endswith(".so") else []), *objects, "-o", folder / output)
    return folder / output


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    names = ["small", "tall", "pointwise", "faulty"]
    library = ctypes.CDLL(
        str(compile_all(tmp_path_factory.mktemp("cuda_on_cpu"), names, [], "kernels.so"))
    )
    for name in KERNELS:
        getattr(library, f"{name}_on_cpu").restype = ctypes.c_char_p
    yield library


KERNELS = (
    *("small_forward", "small_backward", "tall_forward", "tall_backward"),
    *("bias_act", "grad_z", "faulty"),
)


class Runner(NamedTuple):
    """Runs kernels of one family on a device of so many processors."""

    library: ctypes.CDLL
    processors: int = 3

    def __call__(
        self,
        kernel: str,
        sizes: tuple[int, int, int],
        activation: str,
        inputs: dict[str, Tensor | None],
        outputs: dict[str, Tensor],
    ) -> None:
        """Fills the outputs, in each order of the threads with the same bits."""
        found = []
        for order in ORDERS.values():
            fresh = {name: t.clone() for name, t in outputs.items()}
            tensors = inputs | fresh
            dtype = next(t for t in tensors.values() if t is not None).dtype
            problem = Problem(
                DTYPES.index(dtype),
                mlp_ext.ACTIVATIONS.index(activation),
                *sizes,
                *(buffer(tensors.get(name)) for name in TENSORS),
                self.processors,
                SHARED,
                order,
                order,
            )
            fault = getattr(self.library, f"{kernel}_on_cpu")(ctypes.byref(problem))
            assert fault is None, f"{kernel} {sizes} {dtype} {activation}: {fault.decode()}"
            found.append(fresh)
        for name, t in outputs.items():
            bits = [results[name].view(torch.uint8) for results in found]
            assert all(torch.equal(bits[0], other) for other in bits[1:]), (
                f"{kernel}: {name} varies"
            )
            t.copy_(found[0][name])


def poisoned(like: Tensor, *sizes: int) -> Tensor:
    return like.new_full(sizes, torch.nan)


Forward = Callable[[Runner, Tensor, Tensor, Tensor | None, str], Tensor]
Backward = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


def own_forward(family: str) -> Forward:
    def forward(run: Runner, x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        y = poisoned(x, x.shape[0], w.shape[0])
        inputs = {"x": x, "w": w, "bias": bias}
        run(f"{family}_forward", (*x.shape, w.shape[0]), activation, inputs, {"y": y})
        return y

    return forward


def own_backward(family: str) -> Backward:
    def backward(
        run: Runner,
        dy: Tensor,
        y: Tensor,
        x: Tensor,
        w: Tensor,
        activation: str,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        outputs = {"dx": poisoned(x, *x.shape), "dw": poisoned(w, *w.shape)}
        outputs["db"] = poisoned(w, w.shape[0])
        wanted = {name: t for (name, t), on in zip(outputs.items(), needs, strict=True) if on}
        inputs = {"dy": dy, "y": y, "x": x, "w": w}
        run(f"{family}_backward", (*x.shape, w.shape[0]), activation, inputs, wanted)
        return wanted.get("dx"), wanted.get("dw"), wanted.get("db")

    return backward


def passes_forward(
    run: Runner, x: Tensor, w: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """The pass after a product, in place; the bias is added in it, or was by the product."""
    y = F.linear(x, w)
    run("bias_act", (*x.shape, w.shape[0]), activation, {"bias": bias}, {"y": y})
    return y


def passes_backward(
    run: Runner,
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    w: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    outputs = {"dz": poisoned(dy, *dy.shape)} if needs[0] or needs[1] else {}
    if needs[2]:
        outputs["db"] = poisoned(w, w.shape[0])
    run("grad_z", (*x.shape, w.shape[0]), activation, {"dy": dy, "y": y}, outputs)
    dz = outputs.get("dz")
    dx = dz @ w if needs[0] and dz is not None else None
    return dx, dz.t() @ x if needs[1] and dz is not None else None, outputs.get("db")


FAMILIES: dict[str, tuple[Forward, Backward]] = {
    "small": (own_forward("small"), own_backward("small")),
    "tall": (own_forward("tall"), own_backward("tall")),
    "passes": (passes_forward, passes_backward),
}


def linear_act(family: str, run: Runner) -> Callable[..., Tensor]:
    """As mlp_ext.linear_act, by the kernels of the family."""
    forward_kernels, backward_kernels = FAMILIES[family]

    class LinearAct(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str
        ) -> Tensor:
            y = forward_kernels(run, input, weight, bias, activation)
            ctx.save_for_backward(y, input, weight)
            ctx.activation = activation
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            needs = ctx.needs_input_grad[:3]
            grads = backward_kernels(run, dy, *ctx.saved_tensors, ctx.activation, needs)
            return *grads, None

    def function(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "relu"
    ) -> Tensor:
        return LinearAct.apply(input, weight, bias, activation)  # type: ignore[no-any-return]

    return function


def sizes(text: str) -> list[Shape]:
    numbers = [[int(n) for n in size.split("x")] for size in text.split()]
    return [Shape((M,), K, N) for M, K, N in numbers]


SHAPES = {
    "small": sizes("0x4x3 4x0x3 1x1x1 3x5x2 16x16x16 17x15x33 5x130x18 33x65x17 2x129x1 70x20x3"),
    "tall": sizes(
        "0x4x3 1x1x1 64x64x64 65x63x61 200x32x16 131x128x20 67x17x128 300x4x4 129x3x5 90x12x8"
    ),
    "passes": sizes("0x2x3 1x2x1 7x2x3 64x2x32 33x2x257 300x2x40 5x2x1000 1000x2x8"),
}
CASES = [(family, shape) for family, shapes in SHAPES.items() for shape in shapes]
each_case = pytest.mark.parametrize(
    ("family", "shape"), CASES, ids=[f"{family}-{shape}" for family, shape in CASES]
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_kernels_match_native(
    family: str,
    shape: Shape,
    dtype: torch.dtype,
    kernels: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlp_ext, "linear_act", linear_act(family, Runner(kernels)))
    for activation in mlp_ext.ACTIVATIONS:
        bias = activation != "tanh"  # without one once
        assert_matches_native(operands(shape, dtype, bias), activation, grad_output(shape, dtype))


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


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_follow_special_values(
    family: str, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp_ext, "linear_act", linear_act(family, Runner(kernels)))
    shape = Shape((18,), 6, 5)
    for value in (torch.nan, torch.inf, -torch.inf, -0.0, 1e30, -1e30):
        arranged = operands(shape)
        arranged["input"][7, 3] = value
        for activation in mlp_ext.ACTIVATIONS:
            assert_matches_native(arranged, activation, grad_output(shape))


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_fit_any_number_of_processors(
    family: str, processors: int, kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp_ext, "linear_act", linear_act(family, Runner(kernels, processors)))
    shape = Shape((520,), 9, 12)
    assert_matches_native(operands(shape), "relu", grad_output(shape))


@pytest.mark.parametrize(
    ("which", "fault"),
    [
        (0, None),
        (1, "a read of shared memory that nobody wrote"),  # a removed barrier
        (2, "element 100 of 100 in global memory"),  # a tail that is one too long
        (3, "a barrier that some threads never reach"),
        (4, "a misaligned access to global memory"),
        (5, "more shared memory than the launch gives"),
        (6, "two barriers waited at at once"),
        (7, None),  # the last block finishes
        (8, "a race for global memory"),  # without its barrier
        (9, "a race for global memory"),  # without the fence before the atomic
        (10, "a race for global memory"),  # without that after it
        (11, "a race for shared memory"),  # two threads write one element
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_model_sees_faults(order: str, which: int, fault: str | None, kernels: ctypes.CDLL) -> None:
    x, y = torch.arange(100.0), torch.full((100,), torch.nan)
    buffers = {"x": buffer(x), "y": buffer(y)}
    problem = Problem(dtype=which, M=100, processors=1, order=ORDERS[order], seed=1, **buffers)
    found = kernels.faulty_on_cpu(ctypes.byref(problem))
    if fault is None:
        assert found is None
        pieces = x.split(64) if which == 0 else [x]
        assert torch.equal(y, torch.cat([piece.flip(0) for piece in pieces]))
    else:
        assert found is not None
        assert fault in found.decode()


def test_kernels_pass_the_sanitizers(tmp_path: Path) -> None:
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = compile_all(tmp_path, ["small", "tall", "pointwise", "main"], flags, "kernels")
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
    assert done.stdout == f"{6 * 3 * 4 * 2} runs\n"
