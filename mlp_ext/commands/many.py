"""The training loop of `mlp-ext sweep`: networks of one structure train together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, product
from math import ceil
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlp_ext.bench.training import LOSSES, make_mlp
from mlp_ext.commands.data import Dataset
from mlp_ext.commands.loop import TrainingRun, make_optimizer, share_correct, train
from mlp_ext.predict import predict
from mlp_ext.train_steps import TrainSteps

EVALUATIONS = 10  # about, of a curve; as often the progress is told
TOGETHER = 2**26  # Parameters' elements of the networks that are in memory at a time
# The networks that are timed one after another.
TIMED_SECONDS = 0.3  # each
TIMED_EPOCHS = 1000  # at most, in turn; their median is the time where other programs run too
TIMED_STEPS = 50  # in an epoch, at most
TIMED_LR = 1e-6  # at which none diverges


class Setting(NamedTuple):
    hidden: tuple[int, ...]
    batch_size: int
    lr: float
    weight_decay: float | None  # None: the optimizer's


class Network(NamedTuple):
    setting: Setting
    seed: int
    fold: int | None


class Held(NamedTuple):
    """Results on the held-out rows after some epochs."""

    epochs: int
    accuracy: float  # NaN if there are no classes
    loss: float


class Result(NamedTuple):
    network: Network
    train_loss: float  # of the last epoch
    held: tuple[Held, ...]  # the last one after the last epoch

    @property
    def accuracy(self) -> float:
        return self.held[-1].accuracy

    @property
    def loss(self) -> float:
        return self.held[-1].loss


@dataclass(frozen=True)
class Sweep:
    """What all networks share."""

    data: Dataset
    folds: int | None
    activation: str
    loss: str
    optimizer: str
    epochs: int
    seed: int = 0  # draws the folds
    curves: bool = False  # whether to evaluate during the training too

    @cached_property
    def parts(self) -> dict[int | None, tuple[Tensor, Tensor]]:
        """By fold: the rows of the data to train on, and those held out, sorted.

        Each fold has nearly the same number of rows, and of rows of each class.
        """
        if self.folds is None:
            return {}
        data = self.data
        rows = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(self.seed))
        if data.classes:
            labels = (data.y if data.y.shape[1] == 1 else data.y.argmax(1, True)).squeeze(1)
            rows = rows[labels.cpu().long()[rows].argsort(stable=True)]
        held = [rows[fold :: self.folds].sort().values for fold in range(self.folds)]
        used = torch.ones(len(held), len(rows), dtype=torch.bool)
        for fold, out in enumerate(held):
            used[fold, out] = False
        return {fold: (used[fold].nonzero().squeeze(1), out) for fold, out in enumerate(held)}

    def rows(self, fold: int | None) -> int:
        """The number of rows that a network trains on."""
        return len(self.data.x) if fold is None else len(self.parts[fold][0])

    def held_out(self, fold: int | None) -> tuple[Tensor, Tensor]:
        """Features and targets."""
        if fold is None:
            return self.data.x_test, self.data.y_test
        rows = self.parts[fold][1].to(self.data.x.device)
        return self.data.x[rows], self.data.y[rows]

    def model(self, network: Network) -> nn.Sequential:
        """With the initial weights of its seed, as `mlp-ext train` has them."""
        data = self.data
        last = nn.Identity if data.is_number else LOSSES[self.loss].last
        widths = [data.x.shape[1], *network.setting.hidden, data.y.shape[1]]
        return make_mlp(widths, network.seed, self.activation, last).to(data.x.device, data.x.dtype)

    def criterion(self) -> nn.Module:
        return LOSSES[self.loss].criterion()


def networks(settings: Iterable[Setting], seeds: Iterable[int], folds: int | None) -> list[Network]:
    parts: Iterable[int | None] = [None] if folds is None else range(folds)
    return [Network(*rest) for rest in product(settings, seeds, parts)]


def structures(networks: Iterable[Network]) -> Iterator[list[Network]]:
    """Those of one structure and batch size, which are neighbours."""
    for _, group in groupby(networks, lambda n: (n.setting.hidden, n.setting.batch_size)):
        yield list(group)


def train_many(
    sweep: Sweep, networks: Sequence[Network], progress: Callable[[int], object]
) -> tuple[list[Result], float]:
    """Trains all; also returns the seconds in TrainSteps.fit.

    Calls progress(epochs) with the number of epochs of a network done since.
    """
    results: list[Result] = []
    seconds = 0.0
    for group in structures(networks):
        size = sum(parameter.numel() for parameter in sweep.model(group[0]).parameters())
        count = max(1, TOGETHER // size)
        for start in range(0, len(group), count):
            found, took = _train(sweep, group[start : start + count], progress)
            results += found
            seconds += took
    return results, seconds


def _train(
    sweep: Sweep, networks: Sequence[Network], progress: Callable[[int], object]
) -> tuple[list[Result], float]:
    """Of one structure and batch size."""
    data, (_, batch_size, *_) = sweep.data, networks[0].setting
    models = [sweep.model(network) for network in networks]
    optimizers = [
        make_optimizer(model, sweep.optimizer, n.setting.lr, n.setting.weight_decay)
        for model, n in zip(models, networks, strict=True)
    ]
    steps = TrainSteps(models, sweep.criterion(), optimizers)
    rows = [sweep.parts[n.fold][0] for n in networks if n.fold is not None] or None
    shuffle = batch_size < max(sweep.rows(network.fold) for network in networks)
    seeds = [network.seed for network in networks] if shuffle else []
    generators = [torch.Generator().manual_seed(seed) for seed in seeds] or None
    held: list[list[Held]] = [[] for _ in networks]
    chunk, done, seconds = ceil(sweep.epochs / EVALUATIONS), 0, 0.0
    while done < sweep.epochs:
        epochs = min(chunk, sweep.epochs - done)
        started = time.perf_counter()
        losses = steps.fit(data.x, data.y, epochs, batch_size, shuffle, generators, rows)
        seconds += time.perf_counter() - started
        done += epochs
        if sweep.curves or done == sweep.epochs:
            for network, found in _evaluate(sweep, networks, models, done):
                held[network].append(found)
        progress(epochs * len(networks))
    last = losses[-1].tolist()
    results = [
        Result(network, loss, tuple(found))
        for network, loss, found in zip(networks, last, held, strict=True)
    ]
    return results, seconds


def _evaluate(
    sweep: Sweep, networks: Sequence[Network], models: Sequence[nn.Module], epochs: int
) -> Iterator[tuple[int, Held]]:
    """The index of each network, and what it has on its held-out rows."""
    criterion = sweep.criterion()
    for fold in dict.fromkeys(network.fold for network in networks):
        chosen = [i for i, network in enumerate(networks) if network.fold == fold]
        x, y = sweep.held_out(fold)
        outputs = predict([models[i] for i in chosen], x)
        correct = outputs.new_full(outputs.shape[:1], torch.nan, dtype=torch.float64)
        if sweep.data.classes:
            correct = share_correct(outputs, y, sweep.loss)
        for i, accuracy, output in zip(chosen, correct.tolist(), outputs, strict=True):
            yield i, Held(epochs, accuracy, _loss(criterion, output, y))


def _loss(criterion: nn.Module, output: Tensor, y: Tensor) -> float:
    if not output.isfinite().all():  # BCELoss refuses them
        return torch.nan
    return float(criterion(output, y))


def one_after_another(sweep: Sweep, networks: Sequence[Network]) -> dict[str, float]:
    """About how many seconds the networks take one after another, with torch ("native") and with
    TrainStep.fit ("fit"): the median epoch of one network of each structure, by its steps."""
    total = {"native": 0.0, "fit": 0.0}
    for group in structures(networks):
        first, batch_size = group[0], group[0].setting.batch_size
        count = min(sweep.rows(first.fold), TIMED_STEPS * batch_size)
        data = replace(sweep.data, x=sweep.data.x[:count], y=sweep.data.y[:count])
        steps = sum(ceil(sweep.rows(n.fold) / batch_size) for n in group) * sweep.epochs
        for run in _timed(sweep, first, data):
            total[run.kind] += steps * median(run.seconds) / ceil(count / batch_size)
    return total


def _timed(sweep: Sweep, network: Network, data: Dataset) -> list[TrainingRun]:
    """Trained for a while with each kind in turn."""
    setting = network.setting
    epochs = train(
        ("native", "fit"),
        sweep.model(network),
        data,
        epochs=TIMED_EPOCHS,
        lr=TIMED_LR,
        batch_size=setting.batch_size,
        loss=sweep.loss,
        optimizer=sweep.optimizer,
        weight_decay=setting.weight_decay,
    )
    for runs in epochs:
        if sum(sum(run.seconds) for run in runs) > TIMED_SECONDS:
            break
    return runs
