"""Children of a process that has computed: they compute on all threads, with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from forks import in_forks

SCRIPT = Path(__file__).with_name("forking.py")


@cache
def found() -> dict[str, bool]:
    done = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, bool] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "a child computes the same",
        "each of many children",
        "a child uses all threads",
        "the parent computes on",
        "a child of a thread",
        "a child beside a thread that computes",
        "a child of a thread whose step runs",
        "a child of a child",
        "a pool of multiprocessing",
        "workers of a DataLoader",
    ],
)
def test_fork(case: str) -> None:
    assert found()[case]


@pytest.mark.slow
def test_one_openmp_runtime() -> None:
    """mlp_ext's regions run on torch's own threads."""
    code = """
import mlp_ext
from mlp_ext import _C
torch.set_num_threads(3)
mlp_ext.linear_relu(torch.ones(1024, 64), torch.ones(64, 64))
names = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line and ".so" in line}
print([n for n in names if "/libgomp" in n or "/libomp" in n or "/libiomp" in n].__len__())
print(_C.parallel_for_threads())
"""
    assert in_forks(code, [{}])[0].split() == ["1", "3"]


@pytest.mark.slow
def test_free_threaded_python_is_refused() -> None:
    code = """
sys.abiflags = "t"
import mlp_ext
"""
    last = in_forks(code, [{}])[0].splitlines()[-1]
    assert last == (
        "ImportError: mlp_ext needs the GIL, and this Python is free-threaded: "
        "use the ordinary build, such as python3.13 in place of 3.13t"
    )


@pytest.mark.slow
def test_a_child_that_dies_is_told() -> None:
    assert in_forks("os.kill(os.getpid(), 11)", [{}]) == ["the process died: status 11\n"]
