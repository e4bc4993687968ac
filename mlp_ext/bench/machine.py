"""What a result must say about where it was measured, and the limits of the processor there."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from mlp_ext import _C

INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2"}
PEAK_SECONDS = 0.2  # of one measurement; the best of several counts
COPIED_BYTES = 2**28  # by one copy, read and written: more than any cache holds


class Peak(NamedTuple):
    """The processor's limits with a number of threads, in float32."""

    flops: float  # multiply-adds in registers alone, per second, each counted as two
    bandwidth: float  # bytes read and bytes written per second by a copy


def measure_peak(threads: int) -> Peak:
    """Measures the limits of this processor; takes about two seconds."""
    source = torch.ones(COPIED_BYTES // 8)
    target = torch.zeros_like(source)

    def copy_seconds() -> float:
        started = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - started

    with torch_threads(threads):
        flops = max(_C.peak_flops(PEAK_SECONDS, threads) for _ in range(5))
        return Peak(flops, COPIED_BYTES / min(copy_seconds() for _ in range(10)))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch uses this number of threads in the body, and then what it used before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def device_name(device: str) -> str:
    """As "AMD EPYC (AVX-512)", with the instruction set in use here; a GPU's own name."""
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
    """The git commit that `package` lies in, short; a + after it where a source has changed since.

    "unknown" for a package that is not under git itself, though it may lie in a repository.
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
