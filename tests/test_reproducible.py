"""Bits: the same in each run and, where docs/design-cpu.md says so, for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import mlp_ext
from mlp_ext import _C

THREADS = (1, 2, 3, 4)
LAYERS = {  # M, K, N and the path of backward
    "small": (64, 10, 5, "small"),
    "packed": (300, 300, 130, "packed"),
    "narrow": (16384, 8, 8, "narrow"),
    "tall": (4096, 64, 64, "tall"),
    "one_input": (8192, 1, 64, "one_input"),
    "one_output": (8192, 64, 1, "one_output"),
    "few_rows": (8, 784, 256, "few_rows"),
}
# What does not depend on the number of threads: all, or what is no sum over the threads' pieces.
OUTPUT, DX = 1, 2
SAME = {"small": 4, "packed": 4, "few_rows": OUTPUT}
NETS = {  # widths, rows and the path of the step
    "lanes": ([10, 5, 1], 1 << 15, "lanes"),
    "blocks": ([64, 64, 64], 1024, "blocks"),
    "panels": ([784, 256, 10], 64, "panels"),
    "layers": ([600, 300, 10], 100, "layers"),
}


@pytest.fixture(autouse=True)
def threads_of_torch(zen4: None) -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def layer(name: str, dtype: torch.dtype) -> list[Tensor]:
    """The output and all gradients."""
    M, K, N, _ = LAYERS[name]
    torch.manual_seed(0)
    leaves = [torch.randn(size, dtype=dtype, requires_grad=True) for size in ((M, K), (N, K), (N,))]
    y = mlp_ext.linear_act(*leaves, "tanh")
    y.backward(torch.randn(M, N, dtype=dtype))
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


def trained(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Losses, parameters and states after a few steps."""
    widths, rows, _ = NETS[name]
    torch.manual_seed(0)
    layers = [m for k, n in pairwise(widths) for m in (nn.Linear(k, n), nn.Tanh())]
    model = nn.Sequential(*layers).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    step = mlp_ext.TrainStep(model, nn.MSELoss(), optimizer)
    x, y = torch.randn(rows, widths[0], dtype=dtype), torch.randn(rows, widths[-1], dtype=dtype)
    losses = [step(x, y), step(x, y), step.fit(x, y, epochs=2)]
    states = [t for p in model.parameters() for t in optimizer.state[p].values()]
    return [t.detach() for t in (*losses, *model.parameters(), *states)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_for_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    M, K, N, path = LAYERS[name]
    found = []
    for threads in THREADS:
        if dtype == torch.float32:
            assert _C.plan(M, K, N, 4, threads)["backward_path"] == path
        torch.set_num_threads(threads)
        found.append(layer(name, dtype)[: SAME.get(name, DX)])
    assert all(same(each, found[0]) for each in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_panels_for_any_number_of_threads(dtype: torch.dtype) -> None:
    found = []
    for threads in THREADS:
        assert _C.step_plan([784, 256, 10], 64, dtype.itemsize, threads)["path"] == "panels"
        torch.set_num_threads(threads)
        found.append(trained("panels", dtype))
    assert all(same(each, found[0]) for each in found)


@pytest.mark.parametrize("name", NETS)
def test_steps_are_the_same_in_each_run(name: str) -> None:
    torch.set_num_threads(3)
    widths, rows, path = NETS[name]
    assert _C.step_plan(widths, rows, 4, 3)["path"] == path
    expected = trained(name, torch.float32)
    assert all(same(trained(name, torch.float32), expected) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_algorithms_are_honoured(dtype: torch.dtype) -> None:
    """No error, no other bits, and the same in each run."""
    torch.set_num_threads(3)
    expected = [layer("tall", dtype), trained("blocks", dtype), trained("layers", dtype)]
    torch.use_deterministic_algorithms(True)
    for _ in range(3):
        found = [layer("tall", dtype), trained("blocks", dtype), trained("layers", dtype)]
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
