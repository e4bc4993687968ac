"""The one training loop: stochastic gradient descent, the same for every kind of layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from mlp_ext.commands.data import Dataset
from mlp_ext.fuse import fuse
from mlp_ext.train_step import TrainStep

Step = Callable[[Tensor, Tensor], Tensor]  # input [M, K], target [M, N] -> loss []


def sgd_step(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """The training step as everyone writes it."""

    def step(input: Tensor, target: Tensor) -> Tensor:
        # forward
        loss: Tensor = criterion(model(input), target)
        # backward
        optimizer.zero_grad()
        loss.backward()
        # update
        optimizer.step()
        return loss.detach()

    return step


# How a model of torch.nn, its loss and its optimizer become a training step. The step works on the
# model's own Parameters. Another kind of layer is another row.
LAYERS: dict[str, Callable[[nn.Sequential, nn.Module, torch.optim.Optimizer], Step]] = {
    "native": sgd_step,
    "fused": lambda model, *rest: sgd_step(fuse(model, level="layers"), *rest),
    "stack": lambda model, *rest: sgd_step(fuse(model, level="stack"), *rest),
    "step": TrainStep,
}


def make_mlp(widths: Sequence[int], seed: int = 0) -> nn.Sequential:
    """Linear layers of these widths, input first, with ReLU between and Sigmoid at the end.

    float32 on the CPU, the same initial weights for the same seed; torch's own random state stays
    as it was. Raises ValueError for fewer than two widths.
    """
    if len(widths) < 2:
        raise ValueError(f"make_mlp: widths must name input and output, got {list(widths)}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = [m for k, n in pairwise(widths) for m in (nn.Linear(k, n), nn.ReLU())]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


@dataclass
class Run:
    """A model in training with one kind of layer."""

    kind: str
    model: nn.Module
    step: Step
    losses: list[float] = field(default_factory=list)  # per epoch
    seconds: list[float] = field(default_factory=list)  # per epoch, in the training steps alone


def start(kind: str, model: nn.Sequential, lr: float) -> Run:
    """A run of that row of LAYERS on a copy of `model`, with MSELoss and plain SGD."""
    model = deepcopy(model)
    step = LAYERS[kind](model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=lr))
    return Run(kind, model, step)


def train(
    kinds: Sequence[str],
    model: nn.Sequential,
    data: Dataset,
    *,
    epochs: int,
    lr: float = 0.01,
    batch_size: int = 10,
    seed: int = 0,
) -> Iterator[list[Run]]:
    """Train a copy of `model` with each of `kinds`; yields their runs after every epoch.

    All see the same batches, drawn anew by `seed` each epoch, the last one maybe short; a data set
    of one batch stays in its order. A loss is the mean over an epoch's rows, each taken before the
    update of its batch. The kinds run in turn within an epoch, so that a drifting machine moves all
    alike, and each is first in turn, since the first finds the caches cold: it was 2 to 8 % slower
    on the tutorial's data.
    """
    for kind in kinds:  # warm up, on a copy to throw away
        start(kind, model, lr).step(data.x[:batch_size], data.y[:batch_size])

    runs = [start(kind, model, lr) for kind in kinds]
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


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of rows x [n, K] whose class `model` finds; NaN for no rows.

    The classes y are [n, 1] of 0 and 1, or [n, N] one-hot.
    """
    with torch.no_grad():
        output = model(x)
    found = (output > 0.5) == (y > 0.5) if y.shape[1] == 1 else output.argmax(1) == y.argmax(1)
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
    """Seconds, once all that was started on the data's device is done."""
    if data.x.is_cuda:
        torch.cuda.synchronize(data.x.device)
    return time.perf_counter()
