"""The demo's training loop, the same for every kind of layer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlp_ext.bench.training import LAYERS, LOSSES, OPTIMIZERS, Step, make_mlp, sgd_step
from mlp_ext.commands.data import Dataset
from mlp_ext.commands.distributed import ALONE, Processes

__all__ = [
    "LAYERS",
    "Step",
    "TrainingRun",
    "accuracy",
    "make_mlp",
    "sgd_step",
    "start",
    "test_loss",
    "train",
    "unscaled_state",
]


@dataclass
class TrainingRun:
    """A model in training with one kind of layer."""

    kind: str
    model: nn.Module
    step: Step
    losses: list[float] = field(default_factory=list)  # per epoch
    seconds: list[float] = field(default_factory=list)  # per epoch, training steps only


def start(
    kind: str,
    model: nn.Module,
    lr: float,
    loss: str = "mse",
    optimizer: str = "sgd",
    processes: Processes = ALONE,
) -> TrainingRun:
    """A run with this row of LAYERS on a copy of `model`."""
    layers = LAYERS[kind]
    model = processes.wrap(layers.change(deepcopy(model)))
    criterion = LOSSES[loss].criterion()
    step = layers.step(model, criterion, OPTIMIZERS[optimizer](model.parameters(), lr=lr))
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
    processes: Processes = ALONE,
) -> Iterator[list[TrainingRun]]:
    """Trains a copy of `model` with each of `kinds`; yields their runs after every epoch.

    loss, optimizer: names in LOSSES and OPTIMIZERS. All kinds see the same batches, shuffled with
    `seed` in each epoch unless there is only one; the last batch may be smaller. A loss is the mean
    over an epoch's rows, computed before the update of each batch. The kinds run in turn within an
    epoch, so that drift affects all of them, and rotate, since the first one has cold caches.

    Each of several `processes` takes its part of each batch; the losses are those of one process.
    """
    first_batch = processes.part(data.x[:batch_size]), processes.part(data.y[:batch_size])
    for kind in kinds:  # warm up on a copy
        start(kind, model, lr, loss, optimizer, processes).step(*first_batch)

    runs = [start(kind, model, lr, loss, optimizer, processes) for kind in kinds]
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        batches = _batches(data, batch_size, generator)
        parts = [(processes.part(x), processes.part(y)) for x, y in batches]
        first = epoch % len(runs)
        for run in runs[first:] + runs[:first]:
            started = _now(data)
            losses = [run.step(x, y) for x, y in parts]
            run.seconds.append(_now(data) - started)
            sums = [loss.item() * len(x) for loss, (x, _) in zip(losses, batches, strict=True)]
            run.losses.append(processes.mean(sum(sums) / len(data.x)))
        yield runs


def accuracy(model: nn.Module, x: Tensor, y: Tensor, loss: str = "mse") -> float:
    """The accuracy of `model`, trained with `loss`, on rows x [n, K]; NaN if there are none.

    The classes y are [n, 1] of 0 and 1, or [n, N] one-hot.
    """
    with torch.no_grad():
        output = model(x)
    threshold = 0 if LOSSES[loss].last is nn.Identity else 0.5
    found = (
        (output > threshold) == (y > 0.5) if y.shape[1] == 1 else output.argmax(1) == y.argmax(1)
    )
    return float(found.double().mean())


def test_loss(model: nn.Module, data: Dataset, loss: str = "mse") -> float:
    """The loss of `model` on the test rows."""
    with torch.no_grad():
        return float(LOSSES[loss].criterion()(model(data.x_test), data.y_test))


def unscaled_state(model: nn.Module, data: Dataset) -> dict[str, Any]:
    """The state_dict, on the CPU, of the MLP that takes features and predicts targets unscaled;
    float64 if that is the model's dtype, else float32.

    With several processes, all must call it, and the first one gets the tensors.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    layers = [name.removesuffix("weight") for name in state if name.endswith("weight")]
    unscaled = {name: value.double() for name, value in state.items()}
    for layer in layers[:1]:  # W (x - mean) / std + b = (W / std) x + (b - (W / std) mean)
        unscaled[f"{layer}weight"] /= data.std
        unscaled[f"{layer}bias"] -= (unscaled[f"{layer}weight"] * data.mean).sum(1)
    for layer in layers[-1:]:
        unscaled[f"{layer}weight"] *= data.y_std
        unscaled[f"{layer}bias"] *= data.y_std
        unscaled[f"{layer}bias"] += data.y_mean
    # 16 bits are too few for a bias that holds means.
    return {
        name: value.to(torch.promote_types(state[name].dtype, torch.float32))
        for name, value in unscaled.items()
    }


def _batches(
    data: Dataset, size: int, generator: torch.Generator | None = None
) -> list[tuple[Tensor, Tensor]]:
    x, y = data.x, data.y
    if generator and size < len(x):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        x, y = x[order], y[order]
    return list(zip(x.split(size), y.split(size), strict=True))


def _now(data: Dataset) -> float:
    """The time in seconds, after synchronising the data's device."""
    if data.x.is_cuda:
        torch.cuda.synchronize(data.x.device)
    return time.perf_counter()
