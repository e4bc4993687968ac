"""Many networks: `pytest benchmarks/bench_many.py --benchmark-only -k "relu and 64x30"`."""

from collections.abc import Callable

SUITE = "many"


def bench_step(timed: Callable[[str], None]) -> None:
    timed("step")
