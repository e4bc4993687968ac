"""Memory: flat over steps and models, at most what docs/design-cpu.md promises, given back."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from forks import in_forks
from torch import Tensor, nn

import mlp_ext
from mlp_ext import _C

MIB = 2**20
WORKSPACE = 5 * MIB
SLACK = 8 * MIB  # pages of 2 MiB that hold less, and what the interpreter and malloc take


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settled() -> int:
    """The memory of a process that keeps nothing for later."""
    gc.collect()
    mlp_ext.empty_cache()
    return resident()


# ---- peaks ----

MEASURE = """
import mlp_ext
from pathlib import Path
from mlp_ext import _C
from mlp_ext.bench.training import make_mlp

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

def peak(run):
    run()  # loads code
    mlp_ext.empty_cache()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    results = run()
    return status("VmHWM") - before

torch.set_num_threads(2)
modes = ("fma", "converted", "bf16_dot", "amx")
_C.use_machine({mode: _C.machine("zen4")[mode] for mode in modes})
found = {}
for name, (forward, backward, M, K, N, dtype) in json.loads(CASES).items():
    dtype = getattr(torch, dtype)
    _C.force_paths(forward, backward)
    x, w, y = (torch.rand(*shape, dtype=dtype) for shape in ((M, K), (N, K), (M, N)))
    if forward:
        found[name] = peak(lambda: torch.ops.mlp_ext.linear_act(x, w, w[:, 0], "tanh"))
    else:
        call = torch.ops.mlp_ext._linear_act_backward
        found[name] = peak(lambda: call(y, y, x, w, "tanh", [], [True] * 3))
_C.force_paths(None, None)
for name, (widths, rows) in json.loads(STEPS).items():
    model = make_mlp(widths)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    step = mlp_ext.TrainStep(model, torch.nn.MSELoss(), optimizer)
    x, y = torch.rand(rows, widths[0]), torch.rand(rows, widths[-1])
    found[name] = peak(lambda: step(x, y))
print(json.dumps(found))
"""


def numel(widths: list[int]) -> int:
    return sum(k * n + n for k, n in pairwise(widths))


def sums(M: int, K: int, N: int) -> int:
    """Of dW and db, one copy for each piece of the rows."""
    return _C.plan(M, K, N, 4, 2, machine="zen4")["grad_weight"][2] * (N * K + N) * 4


# Forced forward or backward path, M, K, N, dtype; and bytes beside workspaces and results.
LAYERS = {
    "packed forward": (("packed", None, 8192, 512, 1024, "float32"), 0),
    "library forward": (("library", None, 8192, 512, 1024, "float32"), 0),
    "narrow": ((None, "narrow", 2**20, 8, 8, "float32"), sums(2**20, 8, 8)),
    "tall": ((None, "tall", 2**17, 64, 64, "float32"), sums(2**17, 64, 64)),
    "one_output": ((None, "one_output", 2**20, 16, 1, "float32"), sums(2**20, 16, 1)),
    "few_rows": ((None, "few_rows", 8, 4096, 4096, "float32"), 2 * 8 * 4096 * 4),
    "packed": ((None, "packed", 8192, 1024, 512, "float32"), 0),
    "packed bfloat16": ((None, "packed", 8192, 2048, 1024, "bfloat16"), 4 * 1024 * 2049),
    "library": ((None, "library", 8192, 512, 1024, "float32"), 4 * 8192 * 1024),
}
# Widths and rows; and bytes beside workspaces.
STEPS = {
    "lanes": (([10, 5, 1], 2**17), 2 * numel([10, 5, 1]) * 4),
    "blocks": (([64, 64, 64, 64], 2**16), 2 * numel([64] * 4) * 4),
    "panels": (([2048, 4096, 512], 512), 512 * (2048 + 4096 + 512 + 2 * 4096) * 4),
    "layers": (([256, 8192, 16], 2048), 2048 * (2 * 8192 + 2 * 16) * 4 + (256 + 1) * 8192 * 4),
}


@cache
def peaks() -> dict[str, int]:
    cases = {name: case for name, (case, _) in LAYERS.items()}
    steps = {name: case for name, (case, _) in STEPS.items()}
    code = f"CASES = {json.dumps(cases)!r}\nSTEPS = {json.dumps(steps)!r}\n{MEASURE}"
    (told,) = in_forks(code, [{}])
    found: dict[str, int] = json.loads(told)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_peak_of_a_layer(name: str) -> None:
    (forward, _, M, K, N, dtype), beside = LAYERS[name]
    item = getattr(torch, dtype).itemsize
    results = item * (M * N if forward else M * K + N * K + N)
    assert results - SLACK < peaks()[name] < results + beside + 2 * WORKSPACE + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_peak_of_a_step(name: str) -> None:
    (widths, rows), most = STEPS[name]
    assert _C.step_plan(widths, rows, 4, 2, machine="zen4")["path"] == name
    assert most // 2 - SLACK < peaks()[name] < most + 2 * WORKSPACE + SLACK


# ---- flat ----


def steps_of(name: str) -> tuple[mlp_ext.TrainStep, Tensor, Tensor]:
    widths, rows = {
        "lanes": ([10, 5, 1], 64),
        "blocks": ([30, 16, 1], 32),
        "panels": ([256, 8], 64),
    }[name]
    model = nn.Sequential(*(m for k, n in pairwise(widths) for m in (nn.Linear(k, n), nn.ReLU())))
    step = mlp_ext.TrainStep(model, nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=1e-4))
    return step, torch.rand(rows, widths[0]), torch.rand(rows, widths[-1])


@pytest.mark.parametrize("steps", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["lanes", "blocks", "panels"])
def test_steps_at_flat_memory(name: str, steps: int) -> None:
    step, x, y = steps_of(name)

    def run(count: int) -> None:
        for _ in range(count):
            step(x, y)
        step.fit(x, y, epochs=count, batch_size=len(x))

    run(500)
    before = settled()
    run(steps)
    assert settled() - before < 4 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("steps", [500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_eager_steps_of_a_fused_model_at_flat_memory(steps: int) -> None:
    model = mlp_ext.fuse(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)))
    x = torch.rand(128, 64)

    def run(count: int) -> None:
        for _ in range(count):
            model(x).sum().backward()
            model.zero_grad()

    run(200)
    before = settled()
    run(steps)
    assert settled() - before < 4 * MIB


@pytest.mark.slow
@pytest.mark.usefixtures("small_heap")
def test_a_thousand_steps_made_and_dropped_at_flat_memory() -> None:
    def one() -> None:
        step, x, y = steps_of("blocks")
        step(x, y)

    for _ in range(50):
        one()
    before = settled()
    for _ in range(1000):
        one()
    assert settled() - before < 4 * MIB


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("level", ["layers", "stack"])
def test_fused_and_unfused_a_thousand_times_at_flat_memory(level: mlp_ext.Level) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.rand(4, 8)

    def one(model: nn.Module) -> nn.Module:
        fused = mlp_ext.fuse(model, level=level)
        fused(x)
        return mlp_ext.unfuse(fused)

    for _ in range(50):
        model = one(model)
    before = settled()
    for _ in range(1000):
        model = one(model)
    assert settled() - before < 4 * MIB


@pytest.mark.slow
@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("level", ["layers", "stack"])
def test_a_thousand_models_fused_and_dropped_at_flat_memory(level: mlp_ext.Level) -> None:
    def one() -> None:  # half a MiB of weights
        first, second = (nn.utils.skip_init(nn.Linear, 256, 256) for _ in range(2))
        model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        mlp_ext.fuse(model, level=level)(torch.zeros(1, 256))

    for _ in range(20):
        one()
    before = settled()
    for index in range(1000):
        one()
        if index % 250 == 0:
            gc.collect()
    assert settled() - before < 64 * MIB


# ---- given back ----


def computed() -> Tensor:
    generator = torch.Generator().manual_seed(0)  # its own, since threads share torch's
    x = torch.rand(4096, 64, generator=generator)
    w = torch.rand(64, 64, generator=generator, requires_grad=True)
    mlp_ext.linear_relu(x, w).sum().backward()
    assert w.grad is not None
    return w.grad


def test_empty_cache_gives_all_memory_back() -> None:
    expected = computed()
    before = resident()
    blocks = [mlp_ext.linear_relu(torch.rand(2**15, 1), torch.rand(64, 1)) for _ in range(8)]
    blocks.clear()
    assert _C.cached_bytes() >= 64 * MIB
    assert _C.scratch_bytes() > 0
    mlp_ext.empty_cache()
    assert _C.cached_bytes() == _C.scratch_bytes() == 0
    assert resident() < before + 4 * MIB
    assert torch.equal(computed(), expected)


def test_empty_cache_while_threads_compute() -> None:
    expected = computed()
    count = torch.get_num_threads()
    stop, wrong = threading.Event(), []

    def run() -> None:
        torch.set_num_threads(count)  # the bits depend on it; a new thread has the last one set
        while not stop.is_set():
            wrong.extend([1] if not torch.equal(computed(), expected) else [])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        mlp_ext.empty_cache()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_that_end_give_their_workspace_back() -> None:
    mlp_ext.empty_cache()

    def run() -> None:
        torch.set_num_threads(3)
        computed()

    for _ in range(5):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    end = time.monotonic() + 60
    while _C.scratch_bytes() > 0 and time.monotonic() < end:  # join waits for Python's part alone
        time.sleep(0.01)
    assert _C.scratch_bytes() == 0


@pytest.mark.slow
def test_workspaces_are_bounded_together() -> None:
    """A step of many outputs takes a large one. Those beyond the bound are freed after use."""
    code = """
import mlp_ext
from mlp_ext import _C
torch.set_num_threads(1)
model = torch.nn.Linear(1, 3_000_000, bias=False)  # 25 floats of workspace for each output
step = mlp_ext.TrainStep(model, torch.nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
for count in (1, 2):
    step(torch.ones(10, 1), torch.ones(10, 3_000_000))
    print(_C.scratch_bytes() >> 20)
"""
    sizes = [int(line) for line in in_forks(code, [{}])[0].split()]
    assert len(sizes) == 2
    assert all(size <= 512 for size in sizes)
