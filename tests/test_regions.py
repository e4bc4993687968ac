"""Loops that threads share in one parallel region: reproducible, and right beside busy cores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import mlp_ext

NETS = {  # by path of the step; enough rows and widths for several threads
    "blocks": ((64, 64, 64), 1024),
    "panels": ((512, 256, 10), 128),
    "layers": ((600, 300, 10), 100),
}


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    yield
    torch.set_num_threads(before)


def trained(name: str, epochs: int = 4, probability: float = 0.5) -> tuple[Tensor, list[Tensor]]:
    widths, rows = NETS[name]
    torch.manual_seed(0)
    modules = [m for k, n in pairwise(widths) for m in (nn.Linear(k, n), nn.ReLU())]
    model = nn.Sequential(*modules[:-1], nn.Sigmoid())
    step = mlp_ext.TrainStep(
        model, nn.BCELoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    )
    x, y = torch.randn(rows, widths[0]), torch.full((rows, widths[-1]), probability)
    return step.fit(x, y, epochs=epochs), [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", NETS)
def test_bits_do_not_depend_on_timing(name: str, many_threads: None) -> None:
    losses, parameters = trained(name)
    for _ in range(5):
        again, same = trained(name)
        assert torch.equal(again, losses)
        assert all(torch.equal(a, b) for a, b in zip(same, parameters, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_an_error_in_a_thread_leaves_the_next_step_right(name: str, many_threads: None) -> None:
    expected, _ = trained(name)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="between 0 and 1"):
            trained(name, probability=1.5)
        assert torch.equal(trained(name)[0], expected)


def test_several_python_threads_have_regions_of_their_own(many_threads: None) -> None:
    def in_thread(name: str) -> Tensor:
        torch.set_num_threads(7)
        return forward(name)

    def forward(name: str) -> Tensor:
        widths, rows = NETS[name]
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(rows, widths[0], generator=generator)
        w = torch.randn(widths[1], widths[0], generator=generator, requires_grad=True)
        mlp_ext.linear_act(x, w, None, "tanh").sum().backward()
        assert w.grad is not None
        return w.grad

    expected = {name: forward(name) for name in NETS}
    with ThreadPoolExecutor(3) as pool:
        for _ in range(10):
            found = dict(zip(NETS, pool.map(in_thread, NETS), strict=True))
            assert all(torch.equal(found[name], expected[name]) for name in NETS)


BUSY = "import time\nend = time.time() + 60\nprint(flush=True)\nwhile time.time() < end: pass"


def test_beside_busy_cores_the_bits_are_the_same(many_threads: None) -> None:
    expected = {name: trained(name) for name in NETS}
    command = [sys.executable, "-c", BUSY]
    busy = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in busy:
            assert process.stdout is not None
            process.stdout.readline()  # it has started
        for name, (losses, parameters) in expected.items():
            again, same = trained(name)
            assert torch.equal(again, losses)
            assert all(torch.equal(a, b) for a, b in zip(same, parameters, strict=True))
    finally:
        for process in busy:
            process.kill()
            process.communicate()
