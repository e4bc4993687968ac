"""Training steps: `pytest benchmarks/bench_train.py --benchmark-only -k "relu and 10-5-1"`."""

from collections.abc import Callable

SUITE = "train"


def bench_step(timed: Callable[[str], None]) -> None:
    timed("step")
