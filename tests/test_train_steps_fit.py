"""TrainSteps.fit: each network sees the batches it would see alone; Ctrl-C, progress, memory."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from many import Many, Run, assert_like_each_alone, many
from terminals import on_terminal
from torch import Tensor

from mlp_ext import TrainStep, TrainSteps

pytestmark = pytest.mark.usefixtures("one_thread")

close = torch.testing.assert_close


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def fit_together(own: bool = False, rows: list[Tensor] | None = None, **options: Any) -> Run:
    def run(parts: Many) -> Tensor:
        torch.manual_seed(7)
        drawn = generators(len(parts.models)) if own else None
        steps = TrainSteps(*parts[:3])
        return steps.fit(*parts[3:], generators=drawn, rows=rows, **options)

    return run


def fit_alone(own: bool = False, rows: list[Tensor] | None = None, **options: Any) -> Run:
    """Each by TrainStep.fit."""

    def run(parts: Many) -> Tensor:
        losses = []
        for i, each in enumerate(parts.each()):
            torch.manual_seed(7)
            x, y = each[3:] if rows is None else (each.input[rows[i]], each.target[rows[i]])
            drawn = generators(len(parts.models))[i] if own else None
            losses.append(TrainStep(*each[:3]).fit(x, y, generator=drawn, **options))
        return torch.stack(losses, 1)

    return run


def check(parts: Many, **options: Any) -> None:
    epochs, batch_size = options["epochs"], options.get("batch_size") or 10**9
    steps = epochs * -(-parts.input.shape[-2] // batch_size)
    assert_like_each_alone(parts, steps, fit_together(**options), fit_alone(**options))


def random_rows(count: int, lengths: Callable[[int], int]) -> list[Tensor]:
    return [torch.randint(100, (lengths(i),)) for i in range(count)]


def test_generators_without_shuffle_are_not_used() -> None:
    parts = many(3, "10-5-1@10", "mse", "momentum", torch.float32)
    drawn = generators(3)
    before = [g.get_state() for g in drawn]
    check(parts, own=True, epochs=2, batch_size=4, shuffle=False)
    TrainSteps(*parts[:3]).fit(*parts[3:], epochs=2, batch_size=4, generators=drawn)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(drawn, before, strict=True))


@pytest.mark.parametrize("batch_size", [None, 1, 32, 50, 99, 1000])
@pytest.mark.parametrize("order", ["in order", "shuffled", "own generators"])
def test_batches(order: str, batch_size: int | None) -> None:
    parts = many(3, "3-17-5@100", "classes", "momentum", torch.float64)
    shuffle, own = order != "in order", order == "own generators"
    check(parts, epochs=4, batch_size=batch_size, shuffle=shuffle, own=own)


@pytest.mark.parametrize("shuffle", [None, False, True])
@pytest.mark.parametrize(
    "lengths",
    [lambda i: 40, lambda i: 40 + i % 2, lambda i: 7 * i + 1],
    ids=["equal", "folds", "all differ"],
)
@pytest.mark.parametrize("batch_size", [None, 16])
def test_rows_of_each(
    batch_size: int | None, lengths: Callable[[int], int], shuffle: bool | None
) -> None:
    """shuffle: None if by generators of their own."""
    if shuffle and lengths(0) != lengths(1):
        pytest.skip("without generators each number of rows has its permutation")
    parts = many(5, "3-17-5@100", "classes", "adam", torch.float64)
    options = {"batch_size": batch_size, "shuffle": shuffle is not False, "own": shuffle is None}
    check(parts, epochs=3, rows=random_rows(5, lengths), **options)


def test_rows_of_data_of_each() -> None:
    parts = many(4, "3-17-5@100", "mse", "momentum", torch.float64)
    parts = parts._replace(input=torch.randn(4, 100, 3).double())
    rows = random_rows(4, lambda i: 30 + 20 * (i % 2))
    check(parts, epochs=3, batch_size=32, rows=rows, own=True, shuffle=True)
    check(parts, epochs=3, rows=rows)


def test_permutations_are_shared_by_networks_of_as_many_rows() -> None:
    parts = many(4, "10-5-1@10", "mse", "plain", torch.float64)
    rows = [torch.arange(5), torch.arange(5, 10), torch.arange(7), torch.arange(5)]
    alone = deepcopy(parts)
    torch.manual_seed(7)
    TrainSteps(*parts[:3]).fit(*parts[3:], epochs=2, batch_size=3, shuffle=True, rows=rows)
    torch.manual_seed(7)
    for _ in range(2):
        orders = {5: torch.randperm(5), 7: torch.randperm(7)}
        for each, own in zip(alone.each(), rows, strict=True):
            order = own[orders[len(own)]]
            TrainStep(*each[:3]).fit(each.input[order], each.target[order], epochs=1, batch_size=3)
    close(parts.state(), alone.state())


@pytest.mark.parametrize("options", ["dampening", "adam-amsgrad", "rmsprop-centered", "adagrad"])
def test_optimizers_go_on_where_they_stopped(options: str) -> None:
    parts = many(18, "10-5-1@10", "mse", options, torch.float64)
    at_once, in_parts = deepcopy(parts), deepcopy(parts)
    expected = TrainSteps(*at_once[:3]).fit(*at_once[3:], epochs=7, batch_size=3)
    steps = TrainSteps(*in_parts[:3])
    found = [steps.fit(*in_parts[3:], epochs=n, batch_size=3) for n in (1, 2, 4)]
    assert torch.equal(torch.cat(found), expected)
    close(in_parts.state(), at_once.state(), rtol=0, atol=0)


def test_slices_of_networks_epochs_and_batches_change_no_bit() -> None:
    """Work that takes seconds alone, and in many calls, is that of a few short ones."""
    parts = many(70, "33-64-20-7@1000", "classes", "momentum", torch.float32)
    whole = deepcopy(parts)
    found = TrainSteps(*whole[:3]).fit(
        *whole[3:], epochs=3, batch_size=64, shuffle=True, generators=generators(70)
    )
    for i in (0, 33, 69):
        one = deepcopy(parts.chosen([i]))
        own = [generators(70)[i]]
        options = {"batch_size": 64, "shuffle": True, "generators": own}
        losses = [TrainSteps(*one[:3]).fit(*one[3:], epochs=1, **options) for _ in range(3)]
        assert torch.equal(torch.cat(losses)[:, 0], found[:, i])
        close(one.each()[0].state(), whole.each()[i].state(), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses(reduction: str) -> None:
    parts = many(2, "10-5-1@10", "mse", "plain", torch.bfloat16, reduction)
    losses = TrainSteps(*parts[:3]).fit(*parts[3:], epochs=2, batch_size=4)
    assert (losses.shape, losses.dtype, losses.device.type) == ((2, 2), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"^TrainSteps.fit: input has no rows$"):
        TrainSteps(*parts[:3]).fit(parts.input[:0], parts.target[:0], epochs=3)


def test_default_is_fifty_epochs_of_one_batch() -> None:
    parts = many(2, "10-5-1@10", "mse", "momentum", torch.float64)
    once, losses = deepcopy(parts), TrainSteps(*parts[:3]).fit(*parts[3:])
    assert torch.equal(losses, TrainSteps(*once[:3]).fit(*once[3:], epochs=50, batch_size=10))


# --- Progress and Ctrl-C ---


def test_progress_shows_the_lowest_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr("mlp_ext.progress.find_spec", lambda name: None)
    parts = many(3, "10-5-1@10", "mse-linear", "plain", torch.float32)
    with torch.no_grad():
        parts.models[1][0].weight.fill_(torch.nan)
    losses = TrainSteps(*parts[:3]).fit(*parts[3:], epochs=30, progress=True)
    lowest = losses[-1].nan_to_num(torch.inf).min()
    assert terminal.getvalue().endswith(f"epoch: 29 loss: {lowest:.4f}\n")


CTRL_C = """
import os, signal, threading, time
import torch
from torch import nn
import mlp_ext

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
torch.manual_seed(0)
models = [nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1)) for _ in range(100)]
optimizers = [torch.optim.Adam(model.parameters()) for model in models]
steps = mlp_ext.TrainSteps(models, nn.MSELoss(), optimizers)
x, y = torch.randn({rows}, 10), torch.rand({rows}, 1)

def interrupt():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)

thread = threading.Thread(target=interrupt)
thread.start()
try:
    steps.fit(x, y, epochs=10**9, batch_size={batch_size}, shuffle={shuffle})
except KeyboardInterrupt:
    thread.join()
    counts = {{float(s["step"]) for o in optimizers for s in o.state.values()}}
    assert min(counts) > 0
    print("stopped", steps(x[:10], y[:10]).isfinite().all().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "batch_size", "shuffle"), [(10, None, False), (100_000, 10, True)]
)
def test_ctrl_c(rows: int, batch_size: int | None, shuffle: bool) -> None:
    code = CTRL_C.format(rows=rows, batch_size=batch_size, shuffle=shuffle)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "stopped True\n", done.stderr


# --- Memory ---

MEMORY = """
import resource
import torch
from torch import nn
import mlp_ext

torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

def added(count):
    models = [nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1)) for _ in range(count)]
    optimizers = [torch.optim.Adam(model.parameters()) for model in models]
    steps = mlp_ext.TrainSteps(models, nn.MSELoss(), optimizers)
    x, y = torch.randn(20000, 10), torch.rand(20000, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    options = dict(batch_size=2000, shuffle=True, generators=generators)
    steps(x[:10], y[:10])
    before = peak()
    steps.fit(x, y, epochs=4, **options)
    return peak() - before

print(added(64), added(640))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_networks() -> None:
    """Beside the models: 640 networks' permutations of one epoch alone are 98 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=100, check=True
    )
    few, many_ = map(float, re.findall(r"[\d.]+", done.stdout))
    assert many_ < 48, f"{few} MiB with 64 networks, {many_} more with 640"
