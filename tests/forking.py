"""What test_processes.py checks in a process of its own: prints {case: whether it is so}."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mlp_ext

THREADS = 3
HANGS = 30  # seconds


def model() -> nn.Sequential:
    """Made without torch's own generator: a child may find its lock held by another thread."""
    first, last = (nn.utils.skip_init(nn.Linear, 64, 64) for _ in range(2))
    made = nn.Sequential(first, nn.ReLU(), last)
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters():
        nn.init.uniform_(p, -0.1, 0.1, generator)
    return made


def computed() -> list[Tensor]:
    """Results of several threads: of native, of a layer's kernels, and of steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 64, generator=generator)
    trained = model()
    step = mlp_ext.TrainStep(
        trained, nn.MSELoss(), torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    )
    loss = step(x, x)
    fused = mlp_ext.fuse(model())
    fused(x).square().mean().backward()
    gradients = [p.grad for p in fused.parameters() if p.grad is not None]
    return [x @ x.T, loss, *(p.detach() for p in trained.parameters()), *gradients]


EXPECTED: list[Tensor] = []


def is_same() -> bool:
    return all(torch.equal(a, b) for a, b in zip(computed(), EXPECTED, strict=True))


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def in_child(check: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        signal.alarm(HANGS)
        code = 1  # whatever check raises: the child must not run the parent's code
        try:
            code = 0 if check() else 1
        except Exception:
            traceback.print_exc()
        os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def of_a_thread() -> bool:
    found = []

    def run() -> None:
        torch.set_num_threads(THREADS)
        found.append(is_same() and in_child(is_same) and is_same())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found == [True]


def beside_a_thread() -> bool:
    stop = threading.Event()

    def run() -> None:
        torch.set_num_threads(THREADS)
        while not stop.is_set():
            computed()

    thread = threading.Thread(target=run)
    thread.start()
    found = [in_child(is_same) for _ in range(3)]
    stop.set()
    thread.join()
    return all(found)


def of_a_running_step() -> bool:
    """The child has a half-made step, and is told so."""
    net, x = model(), torch.rand(4096, 64)
    step = mlp_ext.TrainStep(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1))
    weight = next(net.parameters()).detach()
    before = weight.clone()
    thread = threading.Thread(target=lambda: step.fit(x, x, epochs=300, batch_size=512))

    def is_told() -> bool:
        try:
            step(x, x)
        except RuntimeError as error:
            return "another call of it is running" in str(error)
        return False

    thread.start()
    while thread.is_alive() and torch.equal(weight, before):  # until a step is running
        time.sleep(1e-4)
    found = in_child(is_told)
    thread.join()
    return found


def trained(_: int) -> bool:
    return is_same()


def pool() -> bool:
    with multiprocessing.get_context("fork").Pool(2) as workers:
        return all(workers.map(trained, range(4)))


class Encoded(Dataset[Tensor]):
    """Its items are the outputs of a fused model."""

    def __init__(self) -> None:
        self.model = mlp_ext.fuse(model())

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.model(torch.full((1024, 64), float(index)))
            return found


def workers() -> bool:
    data = Encoded()
    loaded = [batch[0] for batch in DataLoader(data, num_workers=2, timeout=HANGS)]
    return all(
        torch.allclose(batch, data[i], rtol=1e-4, atol=1e-5) for i, batch in enumerate(loaded)
    )


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    EXPECTED[:] = computed()
    cases: dict[str, Callable[[], bool]] = {
        "a child computes the same": lambda: in_child(is_same),
        "each of many children": lambda: all(in_child(is_same) for _ in range(20)),
        "a child uses all threads": lambda: in_child(lambda: is_same() and tasks() >= THREADS),
        "the parent computes on": is_same,
        "a child of a thread": of_a_thread,
        "a child beside a thread that computes": beside_a_thread,
        "a child of a thread whose step runs": of_a_running_step,
        "a child of a child": lambda: in_child(lambda: is_same() and in_child(is_same)),
        "a pool of multiprocessing": pool,
        "workers of a DataLoader": workers,
    }
    print(json.dumps({name: check() for name, check in cases.items()}))
