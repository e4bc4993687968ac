"""What `mlp-ext train` does: its lines, its table, its sentence and its files."""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from mlp_ext.bench.machine import cpus, other_cpu_seconds
from mlp_ext.bench.noise import OTHER_CPUS
from mlp_ext.bench.rows import as_time, replacing
from mlp_ext.bench.training import LAYERS, LOSSES, OPTIMIZERS, make_mlp
from mlp_ext.commands import arguments, plots
from mlp_ext.commands.data import DATASETS, RENAMED, Dataset, load, load_csv
from mlp_ext.commands.distributed import Processes, joined
from mlp_ext.commands.loop import TrainingRun, accuracy, test_loss, train, unscaled_state
from mlp_ext.commands.summary import fastest
from mlp_ext.ops import ACTIVATIONS, build_info

OPTIONS = (  # recorded in the JSON file
    "layers",
    "data",
    "csv",
    "target",
    "hidden",
    "activation",
    "loss",
    "optimizer",
    "epochs",
    "lr",
    "batch_size",
    "seed",
    "device",
    "dtype",
    "distributed",
)
COLUMNS = {  # of the final table: name in _result; heading, format
    "ms_per_epoch": ("ms per epoch", "{:.3f}"),
    "speed_up": ("speed", "{:.2f}x"),
    "largest_difference": ("loss differs by", "{:.2g}"),
    "accuracy": ("train accuracy", "{:.1%}"),
    "held_out": ("test accuracy", "{:.1%}"),
    "test_loss": ("test loss", "{:.4f}"),
}
OF_PROBABILITIES = ("bce", "bce_with_logits", "cross_entropy")  # losses for classes only
LINES = 10  # of epochs, about
SAME = 1e-4  # losses are called the same if they differ by less than this part of the largest
BAR_AFTER = 2.0  # seconds of training after which a progress bar is shown


def run(args: argparse.Namespace) -> None:
    fail = args.fail
    if args.csv:
        if args.target is None:
            fail("argument --csv: add --target COLUMN, the column to predict")
    elif args.target is not None:
        fail("argument --target: is for --csv FILE")
    else:
        args.data = args.data or "tutorial"
        arguments.check_name("--data", args.data, DATASETS, fail, RENAMED)
    arguments.check_name("--activation", args.activation, ACTIVATIONS, fail)
    arguments.check_name("--loss", args.loss, LOSSES, fail)
    arguments.check_name("--optimizer", args.optimizer, OPTIMIZERS, fail)
    arguments.check_device(args.device, fail)
    arguments.check_picture(args.plot, fail)
    if args.distributed == "fsdp" and args.layers == "step":
        what = "a step needs whole parameters, fsdp shards them; use fused, stack or ddp"
        fail(f"argument --layers: {what}")
    with joined(args.distributed, args.device, fail) as processes:
        _train_in(processes, args)


def _train_in(processes: Processes, args: argparse.Namespace) -> None:
    data = _data(args)
    last = torch.nn.Identity if data.is_number else LOSSES[args.loss].last
    widths = [data.x.shape[1], *args.hidden, data.y.shape[1]]
    dtype = getattr(torch, args.dtype)
    try:
        model = make_mlp(widths, args.seed, args.activation, last).to(args.device, dtype)
    except RuntimeError as error:  # out of memory
        args.fail(f"argument --hidden: {str(error).splitlines()[0]}")

    title = _title(args, data, widths, processes.count)
    shown = processes.rank == 0 and not args.quiet
    if shown:
        print(*(textwrap.fill(line, 79) for line in title.splitlines()), sep="\n", flush=True)
        if min(args.batch_size, len(data.x)) % processes.count:
            print("batches do not divide by the processes: each process trains on all rows")
    kinds = list(LAYERS) if args.layers == "all" else [args.layers]
    if args.distributed == "fsdp":
        kinds = [kind for kind in kinds if kind != "step"]
    names = ("epochs", "lr", "batch_size", "seed", "loss", "optimizer")
    settings = {name: getattr(args, name) for name in names}
    epochs = train(kinds, model, data, **settings, processes=processes)
    every = args.log_every or math.ceil(args.epochs / LINES)
    others, started = other_cpu_seconds(), time.perf_counter()
    runs = _follow(epochs, args.epochs, every, shown)
    others = (other_cpu_seconds() - others) / (time.perf_counter() - started)

    native = runs[0] if len(runs) > 1 else None
    results = {run.kind: _result(run, native, data, args.loss) for run in runs}
    state = unscaled_state(runs[0].model, data) if args.save else {}
    if processes.rank:
        return
    sentence = textwrap.fill(_sentence(results), 79)
    print(*[""] * shown, *_table(results), "", sentence, sep="\n", flush=True)
    trained = sum(sum(run.seconds) for run in runs)
    if args.device == "cpu" and (busy := _busy(others, trained, torch.get_num_threads())):
        print(f"{args.prog}: {busy}", file=sys.stderr)
    try:
        if args.json:
            _write_json(args, processes.count, data, results)
        if args.plot:
            with replacing(args.plot) as path:
                plots.loss_curves(runs, title).savefig(path)
        if args.save:
            with replacing(args.save) as path:
                torch.save(state, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's of a full disk
        args.fail(str(error).splitlines()[0])


def _data(args: argparse.Namespace) -> Dataset:
    """The data set, if the loss can be computed on it."""
    dtype = getattr(torch, args.dtype)
    with arguments.advising(args.fail):
        if args.csv:
            try:
                data = load_csv(args.csv, args.target, args.seed, dtype, args.device)
            except OSError as error:
                args.fail(f"argument --csv: cannot read '{args.csv}': {error.strerror}")
            except ValueError as error:
                args.fail(f"argument --csv: {error}")
        else:
            data = load(args.data, args.seed, dtype, args.device)
    if data.is_number and args.loss in OF_PROBABILITIES:
        others = ", ".join(name for name in LOSSES if name not in OF_PROBABILITIES)
        what = f"{args.loss} is for classes, and {args.target} is a number"
        args.fail(f"argument --loss: {what}; use one of {others}")
    if args.loss == "cross_entropy" and data.y.shape[1] == 1:
        what = f"{data.name} has one output, a probability; use bce_with_logits"
        args.fail(f"argument --loss: cross_entropy needs an output for each class, and {what}")
    return data


def _title(args: argparse.Namespace, data: Dataset, widths: Sequence[int], processes: int) -> str:
    rows = f"{len(data.x)} rows" + f" and {len(data.x_test)} to test" * bool(len(data.x_test))
    target = ""
    if args.csv:
        kind = "a number" if data.is_number else f"{data.classes} classes"
        target = f", target {args.target} ({kind})"
    threads = torch.get_num_threads()
    place = f"{threads} CPU thread{'s' * (threads > 1)}" if args.device == "cpu" else args.device
    title = (
        f"{data.name}: {rows}, {widths[0]} features{target}\n"
        f"network {'-'.join(map(str, widths))}, {args.activation}; {args.dtype} on {place}\n"
        f"{args.loss}, {args.optimizer} with lr {args.lr:g}, batches of {args.batch_size}"
    )
    if args.distributed:
        title += f"\n{args.distributed} in {processes} process{'es' * (processes > 1)}"
    return title


def _follow(
    epochs: Iterator[list[TrainingRun]], total: int, every: int, shown: bool
) -> list[TrainingRun]:
    """If `shown`, prints every so many epochs and the last one, and a progress bar in long runs on
    a terminal."""
    may_have_bar = shown and sys.stderr.isatty() and find_spec("tqdm")
    bar: Any = None
    started = time.monotonic()
    runs: list[TrainingRun] = []
    try:
        for epoch, runs in enumerate(epochs):
            if shown and (epoch % every == 0 or epoch == total - 1):
                names = [run.kind for run in runs] if len(runs) > 1 else ["loss"]
                losses = (f"{n}: {run.losses[-1]:.4f}" for n, run in zip(names, runs, strict=True))
                with bar.external_write_mode() if bar else nullcontext():
                    print(f"epoch: {epoch}", *losses, flush=True)
            if bar:
                bar.update()
            elif may_have_bar and time.monotonic() - started > BAR_AFTER:
                from tqdm import tqdm

                bar = tqdm(total=total, initial=epoch + 1, unit="epoch", leave=False)
    finally:
        if bar:
            bar.close()
    return runs


def _result(
    run: TrainingRun, native: TrainingRun | None, data: Dataset, loss: str
) -> dict[str, Any]:
    """The results of a run, compared with `native` if given."""
    result: dict[str, Any] = {"ms_per_epoch": 1e3 * median(run.seconds)}
    if native:
        ratios = [n / s for n, s in zip(native.seconds, run.seconds, strict=True)]
        losses = torch.tensor([run.losses, native.losses], dtype=torch.float64)
        result["speed_up"] = median(ratios)
        result["largest_difference"] = (losses[0] - losses[1]).abs().max().item()
    if data.classes:
        result["accuracy"] = accuracy(run.model, data.x, data.y, loss)
        result["held_out"] = accuracy(run.model, data.x_test, data.y_test, loss)
    if data.is_number:
        result["test_loss"] = test_loss(run.model, data, loss)
    return {**result, "losses": run.losses, "seconds": run.seconds}


def _table(results: dict[str, dict[str, Any]]) -> list[str]:
    """A table row for each kind of layer, with the COLUMNS that the results have."""
    known = [name for name in COLUMNS if name in next(iter(results.values()))]
    rows = [["", *(COLUMNS[name][0] for name in known)]]
    for kind, result in results.items():
        rows.append([kind, *(COLUMNS[name][1].format(result[name]) for name in known)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def _sentence(results: dict[str, dict[str, Any]]) -> str:
    """What happened."""
    first, *others = results
    losses = results[first]["losses"]
    if not others:
        trained = as_time(sum(results[first]["seconds"]))
        text = f"{first} trained in {trained}: loss {losses[0]:.4f} in the first epoch, "
        return f"{text}{losses[-1]:.4f} in the last." + _advice(losses)
    text = fastest({kind: results[kind]["speed_up"] for kind in others})
    if _advice(losses):
        return f"{text}.{_advice(losses)}"
    differences = {kind: results[kind]["largest_difference"] for kind in others}
    largest = max(differences, key=lambda kind: _nan_last(differences[kind]))
    if differences[largest] <= SAME * max(losses):
        return f"{text}, with the same losses."
    return (
        f"{text}; the losses of {largest} differ from torch's by up to {differences[largest]:.2g}."
    )


def _busy(others: float, trained: float, threads: int) -> str:
    """Warns of times taken while others needed our CPUs. others: the CPUs that they used.

    trained: seconds in training steps. Less than one is too short for the system's clock ticks.
    """
    here = len(cpus())
    if trained < 1 or not others > max(0, here - threads) + OTHER_CPUS:
        return ""
    return f"the times are too noisy to cite: other processes used {others:.1f} of {here} CPUs"


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _advice(losses: Sequence[float]) -> str:
    return "" if math.isfinite(losses[-1]) else " The loss is not finite: try a smaller --lr."


def _write_json(
    args: argparse.Namespace, processes: int, data: Dataset, results: dict[str, dict[str, Any]]
) -> None:
    record = {
        "args": {name: getattr(args, name) for name in OPTIONS},
        "processes": processes,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "build": build_info(),
        "classes": [*data.names],
        "results": results,
    }
    # JSON has no NaN and no infinity: writes null.
    record = json.loads(json.dumps(record, default=str), parse_constant=lambda _: None)
    with replacing(args.json) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
