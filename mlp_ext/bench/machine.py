"""Describes the machine of a result, and measures its peak performance."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from mlp_ext import _C
from mlp_ext.bench.cases import Setting

INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2"}
PEAK_SECONDS = 0.2  # per measurement; the best of several counts
COPIED_BYTES = 2**28  # per copy, more than any cache holds
CUDA_GEMM = 8192  # M, K and N of the GEMM that measures a GPU


class Peak(NamedTuple):
    """Peak performance of a CPU with some threads in float32, or of a GPU in a dtype."""

    flops: float  # multiply-adds per second, each counted as two: in registers, or in torch's GEMM
    bandwidth: float  # bytes read and bytes written per second by a copy


def measure_peak(setting: Setting) -> Peak:
    """Measures the device's peak performance; takes about two seconds."""
    cuda = setting.device == "cuda"
    copied = COPIED_BYTES * (8 if cuda else 1)
    source = torch.ones(copied // 8, device=setting.device)
    target = torch.zeros_like(source)
    a = torch.randn(CUDA_GEMM if cuda else 0, CUDA_GEMM, device=setting.device)
    a = a.to(setting.torch_dtype)
    b, product = a.clone(), torch.empty_like(a)

    def seconds(call: Callable[[], object]) -> float:
        started = now(setting)
        call()
        return now(setting) - started

    with torch_set(setting):
        if cuda:
            fastest = min(seconds(lambda: torch.mm(a, b.t(), out=product)) for _ in range(10))
            flops = 2 * CUDA_GEMM**3 / fastest
        else:
            flops = max(_C.peak_flops(PEAK_SECONDS, setting.threads) for _ in range(5))
        return Peak(flops, copied / min(seconds(lambda: target.copy_(source)) for _ in range(10)))


def now(setting: Setting) -> float:
    """The time in seconds, after synchronising the device."""
    if setting.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def torch_set(setting: Setting) -> Iterator[None]:
    """Sets torch's threads and TF32 as in `setting`, and restores them afterwards."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(setting.threads)
    torch.set_float32_matmul_precision("high" if setting.dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


@cache
def device_name(device: str) -> str:
    """As "AMD EPYC (AVX-512)", with the instruction set in use, or the GPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    instruction_set = _C.instruction_set()
    return f"{_processor()} ({INSTRUCTION_SETS.get(instruction_set, instruction_set)})"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def commit(package: Path = Path(__file__).parents[1]) -> str:
    """The short hash of the package's commit, with a + if sources were modified.

    "unknown" for a package that is not under git itself, even inside a repository.
    """

    def git(*args: str) -> str:
        result = subprocess.run(
            ["git", *args], cwd=package, capture_output=True, text=True, check=True
        )
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        sources = [f":/{name}" for name in ("csrc", package.name, "setup.py")]
        changed = git("status", "--porcelain", "--", *sources)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
