"""The CPU plan: which path a shape takes on each side of a limit, and how it is cut."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from mlp_ext import _C

FLOAT = 4


def plan(
    M: int, K: int, N: int, threads: int = 2, item_size: int = FLOAT, **more: Any
) -> dict[str, Any]:
    return _C.plan(M, K, N, item_size, threads, **{"machine": "zen4", **more})


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ((10, 20, 5), "small", "small"),
        ((8, 16, 32), "small", "small"),  # 4096 products
        ((8, 17, 32), "dots", "few_rows"),
        ((10, 10, 5), "narrow", "small"),
        ((6, 10, 5), "small", "small"),  # fewer outputs than W is worth packing for
        ((200, 16, 16), "narrow", "tall"),
        ((200, 17, 16), "packed", "tall"),
        ((200, 16, 17), "packed", "tall"),
        ((1024, 8, 1), "narrow", "narrow"),
        ((1024, 9, 1), "dots", "one_output"),
        ((1024, 8, 16), "narrow", "narrow"),
        ((1024, 9, 16), "narrow", "tall"),
        ((1024, 8, 17), "packed", "tall"),
        ((128, 8, 8), "narrow", "narrow"),
        ((127, 8, 8), "narrow", "tall"),
        ((1024, 1, 8), "one_input", "narrow"),
        ((1024, 1, 9), "one_input", "one_input"),
        ((4, 32, 32), "dots", "small"),  # 8 times as deep as there are rows
        ((4, 31, 32), "small", "small"),
        ((1000, 1, 1), "one_input", "one_output"),
        ((1, 1, 31), "small", "small"),
        ((1, 1, 32), "one_input", "one_input"),
        ((0, 784, 256), "dots", "small"),
        ((16, 0, 256), "small", "small"),  # no inputs: as one
        ((17, 0, 256), "packed", "packed"),
        ((4, 0, 2048), "dots", "packed"),
        ((16, 100, 256), "dots", "packed"),
        ((17, 100, 256), "packed", "packed"),
        ((32, 384, 256), "dots", "packed"),  # 12 times as deep as there are rows
        ((32, 383, 256), "packed", "packed"),
        ((64, 784, 256), "dots", "packed"),
        ((65, 784, 256), "packed", "packed"),
        ((4096, 64, 4), "dots", "tall"),
        ((4096, 64, 5), "packed", "tall"),
        ((4096, 25, 4), "dots", "tall"),
        ((4096, 24, 4), "packed", "tall"),
        ((4096, 24, 1), "dots", "one_output"),
        ((4096, 1, 64), "one_input", "one_input"),
        ((4096, 1, 1 << 16), "one_input", "one_input"),
        ((4096, 1, (1 << 16) + 1), "packed", "packed"),
        ((4, (1 << 16) + 1, 1), "dots", "few_rows"),
        ((9, (1 << 16) + 1, 1), "dots", "packed"),
        ((8, 100, 256), "dots", "few_rows"),
        ((9, 100, 256), "dots", "packed"),
        ((256, 64, 64), "packed", "tall"),  # 2 threads of twice as many rows as dW has
        ((255, 64, 64), "packed", "packed"),
        ((65536, 512, 512), "packed", "tall"),  # 2^18 weights, rows of dz of 2048 bytes
        ((65536, 8, 513), "packed", "packed"),
        ((65536, 1024, 256), "packed", "tall"),
        ((65536, 1024, 257), "packed", "packed"),
        ((65536, 1025, 8), "packed", "packed"),
        ((1024, 1024, 1024), "packed", "packed"),
    ],
)
def test_plan_takes_the_path_of_the_shape(
    shape: tuple[int, int, int], forward: str, backward: str
) -> None:
    chosen = plan(*shape)
    assert (chosen["forward_path"], chosen["backward_path"]) == (forward, backward)


def test_plan_measures_narrow_rows_as_they_are_accumulated() -> None:
    for item_size, widest in ((2, 16), (4, 16), (8, 8)):
        assert plan(4096, widest, widest, item_size=item_size)["forward_path"] == "narrow"
        assert plan(4096, widest + 1, 4, item_size=item_size)["forward_path"] != "narrow"
        assert plan(4096, widest // 2, 4, item_size=item_size)["backward_path"] == "narrow"
        assert plan(4096, widest // 2 + 1, 4, item_size=item_size)["backward_path"] == "tall"


def test_plan_cuts_what_is_bound_by_memory_into_whole_rows() -> None:
    assert plan(65536, 4, 4)["forward"] == plan(1000, 1, 1000)["forward"] == (2, 1, 1)
    assert plan(4, 1, 1 << 16)["forward"] == (1, 2, 1)  # unless there are too few
    for N, dx, dw in ((128, (1, 1, 2), (2, 1, 1)), (127, (1, 2, 1), (1, 2, 1))):
        chosen = plan(8, 4096, N)
        assert chosen["backward_path"] == "few_rows"
        assert (chosen["grad_input"], chosen["grad_weight"]) == (dx, dw)


def test_plan_measures_a_row_of_dz_as_it_is_accumulated() -> None:
    for item_size, widest in ((2, 512), (4, 512), (8, 256)):
        assert plan(65536, 8, widest, item_size=item_size)["backward_path"] == "tall"
        assert plan(65536, 8, widest + 1, item_size=item_size)["backward_path"] == "packed"


@pytest.mark.parametrize(
    ("shape", "mode", "forward", "backward"),
    [
        ((16, 784, 256), "fma", "dots", "packed"),
        ((17, 784, 256), "fma", "packed", "packed"),  # converting is no dearer than dots
        ((32, 784, 256), "bf16_dot", "dots", "packed"),
        ((33, 784, 256), "bf16_dot", "packed", "packed"),
        ((1024, 128, 128), "fma", "packed", "tall"),
        ((1024, 128, 128), "bf16_dot", "packed", "library"),  # 2^24 products
        ((16, 128, 128), "amx", "amx", "amx"),
        ((15, 128, 128), "amx", "packed", "packed"),
        ((15, 1024, 1024), "amx", "library", "library"),  # 2^19 multiply-adds
        ((65536, 16, 64), "amx", "amx", "tall"),
        ((65536, 15, 64), "amx", "packed", "tall"),
        ((65536, 24, 4), "amx", "amx", "tall"),
        ((65536, 24, 3), "amx", "packed", "tall"),
        ((65536, 32, 32), "amx", "amx", "amx"),
        ((65536, 31, 32), "amx", "amx", "tall"),
        ((65536, 32, 31), "amx", "amx", "tall"),
        ((65536, 24, 16), "amx", "amx", "library"),
        ((65536, 23, 16), "amx", "amx", "tall"),
        ((64, 16384, 64), "amx", "amx", "amx"),
        ((64, 16386, 64), "amx", "library", "amx"),  # a row of x would not fit the workspace
        ((16, 16, 16), "amx", "narrow", "small"),
        ((2, 512, 512), "amx", "dots", "library"),
        ((2, 512, 510), "amx", "dots", "few_rows"),
        ((100, 1024, 1024), "bf16_dot", "library", "library"),
        ((9, 1024, 1024), "bf16_dot", "dots", "library"),
        ((8, 1024, 1024), "bf16_dot", "dots", "few_rows"),  # one pass over W, also with an update
        ((1, 4096, 4096), "amx", "dots", "few_rows"),
        ((256, 1024, 256), "bf16_dot", "library", "library"),
        ((256, 1023, 257), "bf16_dot", "packed", "library"),
    ],
)
def test_plan_of_16_bit_depends_on_how_they_are_multiplied(
    shape: tuple[int, int, int], mode: str, forward: str, backward: str
) -> None:
    chosen = plan(*shape, item_size=2, mode=mode)
    assert (chosen["forward_path"], chosen["backward_path"]) == (forward, backward)
    if backward == "few_rows":
        assert plan(*shape, item_size=2, mode=mode, update=True)["backward_path"] == "few_rows"


@pytest.mark.parametrize(
    ("shape", "mode", "backward"),
    [
        ((512, 256, 256), "bf16_dot", "packed"),  # W changes where dW is written
        ((8, 512, 512), "amx", "library"),
        ((1024, 128, 128), "bf16_dot", "library"),  # tall, where W changes after it, too
    ],
)
def test_plan_of_an_update_keeps_it_in_the_product(
    shape: tuple[int, int, int], mode: str, backward: str
) -> None:
    without, chosen = (
        plan(*shape, item_size=2, mode=mode, update=update) for update in (False, True)
    )
    assert (without["backward_path"], chosen["backward_path"]) == ("library", backward)
    assert not chosen["concurrent_gemms"]


def test_plan_without_the_library_is_our_own() -> None:
    for mode, own in (("bf16_dot", "packed"), ("amx", "amx")):
        chosen = plan(1024, 1024, 1024, item_size=2, mode=mode, library=False)
        assert (chosen["forward_path"], chosen["backward_path"]) == (own, own)


def test_plan_needs_a_known_way_of_multiplying() -> None:
    with pytest.raises(ValueError, match="mode must be fma, bf16_dot or amx, got 'AMX'"):
        plan(1, 1, 1, mode="AMX")


def test_plan_uses_threads_where_there_is_work_for_them() -> None:
    assert prod(plan(32, 64, 64)["forward"]) == 1  # 2^17 products: one thread's work
    assert prod(plan(64, 64, 128)["forward"]) == 2
    assert prod(plan(1024, 1024, 1024)["forward"]) == 2
    assert prod(plan(1024, 1024, 1024, threads=1)["forward"]) == 1
    assert prod(plan(4096, 4096, 4096, threads=64)["forward"]) == 64


@pytest.mark.parametrize(
    ("M", "threads", "at_once", "pieces"),
    [
        (31, 2, False, 1),  # dx has less than one thread's work, and dW too
        (32, 2, True, 1),
        (1024, 1, False, 1),
        (1024, 2, True, 1),
        (1024, 3, True, 3),  # each thread has a part of both
        (1024, 8, True, 4),
    ],
)
def test_plan_gives_dx_and_dw_half_of_the_threads_each(
    M: int, threads: int, at_once: bool, pieces: int
) -> None:
    chosen = plan(M, 64, 64 if M < 1024 else 4096, threads=threads)
    assert chosen["concurrent_gemms"] is at_once
    assert prod(chosen["grad_input"]) == prod(chosen["grad_weight"]) == pieces


def test_plan_cuts_where_least_is_packed() -> None:
    """dx: dz costs twice W; forward: W costs twice x; but A is packed for every 1024 columns."""
    assert plan(1024, 1024, 1024, threads=4)["grad_input"] == (2, 1, 1)
    assert plan(1024, 2048, 1024, threads=4)["grad_input"] == (1, 2, 1)
    assert plan(1024, 1024, 1024)["forward"] == (1, 2, 1)


def test_plan_cuts_samples_of_narrow_layers() -> None:
    rows, columns, samples = plan(65536, 64, 64, threads=8)["grad_weight"]
    assert (rows, columns, samples) == (1, 1, 8)


@pytest.mark.parametrize("threads", [8, 32, 128])
@pytest.mark.parametrize(
    "shape",
    [(1, 4096, 4096), (64, 784, 256), (256, 1024, 1024), (65536, 64, 64), (8192, 8192, 8192)],
)
def test_plan_gives_many_threads_pieces_of_a_useful_size(
    shape: tuple[int, int, int], threads: int
) -> None:
    M, K, N = shape
    chosen = plan(*shape, threads=threads)
    most = max(1, M * K * N >> 17)  # multiply-adds of a thread
    for name, rows, columns in (("forward", M, N), ("grad_input", M, K), ("grad_weight", N, K)):
        grid = chosen[name]
        assert prod(grid) <= min(threads, most)
        assert grid[0] <= max(1, rows // 64) and grid[1] <= max(1, columns // 64)
    if most >= 64 * threads:  # then all of them have work, in dx and dW together
        together = 2 if chosen["concurrent_gemms"] and chosen["backward_path"] == "packed" else 1
        assert together * prod(chosen["grad_weight"]) >= 0.75 * threads


def test_plan_bounds_the_rows_of_16_bit_pieces() -> None:
    assert plan(65536, 512, 512, item_size=2)["forward"][0] == 65536 // 512
    assert plan(65536, 512, 512)["forward"][0] <= 2


@pytest.mark.parametrize(
    ("widths", "batch", "path", "pieces"),
    [
        ([10, 5, 1], 10, "blocks", 1),  # a thread would cost more than it takes over
        ([64, 64, 64, 64, 64], 4096, "blocks", 2),
        ([512, 512], 4096, "blocks", 2),
        ([513, 8], 4096, "layers", 2),  # its rows are wider than a block's
        ([784, 256, 10], 64, "panels", 2),
        ([256, 256], 48, "panels", 2),  # too few rows for sums of each thread
        ([784, 256, 10], 50, "layers", 2),  # too many empty lanes in the last panel
        ([784, 256, 10], 16, "layers", 2),  # too few rows for a copy of W
        ([1024, 1024], 512, "panels", 2),
        ([1024, 1024], 528, "layers", 2),  # a block of depth is cut
        ([40, 9000], 64, "layers", 2),  # too few columns of W for two threads
        ([3, 700, 400], 32, "panels", 2),  # but a small layer may have few
        ([1024, 8192], 64, "panels", 2),
        ([1024, 8193], 64, "layers", 2),  # the loss of a panel would not fit the scratch memory
        ([1024, 0, 1024], 64, "layers", 1),
        ([512, 512, 512], 4096, "layers", 2),  # weights that no cache keeps
        ([8] * 34, 10, "layers", 1),  # more layers than have a place
    ],
)
def test_step_takes_its_path(widths: list[int], batch: int, path: str, pieces: int) -> None:
    plan = _C.step_plan(widths, batch, item_size=4, threads=2, machine="zen4")
    assert plan == {"path": path, "pieces": pieces}


def test_step_of_16_bit_takes_no_panels() -> None:
    assert _C.step_plan([784, 256, 10], 64, item_size=2, threads=2)["path"] == "layers"
    assert _C.step_plan([784, 256, 10], 64, item_size=8, threads=2)["path"] == "panels"


def test_step_by_blocks_is_narrow_where_pairs_are_multiplied() -> None:
    for mode, widest in (("fma", 512), ("bf16_dot", 48), ("amx", 48)):
        for width, path in ((widest, "blocks"), (widest + 1, "layers")):
            plan = _C.step_plan([width, 8], 4096, 2, threads=2, mode=mode, machine="zen4")
            assert plan["path"] == path


def test_step_plan_needs_an_input_and_an_output() -> None:
    for widths in ([], [3]):
        with pytest.raises(ValueError, match="widths must name input and output"):
            _C.step_plan(widths, 64, item_size=4, threads=2)


NONSENSE = [
    ({"M": -1}, "sizes must be from 0 on, got -1"),
    ({"K": -(2**63)}, "sizes must be from 0 on, got -9223372036854775808"),
    ({"N": 2**62}, r"the product of the sizes must be at most 2\^53"),
    ({"item_size": 3}, "item_size must be 2, 4 or 8, got 3"),
    ({"threads": 0}, "threads must be from 1 to 65536, got 0"),
    ({"threads": -1}, "threads must be from 1 to 65536, got -1"),
    ({"threads": 2**62}, "threads must be from 1 to 65536, got 4611686018427387904"),
]


@pytest.mark.parametrize(("change", "message"), NONSENSE, ids=lambda v: str(v)[:40])
def test_plan_refuses_nonsense(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.plan(**{"M": 64, "K": 784, "N": 256, "item_size": FLOAT, "threads": 2, **change})


STEP_NONSENSE = [
    ({"widths": [10, -5, 1]}, "sizes must be from 0 on, got -5"),
    ({"widths": [10, 2**40, 1]}, r"the product of the sizes must be at most 2\^53"),
    ({"batch": -1}, "sizes must be from 0 on, got -1"),
    ({"item_size": 0}, "item_size must be 2, 4 or 8, got 0"),
    ({"threads": 0}, "threads must be from 1 to 65536, got 0"),
]


@pytest.mark.parametrize(("change", "message"), STEP_NONSENSE, ids=lambda v: str(v)[:40])
def test_step_plan_refuses_nonsense(change: dict[str, Any], message: str) -> None:
    good = {"widths": [10, 5, 1], "batch": 2**12, "item_size": FLOAT, "threads": 2}
    with pytest.raises(ValueError, match=message):
        _C.step_plan(**{**good, **change})


def test_cuda_plans_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="sizes must be from 0 on, got -1"):
        _C.cuda_plan(-1, 10, 10, "float32", "relu", 90)
    with pytest.raises(ValueError, match="sizes must be from 0 on, got -1"):
        _C.cuda_step_plan([10, 10], -1, "float32", 90, 1 << 17)
