"""Describes the machine of a result, and measures its peak performance."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import isnan, nan
from pathlib import Path
from typing import NamedTuple

import torch

from mlp_ext import _C
from mlp_ext.bench.cases import Case, Setting, networks

INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2"}
PEAK_SECONDS = 0.4  # per measurement, of which the best sample counts
SAMPLE_SECONDS = 0.002  # of FMAs: shorter than a time slice, so that some are not interrupted
# Bytes of a copy: from what two cores' L2 holds to more than any cache does. One size on GPUs,
# where the inputs of a case take turns so that they are not in L2.
COPIED = {"cpu": tuple(2**n for n in range(20, 29, 2)), "cuda": (2**31,)}
GEMM = {"cpu": 2048, "cuda": 8192}  # M, K and N of the GEMM that measures a dtype
CALLS = 1000  # of the smallest operator, per measurement
BOUNDS = ("compute", "memory", "latency")


class Peak(NamedTuple):
    """Peak performance of a CPU with some threads, or of a GPU, in a dtype."""

    flops: float  # multiply-adds per second, each counted as two: in registers, or in torch's GEMM
    bandwidth: dict[int, float]  # bytes copied -> bytes read and bytes written per second
    latency: float  # seconds per call of the smallest operator; on a GPU in a replayed graph

    def bound(self, case: Case, setting: Setting) -> tuple[str, float]:
        """The one of BOUNDS that binds, and the least seconds of a call, per network."""
        moved = case.elements(setting.mode) * setting.torch_dtype.itemsize
        fits = [size for size in self.bandwidth if size <= moved]
        bandwidth = self.bandwidth[max(fits, default=min(self.bandwidth))]
        operations = case.operations(setting.mode)
        times = (operations / self.flops, moved / bandwidth, self.latency)
        seconds = max(times)
        return BOUNDS[times.index(seconds)], seconds / networks(case)


def measure_peak(setting: Setting) -> Peak:
    """Measures the device's peak performance; takes some seconds."""

    def seconds(call: Callable[[], object], calls: int = 1) -> float:
        """Per call, the best of several."""
        found: list[float] = []
        while len(found) < 3 or sum(found) * calls < PEAK_SECONDS:
            started = now(setting)
            for _ in range(calls):
                call()
            found.append((now(setting) - started) / calls)
        return min(found)

    with torch_set(setting):
        bandwidth, fastest = {}, 0.0  # in a smaller cache it is no slower
        for size in sorted(COPIED[setting.device], reverse=True):
            source = torch.ones(size // 8, device=setting.device)
            target = torch.zeros_like(source)
            fastest = max(fastest, size / seconds(partial(target.copy_, source)))
            bandwidth[size] = fastest
        return Peak(_flops(setting, seconds), bandwidth, seconds(_smallest(setting), CALLS))


def _flops(setting: Setting, seconds: Callable[[Callable[[], object]], float]) -> float:
    """On CPUs that of FMAs in registers, of which _C measures float32: half as many are float64;
    in bfloat16 with AMX, that of the tile unit. On GPUs, and in 16 bits, where a processor may have
    faster instructions, that of a GEMM."""
    flops, itemsize = 0.0, setting.torch_dtype.itemsize
    if setting.device == "cpu":
        samples = range(round(PEAK_SECONDS / SAMPLE_SECONDS))
        flops = max(_C.peak_flops(SAMPLE_SECONDS, setting.threads, setting.dtype) for _ in samples)
        if itemsize >= 4:
            return flops * 4 / itemsize
    n = GEMM[setting.device]
    a, b = torch.randn(2, n, n, device=setting.device).to(setting.torch_dtype)
    product = torch.empty_like(a)
    return max(flops, 2 * n**3 / seconds(lambda: torch.mm(a, b.t(), out=product)))


def _smallest(setting: Setting) -> Callable[[], object]:
    x = torch.ones(1, device=setting.device)
    if setting.device == "cpu":
        return x.relu_
    x.relu_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.relu_()
    return graph.replay


def other_cpu_seconds() -> float:
    """CPU seconds that other processes, and other virtual machines of this host, have taken so far
    on the CPUs that this process may use. NaN outside Linux."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return nan
    own, busy = cpus(), 0
    for name, *ticks in map(str.split, lines):
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in own:
            user, nice, system, _, _, irq, softirq, steal = map(int, ticks[:8])
            busy += user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def other_cpus() -> Callable[[], float | None]:
    """A function that tells how many CPUs other processes have kept busy since; None outside
    Linux."""
    others, started = other_cpu_seconds(), time.perf_counter()

    def used() -> float | None:
        found = (other_cpu_seconds() - others) / (time.perf_counter() - started)
        return None if isnan(found) else round(max(0.0, found), 2)

    return used


def cpus() -> set[int]:
    """The CPUs that this process may use."""
    return os.sched_getaffinity(0)


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process that keeps a core busy, as other programs do on a laptop."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def now(setting: Setting) -> float:
    """The time in seconds, after synchronizing the device."""
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
    """As "AMD EPYC (zen4, AVX-512)", with the machine whose limits the plans have and the
    instruction set in use, or the GPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    instruction_set = _C.instruction_set()
    name = INSTRUCTION_SETS.get(instruction_set, instruction_set)
    return f"{_processor()} ({_C.machine()['name']}, {name})"


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
