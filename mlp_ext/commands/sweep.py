"""What `mlp-ext sweep` does: its table, the best setting, and its files."""

from __future__ import annotations

import argparse
import csv
import math
import shlex
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mlp_ext.bench.machine import cpus, other_cpus
from mlp_ext.bench.noise import busy
from mlp_ext.bench.rows import as_time, replacing
from mlp_ext.commands import arguments, plots
from mlp_ext.commands.data import Dataset
from mlp_ext.commands.distributed import Processes, sharing
from mlp_ext.commands.many import (
    Network,
    Result,
    Setting,
    Sweep,
    networks,
    one_after_another,
    structures,
    train_many,
)
from mlp_ext.commands.progress import Bar
from mlp_ext.commands.summary import WIDTH, aligned, moments

MOST = 10**6  # networks
SHORTEST = 1.0  # seconds; the system's clock ticks are too coarse to judge less

AXES = {"hidden": "hidden", "batch_size": "batch size", "lr": "lr", "weight_decay": "weight decay"}


@dataclass(frozen=True)
class Metric:
    """What the settings are compared by on the held-out rows."""

    name: str  # of a field of Held
    heading: str
    format: Callable[[float], str]
    sign: int  # -1: less is better

    @property
    def text(self) -> str:
        return f"held-out {self.name}"


ACCURACY = Metric("accuracy", "held-out acc", "{:.1%}".format, 1)
LOSS = Metric("loss", "held-out loss", "{:.4f}".format, -1)


@dataclass(frozen=True)
class Outcome:
    """The networks of a setting."""

    setting: Setting
    results: Sequence[Result]

    def moments(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of a field of Result."""
        return moments([getattr(result, name) for result in self.results])

    def mean(self, name: str) -> float:
        return self.moments(name)[0]


def run(args: argparse.Namespace) -> None:
    source = arguments.source(args)
    arguments.check_files(args, data=source, plot=args.plot, results=args.results)
    if args.results:
        _check_results(args.results, args.fail)
    arguments.check_training(args)
    count = math.prod(len(getattr(args, axis)) for axis in AXES) * args.seeds * (args.folds or 1)
    if count > MOST:
        args.fail(f"{count} networks are too many; at most {MOST} are trained")
    with sharing(args.device, args.fail) as processes:
        _sweep_in(processes, args, source)


def _check_results(path: Path, fail: arguments.Fail) -> None:
    """Fails if the file may be the user's data, which the results would replace."""
    if path.exists() and path.stat().st_size:
        with path.open(errors="replace") as file:
            if not file.readline().startswith(f"{','.join(AXES)},seed,fold,"):
                what = f"'{path}' has no results of a sweep, which would replace it"
                fail(f"argument --results: {what}; to train on it: --data {path} --target COLUMN")


def _sweep_in(processes: Processes, args: argparse.Namespace, source: Path | None) -> None:
    data = arguments.read_data(args, source)
    if args.loss is None:
        args.loss = _usual_loss(data)
    arguments.check_loss(args, data)
    if args.folds is None and not len(data.x_test):
        args.fail(f"argument --data: {data.name} has no rows to hold out; add --folds")
    if args.folds and args.folds > len(data.x):
        args.fail(f"argument --folds: {data.name} has {len(data.x)} rows, got {args.folds}")
    settings = [Setting(*values) for values in product(*(getattr(args, axis) for axis in AXES))]
    every = networks(settings, range(args.seed, args.seed + args.seeds), args.folds)
    varying = [axis for axis in AXES if len(getattr(args, axis)) > 1]
    common = (args.activation, args.loss, args.optimizer, args.epochs, args.seed)
    sweep = Sweep(data, args.folds, *common, curves=bool(args.plot) and len(varying) < 2)
    for group in structures(every):
        try:
            sweep.model(group[0])
        except RuntimeError as error:  # out of memory
            args.fail(f"argument --hidden: {str(error).splitlines()[0]}")

    shown = processes.rank == 0 and not args.quiet
    title = _title(args, sweep, every, processes.count)
    if shown:
        lines = [textwrap.fill(line, WIDTH) for line in title.splitlines()]
        print(*lines, "", sep="\n", flush=True)
    others, started = other_cpus(), time.perf_counter()
    mine = every[processes.rank :: processes.count]
    with Bar(len(mine) * args.epochs, shown) as bar:
        try:
            found, seconds = train_many(sweep, mine, bar.advance)
        except RuntimeError as error:
            what = str(error).splitlines()[0]
            if "between 0 and 1" in what:  # the targets are
                what = "bce: a network's outputs are not finite"
                args.fail(f"argument --loss: {what}; use a smaller --lr or bce_with_logits")
            args.fail(what)  # out of memory
    results = processes.gather(found)
    if processes.rank:
        return

    outcomes = _outcomes(settings, every, results)
    metric = ACCURACY if data.classes else LOSS
    best = _best(outcomes, metric)
    print(*_table(outcomes, best, metric, varying), "", sep="\n", flush=True)
    try:
        if args.results:
            with replacing(args.results) as path:
                _write_csv(path, outcomes)
        if args.plot:
            with replacing(args.plot) as path:
                _figure(outcomes, best, metric, varying, title).savefig(path)
    except OSError as error:
        args.fail(str(error))
    alone = one_after_another(sweep, every)
    noise, elapsed = "", time.perf_counter() - started
    if args.device == "cpu" and processes.count == 1 and elapsed > SHORTEST:
        noise = busy(others(), torch.get_num_threads(), len(cpus()))
    print(*_times(every, seconds, alone, noise), *_advice(args, source, best, metric), sep="\n")


def _usual_loss(data: Dataset) -> str:
    if not data.classes:
        return "mse"
    return "bce_with_logits" if data.y.shape[1] == 1 else "cross_entropy"


def _title(args: argparse.Namespace, sweep: Sweep, every: Sequence[Network], processes: int) -> str:
    data = sweep.data
    held = f"in {args.folds} folds" if args.folds else f"and {len(data.x_test)} held out"
    threads = torch.get_num_threads()
    place = f"{threads} CPU thread{'s' * (threads > 1)}" if args.device == "cpu" else args.device
    inputs, outputs = data.x.shape[1], data.y.shape[1]
    nets = ", ".join(f"{inputs}-{_value(hidden)}-{outputs}" for hidden in args.hidden)
    nets = f"network{'s' * (len(args.hidden) > 1)} {nets}"
    counts = {**{AXES[axis]: len(getattr(args, axis)) for axis in AXES}, "seeds": args.seeds}
    counts["folds"] = args.folds or 1
    factors = [f"{n} {name}" for name, n in counts.items() if n > 1]
    of = f": {' x '.join(factors)}" if len(factors) > 1 else ""
    title = (
        f"{data.name}: {len(data.x)} rows {held}, {inputs} features\n"
        f"{nets}, {args.activation}; {args.dtype} on {place}\n"
        f"{args.loss}, {args.optimizer}, {args.epochs} epochs\n"
        f"{_count(every)}{of}"
    )
    return title + f"\nin {processes} processes" * (processes > 1)


def _outcomes(
    settings: Sequence[Setting], every: Sequence[Network], results: Sequence[Result]
) -> list[Outcome]:
    """Of each setting, whichever process trained its networks."""
    found = {result.network: result for result in results}
    each: dict[Setting, list[Result]] = {setting: [] for setting in settings}
    for network in every:
        each[network.setting].append(found[network])
    return [Outcome(*rest) for rest in each.items()]


def _best(outcomes: Sequence[Outcome], metric: Metric) -> Outcome | None:
    """Of equal ones that with the lowest loss; None if the losses of none are finite."""
    finite = [o for o in outcomes if math.isfinite(o.mean("train_loss") + o.mean("loss"))]
    return max(
        finite, key=lambda o: (metric.sign * o.mean(metric.name), -o.mean("loss")), default=None
    )


def _table(
    outcomes: Sequence[Outcome], best: Outcome | None, metric: Metric, varying: Sequence[str]
) -> list[str]:
    """A row for each setting."""
    shown = varying or ["hidden", "lr"]
    losses = {"loss": "held-out loss", "train_loss": "train loss"}
    if metric is LOSS:
        del losses["loss"]
    spread = len(outcomes[0].results) > 1
    heading = [metric.heading, *["std"] * spread, *losses.values(), ""]
    rows = [[*(AXES[axis] for axis in shown), *heading]]
    for outcome in outcomes:
        row = [_value(getattr(outcome.setting, axis)) for axis in shown]
        row += map(metric.format, outcome.moments(metric.name)[: 1 + spread])
        row += [LOSS.format(outcome.mean(name)) for name in losses]
        rows.append([*row, "best" if outcome is best else ""])
    return aligned(rows)


def _times(
    every: Sequence[Network], seconds: float, alone: dict[str, float], noise: str
) -> list[str]:
    """How long it took, and would have taken. noise: why timings are unreliable, or ""."""
    text = (
        f"{_count(every)} trained in {as_time(seconds)}. One after another: about "
        f"{as_time(alone['fit'])} with TrainStep.fit, {as_time(alone['native'])} with torch "
        "(estimates from one network of each structure)."
    ) + f" Timings unreliable ({noise})." * bool(noise)
    return textwrap.wrap(text, WIDTH)


def _advice(
    args: argparse.Namespace, source: Path | None, best: Outcome | None, metric: Metric
) -> list[str]:
    """The best setting, and what to type next."""
    if best is None:
        return ["The loss of every setting is not finite: try a smaller --lr."]
    mean, deviation = best.moments(metric.name)
    spread = "" if math.isnan(deviation) else f" +- {metric.format(deviation)}"
    axes = [axis for axis in AXES if getattr(best.setting, axis) is not None]
    text = f"Best: {_label(best.setting, axes)}: {metric.text} {metric.format(mean)}{spread}."
    lines = textwrap.wrap(text, WIDTH, break_on_hyphens=False)
    return [*lines, "To train it:", *_next(args, source, best.setting)]


def _next(args: argparse.Namespace, source: Path | None, setting: Setting) -> list[str]:
    """The command that trains the setting with the first seed, in lines that end with a
    backslash."""
    options = {
        "data": args.data,
        **({"target": args.target} if source else {}),
        **({"regression": None} if args.regression else {}),
        "hidden": ",".join(map(str, setting.hidden)),
        "activation": args.activation,
        "loss": args.loss,
        "optimizer": args.optimizer,
        "lr": repr(setting.lr),
        **({} if setting.weight_decay is None else {"weight-decay": repr(setting.weight_decay)}),
        "batch-size": setting.batch_size,
        "epochs": args.epochs,
    }
    for name, usual in (("seed", 0), ("dtype", "float32"), ("device", "cpu")):
        if getattr(args, name) != usual:
            options[name] = getattr(args, name)
    lines = ["  mlp-ext train"]
    for name, value in options.items():
        option = f" --{name}" + ("" if value is None else f" {shlex.quote(str(value))}")
        if len(lines[-1]) + len(option) > WIDTH - 2:
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += option
    return lines


def _write_csv(path: Path, outcomes: Sequence[Outcome]) -> None:
    """A line for each network; weight_decay is empty for the optimizer's own."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        found = ("held_out_accuracy", "held_out_loss", "train_loss")
        table.writerow([*AXES, "seed", "fold", *found])
        for result in (result for outcome in outcomes for result in outcome.results):
            (hidden, *rest), seed, fold = result.network
            numbers = (result.accuracy, result.loss, result.train_loss)
            table.writerow([_value(hidden), *rest, seed, fold, *numbers])


def _figure(
    outcomes: Sequence[Outcome],
    best: Outcome | None,
    metric: Metric,
    varying: Sequence[str],
    title: str,
) -> Any:
    """Curves over epochs if at most one option has several values, else a heat map."""
    if len(varying) < 2:
        curves = []
        for outcome in outcomes:
            points = list(zip(*(result.held for result in outcome.results), strict=True))
            values = [[getattr(held, metric.name) for held in point] for point in points]
            epochs = [point[0].epochs for point in points]
            curves.append((_label(outcome.setting, varying), epochs, values))
        return plots.curves(curves, metric.text, title, metric is ACCURACY)
    first, *rest = varying
    columns = list(dict.fromkeys(_label(outcome.setting, rest) for outcome in outcomes))
    rows = list(dict.fromkeys(_label(outcome.setting, [first]) for outcome in outcomes))
    cells = {
        (_label(o.setting, [first]), _label(o.setting, rest)): o.mean(metric.name) for o in outcomes
    }
    values = [[cells[row, column] for column in columns] for row in rows]
    place = None
    if best:
        row, column = _label(best.setting, [first]), _label(best.setting, rest)
        place = (rows.index(row), columns.index(column))
    return plots.heat_map(values, rows, columns, place, metric.text, title, metric is ACCURACY)


def _label(setting: Setting, axes: Sequence[str]) -> str:
    return ", ".join(f"{AXES[axis]} {_value(getattr(setting, axis))}" for axis in axes)


def _count(every: Sequence[Network]) -> str:
    return f"{len(every)} network{'s' * (len(every) > 1)}"


def _value(value: Any) -> str:
    """As it is typed."""
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
