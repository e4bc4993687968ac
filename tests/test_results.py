"""Memory of large results is used again, never while a tensor holds it, and not without bound."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import mlp_ext
from mlp_ext import _C

MIB = 2**20


def result(mib: int, value: float = 1.0) -> Tensor:
    """A result of so many MiB, full of the value."""
    rows = mib * MIB // (4 * 64)
    return mlp_ext.linear_act(torch.ones(rows, 1), torch.full((64, 1), value), None, "identity")


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import torch, mlp_ext\nfrom mlp_ext import _C\n{code}"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


@pytest.mark.parametrize("mib", [1, 2, 3, 9])
def test_memory_of_a_freed_result_is_used_again(mib: int) -> None:
    first = result(mib)
    place = first.data_ptr()
    del first
    assert result(mib).data_ptr() == place


def test_results_that_live_share_no_memory() -> None:
    alive = [result(2, float(value)) for value in range(5)]
    view = alive.pop(2)[:1]  # keeps the whole of it
    alive += [result(2, float(value)) for value in range(5, 9)]
    for tensor, value in zip(alive, [0, 1, 3, 4, 5, 6, 7, 8], strict=True):
        assert tensor.eq(value).all()
    assert view.eq(2).all()


@pytest.mark.slow
def test_memory_that_waits_is_counted_and_bounded() -> None:
    results = [result(100, 0.0) for _ in range(4)]
    before = _C.cached_bytes()
    assert before <= 256 * MIB
    del results
    assert 200 * MIB <= _C.cached_bytes() <= 256 * MIB
    taken = _C.cached_bytes()
    kept = result(100)
    assert _C.cached_bytes() == taken - kept.nbytes


@pytest.mark.slow
@pytest.mark.parametrize(("mib", "waiting"), [("0", 0), ("1", 0), ("4", 2 * MIB)])
def test_bound_is_the_environments(mib: str, waiting: int) -> None:
    code = (
        "y = mlp_ext.linear_relu(torch.ones(8192, 1), torch.ones(64, 1)); del y\n"
        "print(_C.cached_bytes())"
    )
    assert int(python(code, MLP_EXT_RESULTS_MIB=mib)) == waiting


@pytest.mark.slow
@pytest.mark.parametrize("value", ["", "abc", "-1", "1.5", "1 ", "99999999999999999999"])
def test_a_bound_that_is_no_number_is_an_error(value: str) -> None:
    code = (
        "try:\n"
        "    mlp_ext.linear_relu(torch.ones(8192, 1), torch.ones(64, 1))\n"
        "except ValueError as error:\n"
        "    print(str(error).splitlines()[0])"
    )
    expected = f"MLP_EXT_RESULTS_MIB must be a whole number from 0 to 1073741824, got '{value}'"
    assert python(code, MLP_EXT_RESULTS_MIB=value) == expected


@pytest.mark.slow
def test_results_can_be_freed_after_everything_else() -> None:
    """At the end of the process, by another thread, and in a child."""
    python("import sys\nsys.y = mlp_ext.linear_relu(torch.ones(8192, 1), torch.ones(64, 1))")
    python(
        "import os\n"
        "torch.set_num_threads(1)\n"  # OpenMP's own threads do not live on in a child
        "y = mlp_ext.linear_relu(torch.ones(8192, 1), torch.ones(64, 1))\n"
        "if os.fork() == 0:\n"
        "    del y\n"
        "    z = mlp_ext.linear_relu(torch.ones(8192, 1), torch.ones(64, 1))\n"
        "    os._exit(0 if z.eq(1).all() else 1)\n"
        "assert os.wait()[1] == 0 and y.eq(1).all()"
    )
    with ThreadPoolExecutor(4) as pool:
        for value, tensor in enumerate(pool.map(lambda v: result(1, float(v)), range(40))):
            assert tensor.eq(value).all()


def test_results_behave_as_other_tensors() -> None:
    y = result(2)
    assert y.untyped_storage().resize_(4 * MIB).nbytes() == 4 * MIB
    assert y.eq(1).all()
    assert result(2).resize_(1, 3 * MIB).numel() == 3 * MIB
    shared = result(2, 3.0).share_memory_()
    assert shared.is_shared()
    assert shared.eq(3).all()
    assert result(2, 5.0).clone().eq(5).all()


def test_profiler_sees_the_memory_of_results() -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        y = result(2)
        del y
    used = {e.key: e.self_cpu_memory_usage for e in profiled.key_averages()}
    assert used["mlp_ext::linear_act"] >= 2 * MIB


PAIRED = r"""
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
namespace c10 {
std::mutex mutex;
std::set<void*>& mine() { static auto* const s = new std::set<void*>; return *s; }
void* alloc_cpu(size_t bytes) {
  void* const p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  const std::lock_guard<std::mutex> lock(mutex);
  mine().insert(p);
  return p;
}
void free_cpu(void* p) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (p && !mine().erase(p)) {
    std::fputs("freed what another allocator made", stderr);
    std::_Exit(1);
  }
  std::free(p);
}
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_memory_is_freed_by_the_allocator_that_made_it(tmp_path: Path) -> None:
    """torch's may be another than the C library's, as on ARM. One that checks takes its place."""
    source, library = tmp_path / "paired.cpp", tmp_path / "paired.so"
    source.write_text(PAIRED)
    subprocess.run(["c++", "-shared", "-fPIC", "-o", library, source], check=True)
    code = """
for mib in (1, 3):
    mlp_ext.linear_act(torch.ones(mib * 4096, 1), torch.ones(64, 1), None, "identity")
print("ok")
"""
    assert python(code, LD_PRELOAD=str(library), MLP_EXT_RESULTS_MIB="0") == "ok"
