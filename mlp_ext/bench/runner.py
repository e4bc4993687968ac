"""The runner: times providers in turn in each round, so that drift affects all of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from mlp_ext.bench.cases import Case, Setting
from mlp_ext.bench.machine import Peak, commit, device_name, now, torch_set
from mlp_ext.bench.providers import PROVIDERS
from mlp_ext.bench.rows import Row
from mlp_ext.bench.work import Call, Work, set_up
from mlp_ext.ops import build_info

Clock = Callable[[], float]  # seconds
SAMPLE_SECONDS = 0.02  # shorter calls are repeated for this long
# Largest |difference| / |native's result|. Loose, since relu's mask may differ where z is about 0,
# and gradients underflow in float16. Errors of broken kernels are far larger.
TOLERANCE = {"float64": 1e-6, "float32": 5e-3, "tf32": 2e-2, "bfloat16": 0.1, "float16": 0.1}


class WrongResult(Exception):
    """A provider's result differs from native's, or it fails."""


def measure(
    case: Case,
    setting: Setting,
    providers: Sequence[str],
    rounds: int,
    peak: Peak | None = None,
    after_round: Callable[[], object] = lambda: None,
) -> list[Row]:
    """A row for each of `providers` that supports the case; the first must be native.

    Raises WrongResult before anything is timed, RuntimeError if out of memory.
    """
    known = PROVIDERS[setting.suite]
    providers = [name for name in providers if known[name].takes(case, setting)]
    try:
        seconds = _seconds(case, setting, providers, rounds, after_round)
    finally:
        _forget()
    return _rows(case, setting, seconds, peak)


def _seconds(
    case: Case,
    setting: Setting,
    providers: Sequence[str],
    rounds: int,
    after_round: Callable[[], object],
) -> dict[str, list[float]]:
    with torch_set(setting):
        start = set_up(case, setting)
        works = {name: start(PROVIDERS[setting.suite][name]) for name in providers}
        check(works, case, setting)
        return in_turn(works, rounds, partial(now, setting), after_round)


def check(works: Mapping[str, Work], case: Case, setting: Setting) -> None:
    """Compares the results of each provider with those of the first, native; raises WrongResult."""
    place = f"in {setting.name} {case}"
    expected: dict[str, Tensor] = {}
    for name, work in works.items():
        try:
            found = work.results()
        except Exception as error:
            message = str(error).strip().splitlines() or [type(error).__name__]
            raise WrongResult(f"{name} fails {place}: {message[0]}") from error
        expected = expected or found
        for what in expected:
            distance = _distance(found[what], expected[what])
            if not distance <= TOLERANCE[setting.dtype]:  # also NaN
                raise WrongResult(
                    f"{name} is wrong {place}: "
                    f"its {what} differs from native's by {distance:.2g} of the norm"
                )


def _distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; 0 if they are equal, NaN if the shapes differ."""
    if found.shape != expected.shape:
        return float("nan")
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    difference = norm(found.detach() - expected.detach())
    return (difference / norm(expected.detach())).item() if difference != 0 else 0.0


def in_turn(
    works: Mapping[str, Work],
    rounds: int,
    clock: Clock,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per step of each, one number per round; rounds rotate the order."""
    loops = {name: _loops(work.prepare(0), clock) for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                call = works[name].prepare(turn)
                steps = loops[name] * works[name].steps
                seconds[name].append(_elapsed(call, loops[name], clock) / steps)
            after_round()
    finally:
        gc.enable()
    return seconds


def _loops(call: Call, clock: Clock) -> int:
    """Number of calls per sample; warms up."""
    loops = 1
    while _elapsed(call, loops, clock) < SAMPLE_SECONDS:
        loops *= 2
    return loops


def _elapsed(call: Call, loops: int, clock: Clock) -> float:
    started = clock()
    for _ in range(loops):
        call()
    return clock() - started


class Summary(NamedTuple):
    """Seconds per step over the rounds; columns of Row."""

    median_s: float
    q20_s: float
    q80_s: float
    ratio_to_native: float  # native's time / this one's, the median over the rounds


def summarize(seconds: Mapping[str, list[float]]) -> dict[str, Summary]:
    """Of what in_turn returns, with native among it."""
    found = {}
    for name, samples in seconds.items():
        quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        q20, middle, q80 = torch.tensor(samples, dtype=torch.float64).quantile(quantiles).tolist()
        ratios = [n / s for n, s in zip(seconds["native"], samples, strict=True)]
        found[name] = Summary(middle, q20, q80, median(ratios))
    return found


def _rows(
    case: Case, setting: Setting, seconds: Mapping[str, list[float]], peak: Peak | None
) -> list[Row]:
    def short(value: float) -> float:
        return float(f"{value:.6g}")

    rows = []
    for name, summary in summarize(seconds).items():
        seconds_per_call = summary.median_s
        share = _share_of_peak(case, setting, seconds_per_call, peak)
        rows.append(
            Row(
                **asdict(setting),
                case=str(case),
                device_name=device_name(setting.device),
                provider=name,
                median_s=short(summary.median_s),
                q20_s=short(summary.q20_s),
                q80_s=short(summary.q80_s),
                ratio_to_native=short(summary.ratio_to_native),
                torch=torch.__version__,
                mlp_ext=build_info()["mlp_ext"],
                commit=commit(),
                timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                gflops=short(case.operations(setting.mode) / seconds_per_call / 1e9),
                share_of_peak=None if share is None else short(share),
            )
        )
    return rows


def _share_of_peak(case: Case, setting: Setting, seconds: float, peak: Peak | None) -> float | None:
    """The shortest time possible at peak performance, as a share of `seconds`."""
    if peak is None or (setting.device == "cpu" and setting.dtype != "float32"):
        return None
    least = case.operations(setting.mode) / peak.flops
    if setting.device == "cuda":  # on the CPU only FLOPs count
        moved = case.elements(setting.mode) * setting.torch_dtype.itemsize
        least = max(least, moved / peak.bandwidth)
    return least / seconds


def _forget() -> None:
    """Frees the memory and compiled code of a case, so that the next shapes are static, too."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
