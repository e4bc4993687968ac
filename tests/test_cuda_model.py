"""What tests/cuda_on_cpu/model.h sees: kernels with a fault each, and the same ones without it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from cuda_kernels import ORDERS, Problem, buffer, fault, load_once
from once import Once
from torch import Tensor

each_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def library(once: Once) -> ctypes.CDLL:
    return load_once(once, "faulty", "warps")


def run(library: ctypes.CDLL, file: str, name: str, order: str) -> tuple[str, Tensor]:
    """What is found wrong, and y; x is 0, 1, ... 99, and a block has 64 threads."""
    x, y = torch.arange(100.0), torch.full((100,), torch.nan)
    problem = Problem(M=100, x=buffer(x), y=buffer(y), order=ORDERS[order], seed=1)
    return fault(library, file, problem, name.encode()), y


UNWRITTEN = "a read of shared memory that nobody wrote"
SHARED, GLOBAL = "a race for shared memory", "a race for global memory"
FAULTY = {
    "reversed without its barrier": UNWRITTEN,
    "reversed beyond the end": "element 100 of 100 in global memory",
    "reversed with less shared memory": "more shared memory than the launch gives",
    "a barrier that some miss": "a barrier that some threads never reach",
    "barriers in two branches": "two barriers waited at at once",
    "16 bytes from an odd element": "a misaligned access to global memory",
    "two threads write one element": SHARED,
    "last block without its barrier": GLOBAL,
    "last block without the fence before": GLOBAL,
    "last block without the fence after": GLOBAL,
}


@each_order
@pytest.mark.parametrize("name", FAULTY)
def test_faults_are_seen(name: str, order: str, library: ctypes.CDLL) -> None:
    assert FAULTY[name] in run(library, "faulty", name, order)[0]


@each_order
def test_reversal_in_pieces_and_by_the_last_block(order: str, library: ctypes.CDLL) -> None:
    x = torch.arange(100.0)
    for name, expected in {
        "reversed": torch.cat([piece.flip(0) for piece in x.split(64)]),
        "last block": x.flip(0),
        "last block with a fence of each thread": x.flip(0),
    }.items():
        found, y = run(library, "faulty", name, order)
        assert not found
        assert torch.equal(y, expected)


# Of a warp's 32 values.
WARPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum by xor": lambda v: v.sum().expand(32),
    "sum of 8 in their first": lambda v: torch.stack(
        [v[lane : lane + 8].sum() if lane % 8 == 0 else v.new_zeros(()) for lane in range(32)]
    ),
    "running sum": lambda v: v.cumsum(0),
    "third of 16": lambda v: v.view(2, 16)[:, 3:4].expand(2, 16).flatten(),
    "one up of 4": lambda v: v.view(8, 4)[:, [0, 0, 1, 2]].flatten(),
    # CUDA reads of earlier groups, not of later ones.
    "across groups of 8": lambda v: v.view(4, 8)[[0, 0, 2, 2]].flatten(),
    "count of thirds": lambda v: (
        (v % 3 == 0).sum() + 100 * (v == 40).any() + 200 * (v < 64).all()
    ).expand(32),
    "sum of halves": lambda v: v.view(2, 16).sum(1).repeat_interleave(16),
    "opposite": lambda v: v + 1,  # of the opposite's opposite, 1 added on the second way
    "first then change": lambda v: v[0].expand(32),
}


@each_order
@pytest.mark.parametrize("name", WARPS)
def test_warps_compute(name: str, order: str, library: ctypes.CDLL) -> None:
    found, y = run(library, "warps", name, order)
    assert not found
    x = torch.cat([torch.arange(100.0), torch.zeros(28)])
    expected = torch.cat([WARPS[name](v) for v in x.split(32)])[:100]
    assert torch.equal(y, expected.float())


NEVER = "that some of its mask never reach"
FAULTY_WARPS = {
    "opposite without sync after write": UNWRITTEN,
    "opposite without sync after read": SHARED,
    "opposite after a shuffle": SHARED,  # which orders no memory
    "opposite of halves": SHARED,
    "first then change without sync": SHARED,
    "in a branch": NEVER,
    "of two kinds": NEVER,
    "of two masks": NEVER,
    "past a barrier": NEVER,
    "from outside": "from a lane outside of its mask",
    "not its own": "with a mask without its own lane",
    "of width 12": "a width of 12",
}


@each_order
@pytest.mark.parametrize("name", FAULTY_WARPS)
def test_faults_of_warps_are_seen(name: str, order: str, library: ctypes.CDLL) -> None:
    assert FAULTY_WARPS[name] in run(library, "warps", name, order)[0]
