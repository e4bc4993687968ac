"""Python threads: on one model for inference, each on its own for training, and on one TrainStep.

Regions of several threads are in test_regions.py, forks in test_processes.py.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mlp_ext

PYTHON_THREADS = 8
NETS = {  # by path of the step
    "lanes": ((10, 5, 1), 1024),
    "blocks": ((64, 64, 64), 1024),
    "panels": ((784, 256, 10), 64),
    "layers": ((600, 300, 10), 100),
}


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    before, interval = torch.get_num_threads(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads interleave often
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(before)


def network(name: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [m for k, n in pairwise(NETS[name][0]) for m in (nn.Linear(k, n), nn.Tanh())]
    return nn.Sequential(*layers)


def data(name: str) -> tuple[Tensor, Tensor]:
    widths, rows = NETS[name]
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(rows, n, generator=generator) for n in (widths[0], widths[-1]))  # type: ignore[return-value]


def train_step(model: nn.Module, **options: int) -> mlp_ext.TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return mlp_ext.TrainStep(model, nn.MSELoss(), optimizer, **options)


def in_threads(run: Callable[[int], object]) -> list[object]:
    with ThreadPoolExecutor(PYTHON_THREADS) as pool:
        return list(pool.map(run, range(PYTHON_THREADS)))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_inference_with_one_model(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model, (x, _) = mlp_ext.fuse(network(name)), data(name)
    with torch.no_grad():
        expected, many = model(x), mlp_ext.predict([model], x)

    def run(_: int) -> bool:
        torch.set_num_threads(threads)
        with torch.no_grad():
            return all(
                torch.equal(model(x), expected) and torch.equal(mlp_ext.predict([model], x), many)
                for _ in range(10)
            )

    assert all(in_threads(run))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_training_of_a_model_each(name: str, threads: int) -> None:
    x, y = data(name)

    def trained(model: nn.Module) -> Tensor:
        torch.set_num_threads(threads)
        step = train_step(model)
        return torch.stack([*(step(x, y) for _ in range(5)), *step.fit(x, y, 3, 16)])

    expected = trained(network(name))
    models = [network(name) for _ in range(PYTHON_THREADS)]
    assert all(torch.equal(t, expected) for t in in_threads(lambda i: trained(models[i])))  # type: ignore[arg-type]


def test_number_of_threads_may_change_at_any_time() -> None:
    """Between the calls of a step, and by another thread while they run."""
    name = "blocks"
    x, y = data(name)
    expected = train_step(network(name)).fit(x, y, epochs=40)
    step, stop = train_step(network(name)), threading.Event()

    def change() -> None:
        while not stop.is_set():
            for threads in (1, 2, 3, 4):
                torch.set_num_threads(threads)

    thread = threading.Thread(target=change)
    thread.start()
    losses = []
    for i in range(40):
        torch.set_num_threads(1 + i % 4)
        losses.append(step(x, y))
    stop.set()
    thread.join()
    torch.testing.assert_close(torch.stack(losses), expected)


# One TrainStep: one call at a time


def steps_of_many(models: list[nn.Module]) -> mlp_ext.TrainSteps:
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    return mlp_ext.TrainSteps(models, nn.MSELoss(), optimizers)


@pytest.mark.parametrize("many", [False, True], ids=["TrainStep", "TrainSteps"])
def test_a_second_call_is_an_error_and_changes_nothing(many: bool) -> None:
    torch.set_num_threads(1)
    x, y = data("blocks")
    model = network("blocks")
    step = steps_of_many([model]) if many else train_step(model)
    step(x, y)  # states are made
    weight = next(model.parameters()).detach()
    before = weight.clone()
    thread = threading.Thread(target=lambda: step.fit(x, y, epochs=300, batch_size=256))
    thread.start()
    while torch.equal(weight, before):  # until fit is running
        time.sleep(1e-4)
    kind = "TrainSteps" if many else "TrainStep"
    told = f"{kind}: another call of it is running; call it from one thread at a time, as under a "
    for _ in range(3):
        with pytest.raises(RuntimeError, match=f"^{told}"):
            step(x, y)
    thread.join()
    twin = network("blocks")
    again = steps_of_many([twin]) if many else train_step(twin)
    again(x, y)
    again.fit(x, y, epochs=300, batch_size=256)
    torch.testing.assert_close([*model.parameters()], [*twin.parameters()], rtol=0, atol=0)


def test_under_a_lock_threads_take_turns() -> None:
    x, y = data("blocks")
    lock, step = threading.Lock(), train_step(network("blocks"), accumulate=2)

    def run(_: int) -> list[Tensor]:
        with lock:
            return [step(x, y) for _ in range(4)]

    losses = [loss for each in in_threads(run) for loss in each]  # type: ignore[attr-defined]
    alone = train_step(network("blocks"), accumulate=2)
    expected = torch.stack([alone(x, y) for _ in losses])
    assert torch.equal(torch.stack(losses).sort().values, expected.sort().values)


# In a parallel region that is not torch's


def test_in_another_parallel_region() -> None:
    """Each thread of the region computes alone, with the right result."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    libraries = [line.split()[-1] for line in maps if "/libgomp" in line]
    # scikit-learn brings one of its own, whose regions torch's does not know.
    openmp = ctypes.CDLL(next((lib for lib in libraries if "/torch/" in lib), libraries[0]))
    x, y = data("blocks")
    torch.set_num_threads(1)
    fused = mlp_ext.fuse(network("blocks"))
    with torch.no_grad():
        expected = fused(x)
    loss = train_step(network("blocks"))(x, y)
    found: list[bool] = []
    models = [network("blocks") for _ in range(3)]

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_: object) -> None:
        step = train_step(models[openmp.omp_get_thread_num()])
        with torch.no_grad():
            found.append(torch.equal(fused(x), expected))
        found.append(torch.equal(step(x, y), loss))

    torch.set_num_threads(3)
    openmp.GOMP_parallel(region, None, 3, 0)
    assert found == [True] * 6
