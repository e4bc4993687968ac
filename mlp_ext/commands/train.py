"""What `mlp-ext train` does: its lines, its table and its files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from mlp_ext.bench.rows import replacing
from mlp_ext.bench.training import LAYERS, LOSSES, OPTIMIZERS, make_mlp
from mlp_ext.commands import arguments, plots
from mlp_ext.commands.data import DATASETS, Dataset, load
from mlp_ext.commands.distributed import Processes, joined
from mlp_ext.commands.loop import TrainingRun, accuracy, train
from mlp_ext.ops import ACTIVATIONS, build_info

OPTIONS = (  # recorded in the JSON file
    "layers",
    "data",
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
COLUMNS = {  # of the final table: name in _result, format
    "ms_per_epoch": ".3f",
    "speed_up": ".2f",
    "largest_difference": ".2g",
    "accuracy": ".1%",
    "held_out": ".1%",
}
BAR_AFTER = 2.0  # seconds of training after which a progress bar is shown


def run(args: argparse.Namespace) -> None:
    names = {
        "--data": (args.data, DATASETS),
        "--activation": (args.activation, ACTIVATIONS),
        "--loss": (args.loss, LOSSES),
        "--optimizer": (args.optimizer, OPTIMIZERS),
    }
    for option, (value, known) in names.items():
        arguments.check_name(option, value, known, args.fail)
    arguments.check_device(args.device, args.fail)
    arguments.check_picture(args.plot, args.fail)
    if args.distributed == "fsdp" and args.layers == "step":
        what = "a step needs whole parameters, fsdp shards them; use fused, stack or ddp"
        args.fail(f"argument --layers: {what}")
    with joined(args.distributed, args.device, args.fail) as processes:
        _train_in(processes, args)


def _train_in(processes: Processes, args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype)
    with arguments.advising(args.fail):
        data = load(args.data, args.seed, dtype, args.device)

    if args.loss == "cross_entropy" and data.y.shape[1] == 1:
        what = f"{args.data} has one output, a probability; use bce_with_logits"
        args.fail(f"argument --loss: cross_entropy needs an output for each class, and {what}")
    widths = [data.x.shape[1], *args.hidden, data.y.shape[1]]
    try:
        model = make_mlp(widths, args.seed, args.activation, LOSSES[args.loss].last)
        model = model.to(args.device, dtype)
    except RuntimeError as error:  # out of memory
        args.fail(f"argument --hidden: {str(error).splitlines()[0]}")

    place = args.device if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    title = (
        f"{args.data}: {len(data.x)} rows, {'-'.join(map(str, widths))} {args.activation}, "
        f"{args.loss}, {args.optimizer}, lr {args.lr:g}, batches of {args.batch_size}, "
        f"{args.dtype} on {place}"
    )
    if args.distributed:
        title += f" in each of {processes.count} processes, {args.distributed}"
    if processes.rank == 0:
        print(title, flush=True)
        if min(args.batch_size, len(data.x)) % processes.count:
            print("batches do not divide by the processes: each process trains on all rows")
    kinds = list(LAYERS) if args.layers == "all" else [args.layers]
    if args.distributed == "fsdp":
        kinds = [kind for kind in kinds if kind != "step"]
    names = ("epochs", "lr", "batch_size", "seed", "loss", "optimizer")
    settings = {name: getattr(args, name) for name in names}
    epochs = train(kinds, model, data, **settings, processes=processes)
    runs = _follow(epochs, args.epochs, shown=processes.rank == 0)

    native = runs[0] if len(runs) > 1 else None
    results = {run.kind: _result(run, native, data, args.loss) for run in runs}
    if processes.rank:
        return
    print(*_table(results), sep="\n", flush=True)
    try:
        if args.json:
            _write_json(args, processes.count, results)
        if args.plot:
            with replacing(args.plot) as path:
                losses = {run.kind: run.losses for run in runs}
                plots.loss_curves(losses, title).savefig(path)
    except OSError as error:
        args.fail(str(error))


def _follow(
    epochs: Iterator[list[TrainingRun]], total: int, shown: bool = True
) -> list[TrainingRun]:
    """Prints a line after each epoch, and a progress bar in long runs on a terminal, if `shown`."""
    may_have_bar = shown and sys.stderr.isatty() and find_spec("tqdm")
    bar: Any = None
    started = time.monotonic()
    runs: list[TrainingRun] = []
    try:
        for epoch, runs in enumerate(epochs):
            names = [run.kind for run in runs] if len(runs) > 1 else ["loss"]
            losses = (f"{n}: {run.losses[-1]:.4f}" for n, run in zip(names, runs, strict=True))
            with bar.external_write_mode() if bar else nullcontext():
                if shown:
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
    return {**result, "losses": run.losses, "seconds": run.seconds}


def _table(results: dict[str, dict[str, Any]]) -> list[str]:
    """A table row for each kind of layer, with the COLUMNS that the results have."""
    known = [name for name in COLUMNS if name in next(iter(results.values()))]
    rows = [["", *(name.replace("_", " ") for name in known)]]
    for kind, result in results.items():
        rows.append([kind, *(format(result[name], COLUMNS[name]) for name in known)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def _write_json(
    args: argparse.Namespace, processes: int, results: dict[str, dict[str, Any]]
) -> None:
    record = {
        "args": {name: getattr(args, name) for name in OPTIONS},
        "processes": processes,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "build": build_info(),
        "results": results,
    }
    # JSON has no NaN and no infinity: writes null.
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with replacing(args.json) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
