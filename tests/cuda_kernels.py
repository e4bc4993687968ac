"""The CUDA kernels' own source on the CPU: compiled with tests/cuda_on_cpu/model.h, and called."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from once import Once
from references import alone
from shapes import DTYPES, Shape
from torch import Tensor
from torch.nn import functional as F

import mlp_ext
from mlp_ext.nn import Activation
from mlp_ext.ops import PARAMETERS

MODEL = Path(__file__).parent / "cuda_on_cpu"
CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
SHARED = 228 * 1024  # bytes of an H100's multiprocessor
TENSORS = ("x", "w", "bias", "y", "z", "dy", "saved", "dx", "dw", "db", "dz")
NEED_OUTPUT = ("relu", "sigmoid", "tanh")


class Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "activation")),
        ("parameters", 2 * ctypes.c_double),
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


def compiler(*arguments: str | Path) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def compile_all(output: Path, names: list[str], *flags: str | Path) -> Path:
    """A library of those files of MODEL, or a program. A header is looked for in -I first."""
    objects = [output.with_name(f"{name}.o") for name in names]
    includes = [f"-I{MODEL}", f"-I{CSRC}"]

    def compile_one(name: str, to: Path) -> None:
        compiler(*FLAGS, *flags, *includes, "-c", MODEL / f"{name}.cpp", "-o", to)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, names, objects))
    compiler(*flags, *(["-shared"] if output.suffix == ".so" else []), *objects, "-o", output)
    return output


def load_once(once: Once, *names: str) -> ctypes.CDLL:
    """Of those files of MODEL, compiled once in a test session."""
    folder = once("-".join(names), lambda folder: compile_all(folder / "all.so", [*names], "-Og"))
    return ctypes.CDLL(str(folder / "all.so"))


def fault(library: ctypes.CDLL, kernel: str, problem: Problem, *more: bytes) -> str:
    """What the model finds wrong with the kernel; "" if nothing."""
    function = getattr(library, f"{kernel}_on_cpu")
    function.restype = ctypes.c_char_p
    return (function(ctypes.byref(problem), *more) or b"").decode()


class Runner(NamedTuple):
    """Runs kernels on a device of so many processors."""

    library: ctypes.CDLL
    processors: int = 3

    def __call__(
        self,
        kernel: str,
        sizes: tuple[int, int, int],
        activation: str,
        inputs: dict[str, Tensor | None],
        outputs: dict[str, Tensor],
        parameters: Sequence[float] = (),
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
                (*(parameters or PARAMETERS[activation].values()),),
                *sizes,
                *(buffer(tensors.get(name)) for name in TENSORS),
                self.processors,
                SHARED,
                order,
                order,
            )
            wrong = fault(self.library, kernel, problem)
            assert not wrong, f"{kernel} {sizes} {dtype} {activation}: {wrong}"
            found.append(fresh)
        for name, t in outputs.items():
            bits = [results[name].view(torch.uint8) for results in found]
            assert all(torch.equal(bits[0], other) for other in bits[1:]), (
                f"{kernel}: {name} varies"
            )
            t.copy_(found[0][name])


def poisoned(like: Tensor, *sizes: int) -> Tensor:
    return like.new_full(sizes, torch.nan)


def needs_z(activation: Activation) -> bool:
    """Whether backward needs z rather than y."""
    return activation.name not in ("identity", *NEED_OUTPUT)


# y, and z or None
Forward = Callable[
    [Runner, Tensor, Tensor, Tensor | None, Activation], tuple[Tensor, Tensor | None]
]
Backward = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


def own_forward(family: str) -> Forward:
    def forward(
        run: Runner, x: Tensor, w: Tensor, bias: Tensor | None, activation: Activation
    ) -> tuple[Tensor, Tensor | None]:
        name, parameters = activation
        outputs = {"y": poisoned(x, x.shape[0], w.shape[0])}
        if needs_z(activation):
            outputs["z"] = poisoned(x, x.shape[0], w.shape[0])
        inputs = {"x": x, "w": w, "bias": bias}
        run(f"{family}_forward", (*x.shape, w.shape[0]), name, inputs, outputs, parameters)
        return outputs["y"], outputs.get("z")

    return forward


def own_backward(family: str) -> Backward:
    def backward(
        run: Runner,
        dy: Tensor,
        saved: Tensor | None,
        x: Tensor,
        w: Tensor,
        activation: Activation,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        name, parameters = activation
        outputs = {"dx": poisoned(x, *x.shape), "dw": poisoned(w, *w.shape)}
        outputs["db"] = poisoned(w, w.shape[0])
        wanted = {name: t for (name, t), on in zip(outputs.items(), needs, strict=True) if on}
        inputs = {"dy": dy, "saved": saved, "x": x, "w": w}
        run(f"{family}_backward", (*x.shape, w.shape[0]), name, inputs, wanted, parameters)
        return wanted.get("dx"), wanted.get("dw"), wanted.get("db")

    return backward


def passes_forward(
    run: Runner, x: Tensor, w: Tensor, bias: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor | None]:
    """The pass after a GEMM: in place, where it also adds the bias, or from z to y."""
    name, parameters = activation
    sizes = (*x.shape, w.shape[0])
    if needs_z(activation):
        z = F.linear(alone(x), alone(w), bias)
        y = poisoned(z, *z.shape)
        run("bias_act", sizes, name, {"z": z}, {"y": y}, parameters)
        return y, z
    y = F.linear(alone(x), alone(w))
    run("bias_act", sizes, name, {"bias": bias}, {"y": y}, parameters)
    return y, None


def passes_backward(
    run: Runner,
    dy: Tensor,
    saved: Tensor | None,
    x: Tensor,
    w: Tensor,
    activation: Activation,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    name, parameters = activation
    outputs = {"dz": poisoned(dy, *dy.shape)} if needs[0] or needs[1] else {}
    if needs[2]:
        outputs["db"] = poisoned(w, w.shape[0])
    inputs = {"dy": dy, "saved": saved}
    run("grad_z", (*x.shape, w.shape[0]), name, inputs, outputs, parameters)
    dz = outputs.get("dz")
    dx = dz @ alone(w) if needs[0] and dz is not None else None
    return dx, dz.t() @ alone(x) if needs[1] and dz is not None else None, outputs.get("db")


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
            ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation
        ) -> Tensor:
            y, z = forward_kernels(run, input, weight, bias, activation)
            saved = y if z is None else z
            ctx.save_for_backward(None if activation.name == "identity" else saved, input, weight)
            ctx.activation = activation
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            needs = ctx.needs_input_grad[:3]
            grads = backward_kernels(run, dy, *ctx.saved_tensors, ctx.activation, needs)
            return *grads, None

    def function(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str = "relu",
        parameters: Sequence[float] = (),
    ) -> Tensor:
        chosen = Activation(activation, tuple(parameters))
        return LinearAct.apply(input, weight, bias, chosen)  # type: ignore[no-any-return]

    return function


def sizes(text: str) -> list[Shape]:
    numbers = [[int(n) for n in size.split("x")] for size in text.split()]
    return [Shape((M,), K, N) for M, K, N in numbers]
