"""The last line of a command's output, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlp_ext.bench.noise import SPREAD

Speed = tuple[Any, Any, Any]  # torch's time / its own: median, 20% and 80% quantile


def fastest(speeds: Mapping[str, Speed]) -> str:
    """Names the fastest of what was compared with torch; with a range where it is wide."""
    name = max(speeds, key=lambda name: speeds[name][0])
    speed, low, high = speeds[name]
    times = _digits(speed) if high <= SPREAD * low else f"{_digits(low)} to {_digits(high)}"
    text = f"{name} was {times} times as fast as torch"
    return text if speed >= 1 else f"Nothing was faster than torch; {text}"


def _digits(speed: float) -> str:
    return f"{speed:.{2 if speed < 2 else 1 if speed < 10 else 0}f}"
