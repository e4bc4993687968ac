"""The one training loop of the demo, the same for every kind of layer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mlp_ext.bench.training import LAYERS, LOSSES, OPTIMIZERS, Step, make_mlp, sgd_step
from mlp_ext.commands.data import Dataset

__all__ = ["LAYERS", "Step", "TrainingRun", "accuracy", "make_mlp", "sgd_step", "start", "train"]


@dataclass
class TrainingRun:
    """A model in training with one kind of layer."""

    kind: str
    model: nn.Module
    step: Step
    losses: list[float] = field(default_factory=list)  # per epoch
    seconds: list[float] = field(default_factory=list)  # per epoch, in the training steps alone


def start(
    kind: str, model: nn.Sequential, lr: float, loss: str = "mse", optimizer: str = "sgd"
) -> TrainingRun:
    """A run of that row of LAYERS on a copy of `model`."""
    model = deepcopy(model)
    criterion = LOSSES[loss].criterion()
    step = LAYERS[kind](model, criterion, OPTIMIZERS[optimizer](model.parameters(), lr=lr))
    return TrainingRun(kind, model, step)


def train(
    kinds: Sequence[str],
    model: nn.Sequential,
    data: Dataset,
    *,
    epochs: int,
    lr: float = 0.01,
    batch_size: int = 10,
    seed: int = 0,
    loss: str = "mse",
    optimizer: str = "sgd",
) -> Iterator[list[TrainingRun]]:
    """Train a copy of `model` with each of `kinds`; yields their runs after every epoch.

    loss, optimizer: names in LOSSES and OPTIMIZERS. All see the same batches, drawn anew by `seed`
    each epoch, the last one maybe smaller; a data set of one batch keeps its order. A loss is the
    mean over an epoch's rows, each taken before the update of its batch. The kinds run in turn
    within an epoch, so that a drifting machine affects all alike, and each is first in turn, since
    the first finds the caches cold.
    """
    for kind in kinds:  # warm up, on a copy to throw away
        start(kind, model, lr, loss, optimizer).step(data.x[:batch_size], data.y[:batch_size])

    runs = [start(kind, model, lr, loss, optimizer) for kind in kinds]
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        batches = _batches(data, batch_size, generator)
        first = epoch % len(runs)
        for run in runs[first:] + runs[:first]:
            started = _now(data)
            losses = [run.step(x, y) for x, y in batches]
            run.seconds.append(_now(data) - started)
            sums = [loss.item() * len(x) for loss, (x, _) in zip(losses, batches, strict=True)]
            run.losses.append(sum(sums) / len(data.x))
        yield runs


def accuracy(model: nn.Module, x: Tensor, y: Tensor, loss: str = "mse") -> float:
    """The share of rows x [n, K] whose class `model`, trained with `loss`, finds; NaN for no rows.

    The classes y are [n, 1] of 0 and 1, or [n, N] one-hot.
    """
    with torch.no_grad():
        output = model(x)
    threshold = 0 if LOSSES[loss].last is nn.Identity else 0.5
    found = (
        (output > threshold) == (y > 0.5) if y.shape[1] == 1 else output.argmax(1) == y.argmax(1)
    )
    return float(found.double().mean())


def _batches(
    data: Dataset, size: int, generator: torch.Generator | None = None
) -> list[tuple[Tensor, Tensor]]:
    x, y = data.x, data.y
    if generator and size < len(x):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        x, y = x[order], y[order]
    return list(zip(x.split(size), y.split(size), strict=True))


def _now(data: Dataset) -> float:
    """Seconds, after all work on the data's device is done."""
    if data.x.is_cuda:
        torch.cuda.synchronize(data.x.device)
    return time.perf_counter()
