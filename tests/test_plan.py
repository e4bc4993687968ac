"""The CPU plan: which path a shape takes, on both sides of each boundary, and how it is cut."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from mlp_ext import _C

FLOAT = 4


def plan(M: int, K: int, N: int, threads: int = 2, item_size: int = FLOAT) -> dict[str, Any]:
    return _C.plan(M, K, N, item_size, threads)


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ((10, 10, 5), "small", "small"),
        ((16, 16, 16), "small", "small"),  # 4096 products
        ((17, 16, 16), "packed", "packed"),
        ((0, 784, 256), "small", "small"),
        ((64, 0, 256), "small", "small"),
        ((16, 784, 256), "dots", "packed"),
        ((17, 784, 256), "packed", "packed"),
        ((4096, 64, 4), "dots", "tall"),
        ((4096, 64, 5), "packed", "tall"),
        ((4096, 64, 1), "dots", "one_output"),
        ((4096, 1, 64), "packed", "one_input"),
        ((4096, 1, 1 << 16), "packed", "one_input"),
        ((4096, 1, (1 << 16) + 1), "packed", "packed"),
        ((4, (1 << 16) + 1, 1), "dots", "packed"),
        ((256, 64, 64), "packed", "tall"),  # 2 threads of twice as many rows as dW has
        ((255, 64, 64), "packed", "packed"),
        ((65536, 48, 256), "packed", "tall"),  # 12288 weights
        ((65536, 49, 256), "packed", "packed"),
        ((65536, 8, 257), "packed", "packed"),
        ((65536, 1024, 8), "packed", "tall"),
        ((65536, 1025, 8), "packed", "packed"),
        ((1024, 1024, 1024), "packed", "packed"),
    ],
)
def test_plan_takes_the_path_of_the_shape(
    shape: tuple[int, int, int], forward: str, backward: str
) -> None:
    chosen = plan(*shape)
    assert (chosen["forward_path"], chosen["backward_path"]) == (forward, backward)


def test_plan_uses_threads_where_there_is_work_for_them() -> None:
    for product in ("forward", "grad_input", "grad_weight"):
        assert prod(plan(32, 64, 64)[product]) == 1  # 2^17 products: one thread's work
        assert prod(plan(1024, 1024, 1024)[product]) == 2
        assert prod(plan(1024, 1024, 1024, threads=1)[product]) == 1
        assert prod(plan(4096, 4096, 4096, threads=64)[product]) == 64


def test_plan_cuts_samples_of_narrow_layers() -> None:
    rows, columns, samples = plan(65536, 64, 64, threads=8)["grad_weight"]
    assert (rows, columns, samples) == (1, 1, 8)


def test_plan_bounds_the_rows_of_16_bit_pieces() -> None:
    assert plan(65536, 512, 512, item_size=2)["forward"][0] == 65536 // 512
    assert plan(65536, 512, 512)["forward"][0] <= 2
