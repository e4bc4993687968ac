"""Tables, and the last line of a command's output in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from mlp_ext.bench.noise import SPREAD

WIDTH = 79  # of a terminal
Speed = tuple[Any, Any, Any]  # torch's time / its own: median, 20% and 80% quantile


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, which is NaN for a single value or where not all are finite."""
    many = len(values) > 1 and all(map(math.isfinite, values))
    return fmean(values), stdev(values) if many else math.nan


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its columns aligned at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]


def fastest(speeds: Mapping[str, Speed]) -> str:
    """Names the fastest of what was compared with torch; with a range where it is wide."""
    name = max(speeds, key=lambda name: speeds[name][0])
    speed, low, high = speeds[name]
    times = _digits(speed) if high <= SPREAD * low else f"{_digits(low)} to {_digits(high)}"
    text = f"{name} was {times} times as fast as torch"
    return text if speed >= 1 else f"Nothing was faster than torch; {text}"


def _digits(speed: float) -> str:
    return f"{speed:.{2 if speed < 2 else 1 if speed < 10 else 0}f}"
