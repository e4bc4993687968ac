"""Layers: `pytest benchmarks/bench_layers.py --benchmark-only -k "full and 64x784x256"`."""

from collections.abc import Callable

SUITE = "layers"


def bench_forward(timed: Callable[[str], None]) -> None:
    timed("forward")


def bench_backward(timed: Callable[[str], None]) -> None:
    timed("backward")


def bench_full(timed: Callable[[str], None]) -> None:
    timed("full")
