"""The training loop of `mlp-ext train`, the same for every kind."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mlp_ext.bench.training import LAYERS, LOSSES, OPTIMIZERS, Step
from mlp_ext.commands.data import Dataset
from mlp_ext.commands.distributed import ALONE, Processes
from mlp_ext.fitting import Best

# A turn is a group of epochs if they are short: `fit` runs it in one call.
GROUP_SECONDS = 1e-3  # of the fastest kind
TURNS = 3  # at least, for a median


class Validation:
    """Losses and accuracies on held-out rows after each epoch, and the best epoch so far."""

    def __init__(
        self,
        model: nn.Module,
        rows: tuple[Tensor, Tensor],
        loss: str,
        classes: int,
        patience: int | None,
        processes: Processes,
    ) -> None:
        self.rows, self._model, self._loss, self._processes = rows, model, loss, processes
        self.losses: list[float] = []
        self.accuracies: list[float] = []  # none if the targets are not labels
        self._classes = classes
        self.best = Best(model, patience, restore=True)
        self.has_ended = False

    def __call__(self) -> None:
        """Computes and adds those of an epoch."""
        x, y = self.rows
        with torch.no_grad():
            output = self._model(x)
            loss = LOSSES[self._loss].criterion()(output, y).item()
        self.add(self._processes.mean(loss), self.metric(output, y))

    def metric(self, output: Tensor, y: Tensor) -> float:
        return float(share_correct(output, y, self._loss)) if self._classes else math.nan

    def add(self, loss: float, accuracy: float) -> bool:
        """Whether training should end."""
        self.losses.append(loss)
        self.accuracies += [accuracy] * bool(self._classes)
        self.has_ended = self.best.update(len(self.losses) - 1, loss)
        return self.has_ended


@dataclass
class TrainingRun:
    """A model in training in one of the ways of LAYERS."""

    kind: str
    model: nn.Module
    step: Step
    losses: list[float] = field(default_factory=list)  # per epoch
    seconds: list[float] = field(default_factory=list)  # per epoch, the mean of its group
    generator: torch.Generator = field(default_factory=torch.Generator)  # shuffles the rows
    validation: Validation | None = None

    @property
    def has_ended(self) -> bool:
        """Before its epochs have."""
        return self.validation is not None and self.validation.has_ended


def start(
    kind: str,
    model: nn.Module,
    lr: float,
    loss: str = "mse",
    optimizer: str = "sgd",
    seed: int = 0,
    processes: Processes = ALONE,
    weight_decay: float | None = None,
) -> TrainingRun:
    """A run with this row of LAYERS on a copy of `model`; `seed` shuffles the rows."""
    layers = LAYERS[kind]
    model = processes.wrap(layers.change(deepcopy(model)))
    criterion = LOSSES[loss].criterion()
    step = layers.step(model, criterion, make_optimizer(model, optimizer, lr, weight_decay))
    return TrainingRun(kind, model, step, generator=torch.Generator().manual_seed(seed))


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float | None = None
) -> torch.optim.Optimizer:
    """The row `name` of OPTIMIZERS; None is the optimizer's own weight decay."""
    options = {} if weight_decay is None else {"weight_decay": weight_decay}
    return OPTIMIZERS[name](model.parameters(), lr=lr, **options)


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
    weight_decay: float | None = None,
    processes: Processes = ALONE,
    validation: tuple[Tensor, Tensor] | None = None,
    patience: int | None = None,
) -> Iterator[list[TrainingRun]]:
    """Trains a copy of `model` with each of `kinds`; yields their runs after each group of epochs.

    loss, optimizer: names in LOSSES and OPTIMIZERS. All kinds see the same batches, shuffled with
    `seed` in each epoch unless there is only one; the last batch may be smaller. A loss is the mean
    over an epoch's rows, computed before the update of each batch. The kinds take turns, so that
    drift affects all of them. A turn is an epoch; or, if epochs are short, as many as take the
    fastest kind GROUP_SECONDS, after two steps on a copy that warm up the caches.

    Each of several `processes` takes its part of each batch; the losses are those of one process.

    validation: rows on which the loss is computed after each epoch. A run ends after `patience`
    epochs in which it was not lower than before, and gets the weights of its best epoch at the end.
    """
    options = (model, lr, loss, optimizer, seed, processes, weight_decay)
    first_batch = replace(data, x=data.x[:batch_size], y=data.y[:batch_size])
    seconds = []  # of a step of each kind, on a copy
    for kind in kinds:
        copy = start(kind, *options)
        for _ in range(2):  # the first time sets up
            _train(copy, first_batch, 2, batch_size, processes)
        seconds.append(copy.seconds[-1])
    epoch = processes.mean(min(seconds)) * math.ceil(len(data.x) / batch_size)
    count = max(1, min(int(GROUP_SECONDS / epoch), math.ceil(epochs / TURNS)))

    runs = [start(kind, *options) for kind in kinds]
    for run in runs if validation else ():
        about = (loss, data.classes, patience, processes)
        run.validation = Validation(run.model, validation, *about)  # type: ignore[arg-type]
    copies = [start(kind, *options) for kind in kinds] if count > 1 else []
    for turn, done in enumerate(range(0, epochs, count)):
        for place in range(turn, turn + len(runs)):
            if copies:
                _train(copies[place % len(runs)], first_batch, 2, batch_size, processes)
            run = runs[place % len(runs)]
            if not run.has_ended:
                _train(run, data, min(count, epochs - done), batch_size, processes)
        is_last = done + count >= epochs or all(run.has_ended for run in runs)
        for run in runs if is_last else ():
            if run.validation:
                run.validation.best.put_back()
        yield runs
        if is_last:
            return


def _train(
    run: TrainingRun, data: Dataset, epochs: int, batch_size: int, processes: Processes
) -> None:
    """Trains for some epochs and appends to the run's losses and seconds."""
    started, validation = _now(data), run.validation
    if run.kind == "fit":
        options: dict[str, Any] = {"shuffle": batch_size < len(data.x), "generator": run.generator}
        if validation:  # patience goes on over the calls
            options |= {"validation": validation.rows, "metric": validation.metric}
            options |= {"on_epoch": lambda epoch, loss, *found: validation.add(*found)}
            options |= {"restore_best": False}
        fit = run.step.fit  # type: ignore[attr-defined]
        found = fit(data.x, data.y, epochs, batch_size, **options)
        seconds = _now(data) - started
        run.losses += (found.losses if validation else found).tolist()
    else:
        steps = []
        for _ in range(epochs):
            batches = _batches(data, batch_size, run.generator)
            parts = ((processes.part(x), processes.part(y), len(x)) for x, y in batches)
            steps.append([(run.step(x, y), rows) for x, y, rows in parts])
            if validation:
                validation()
            if run.has_ended:
                break
        seconds = _now(data) - started
        for epoch in steps:
            total = sum(loss.item() * rows for loss, rows in epoch)
            run.losses.append(processes.mean(total / len(data.x)))
    count = len(run.losses) - len(run.seconds)
    run.seconds += count * [seconds / count]


def accuracy(model: nn.Module, x: Tensor, y: Tensor, loss: str = "mse") -> float:
    """The accuracy of `model`, trained with `loss`, on rows x [n, K]; NaN if there are none.

    The classes y are [n, 1] of 0 and 1, or [n, N] one-hot.
    """
    with torch.no_grad():
        return float(share_correct(model(x), y, loss))


def share_correct(output: Tensor, y: Tensor, loss: str = "mse") -> Tensor:
    """The accuracy [*] of outputs [*, n, N]."""
    threshold = 0 if LOSSES[loss].last is nn.Identity else 0.5
    if y.shape[1] == 1:
        found = ((output > threshold) == (y > 0.5)).squeeze(-1)
    else:
        found = output.argmax(-1) == y.argmax(-1)
    return found.double().mean(-1)


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
    data: Dataset, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, unless there is only one."""
    x, y = data.x, data.y
    if size >= len(x):
        return iter([(x, y)])
    order = torch.randperm(len(x), generator=generator).to(x.device)
    return zip(x[order].split(size), y[order].split(size), strict=True)


def _now(data: Dataset) -> float:
    """The time in seconds, after synchronizing the data's device."""
    if data.x.is_cuda:
        torch.cuda.synchronize(data.x.device)
    return time.perf_counter()
