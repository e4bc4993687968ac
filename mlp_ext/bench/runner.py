"""The runner: times providers in turn in each round, so that drift affects all of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlp_ext.bench.cases import Case, Setting, networks
from mlp_ext.bench.machine import (
    Peak,
    commit,
    device_name,
    now,
    other_cpus,
    torch_set,
)
from mlp_ext.bench.own import first_line
from mlp_ext.bench.providers import Provider, path
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
    providers: Mapping[str, Provider],
    rounds: int,
    peak: Peak | None = None,
    after_round: Callable[[], object] = lambda: None,
    fewer_threads: Sequence[int] = (),
) -> list[Row]:
    """A row for each of `providers` that supports the case; the first must be native. Another, such
    as step@1, for each with fewer CPU threads, in turn with the others.

    Raises WrongResult before anything is timed, RuntimeError if out of memory.
    """
    providers = {name: p for name, p in providers.items() if p.takes(case, setting)}
    try:
        with torch_set(setting):
            start = set_up(case, setting)
            works = _checked(start, providers, case, setting)
            if fewer_threads:
                works = {n: _with_threads(work, setting.threads) for n, work in works.items()}
            works |= {
                f"{name}@{threads}": _with_threads(start(provider), threads)
                for threads in fewer_threads
                for name, provider in providers.items()
            }
            others = other_cpus()
            seconds = in_turn(works, rounds, partial(now, setting), after_round)
            used = others()
    finally:
        _forget()
    settings = dict.fromkeys(providers, setting)
    paths = {name: path(case, setting, p) for name, p in providers.items()}
    for threads in fewer_threads:
        less = replace(setting, threads=threads)
        settings |= {f"{name}@{threads}": less for name in providers}
        paths |= {f"{name}@{threads}": path(case, less, p) for name, p in providers.items()}
    return _rows(case, settings, seconds, peak, paths, used)


def _with_threads(work: Work, threads: int) -> Work:
    """Sets them before each sample."""

    def prepare(turn: int) -> Call:
        torch.set_num_threads(threads)
        return work.prepare(turn)

    return work._replace(prepare=prepare)


def _checked(
    start: Callable[[Provider], Work],
    providers: Mapping[str, Provider],
    case: Case,
    setting: Setting,
) -> dict[str, Work]:
    works = {}
    for name, provider in providers.items():
        with _blaming(name, case, setting):
            works[name] = start(provider)
    check(works, case, setting)
    return works


@contextmanager
def _blaming(name: str, case: Case, setting: Setting) -> Iterator[None]:
    """Raises WrongResult for any exception of the body."""
    try:
        yield
    except Exception as error:
        what = f"{name} fails in {setting.name} {case}: {first_line(error)}"
        raise WrongResult(what) from error


def check(works: Mapping[str, Work], case: Case, setting: Setting) -> None:
    """Compares the results of each provider with those of the first, native; raises WrongResult."""
    expected: dict[str, Tensor] = {}
    for name, work in works.items():
        with _blaming(name, case, setting):
            found = work.results()
            expected = expected or found
            distances = {what: _distance(found.get(what), expected[what]) for what in expected}
        for what, distance in distances.items():
            if not distance <= TOLERANCE[work.rounds_to or setting.dtype]:  # also NaN
                raise WrongResult(
                    f"{name} is wrong in {setting.name} {case}: "
                    f"its {what} differs from native's by {distance:.2g} of the norm"
                )


def _distance(found: Tensor | None, expected: Tensor) -> float:
    """|found - expected| / |expected|; 0 if they are equal, NaN if the shapes differ."""
    if found is None or found.shape != expected.shape:
        return float("nan")
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    difference = norm(found.detach() - expected.detach())
    return (difference / norm(expected.detach())).item() if difference != 0 else 0.0


def in_turn(
    works: Mapping[str, Work],
    rounds: int,
    clock: Clock,
    after_round: Callable[[], object] = lambda: None,
    sample_seconds: float | None = None,
) -> dict[str, list[float]]:
    """Seconds per step of each, one number per round; rounds rotate the order.

    sample_seconds: default SAMPLE_SECONDS.
    """
    sample = sample_seconds or SAMPLE_SECONDS
    loops = {name: _loops(work.prepare(0), clock, sample) for name, work in works.items()}
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


def _loops(call: Call, clock: Clock, sample: float) -> int:
    """Number of calls per sample of so many seconds; warms up."""
    loops = 1
    while _elapsed(call, loops, clock) < sample:
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
    ratio_q20: float
    ratio_q80: float


def summarize(seconds: Mapping[str, list[float]]) -> dict[str, Summary]:
    """Of what in_turn returns, with native among it."""
    found = {}
    for name, samples in seconds.items():
        ratios = [native / own for native, own in zip(seconds["native"], samples, strict=True)]
        (low, middle, high), (q20, ratio, q80) = _quantiles(samples), _quantiles(ratios)
        found[name] = Summary(middle, low, high, ratio, q20, q80)
    return found


def _quantiles(samples: list[float]) -> list[float]:
    """20%, 50% and 80%."""
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found: list[float] = torch.tensor(samples, dtype=torch.float64).quantile(at).tolist()
    return found


def _rows(
    case: Case,
    settings: Mapping[str, Setting],
    seconds: Mapping[str, list[float]],
    peak: Peak | None,
    paths: Mapping[str, str],
    used: float | None,
) -> list[Row]:
    def short(value: float) -> float:
        return float(f"{value:.6g}")

    rows = []
    for name, summary in summarize(seconds).items():
        setting = settings[name]
        bound, least = peak.bound(case, setting) if peak else ("", None)
        operations = case.operations(setting.mode) / networks(case)
        of_time: dict[str, Any] = {k: short(value) for k, value in summary._asdict().items()}
        rows.append(
            Row(
                **asdict(setting),
                case=str(case),
                device_name=device_name(setting.device),
                provider=name,
                **of_time,
                torch=torch.__version__,
                mlp_ext=build_info()["mlp_ext"],
                commit=commit(),
                timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                gflops=short(operations / summary.median_s / 1e9),
                bound=bound,
                share_of_bound=None if least is None else short(least / summary.median_s),
                path=paths[name],
                other_cpus=used,
            )
        )
    return rows


def _forget() -> None:
    """Frees the memory and compiled code of a case, so that the next shapes are static, too."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
