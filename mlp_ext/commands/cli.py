"""The command `mlp-ext`: how it was built, the training loop on real data, the benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from mlp_ext.commands import arguments, plots
from mlp_ext.commands.arguments import count, number
from mlp_ext.commands.bench import add_bench
from mlp_ext.commands.data import DATASETS, Dataset, load
from mlp_ext.commands.loop import LAYERS, Run, accuracy, make_mlp, train
from mlp_ext.ops import build_info

COLUMNS = {  # of the table at the end: what _result calls it, and how it is printed
    "ms_per_epoch": ".3f",
    "speed_up": ".2f",
    "largest_difference": ".2g",
    "accuracy": ".1%",
    "held_out": ".1%",
}
BAR_AFTER = 2.0  # seconds of training that make a run long enough for a progress bar


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default the process's own; returns the exit status.

    0 when all went well, 2 after a user's error, told in one line on stderr, 130 after Ctrl-C, 141
    when nobody reads the output any more.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        args.command(args)
        print(end="", flush=True)
    except SystemExit as stop:  # argparse: --help, or an error
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # of stdout: nobody reads it any more, or its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _info(args: argparse.Namespace) -> None:
    info = build_info()
    if args.json:
        print(json.dumps(info, indent=2))
        return
    width = max(map(len, info))
    for name, value in info.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value or "")
        print(f"{name:<{width}}  {text or 'none'}")


def _train(args: argparse.Namespace) -> None:
    arguments.check_device(args.device, args.fail)
    arguments.check_picture(args.plot, args.fail)
    dtype = getattr(torch, args.dtype)
    with arguments.advising(args.fail):
        data = load(args.data, args.seed, dtype, args.device)

    widths = [data.x.shape[1], *args.hidden, data.y.shape[1]]
    try:
        model = make_mlp(widths, args.seed).to(args.device, dtype)
    except RuntimeError as error:  # no memory for it
        args.fail(f"argument --hidden: {str(error).splitlines()[0]}")

    place = args.device if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    title = (
        f"{args.data}: {len(data.x)} rows, {'-'.join(map(str, widths))}, lr {args.lr:g}, "
        f"batches of {args.batch_size}, {args.dtype} on {place}"
    )
    print(title, flush=True)
    kinds = list(LAYERS) if args.layers == "all" else [args.layers]
    settings = {name: getattr(args, name) for name in ("epochs", "lr", "batch_size", "seed")}
    runs = _follow(train(kinds, model, data, **settings), args.epochs)

    native = runs[0] if len(runs) > 1 else None
    results = {run.kind: _result(run, native, data) for run in runs}
    print(*_table(results), sep="\n", flush=True)
    try:
        if args.json:
            _write_json(args, results)
        if args.plot:
            with arguments.replacing(args.plot) as path:
                losses = {run.kind: run.losses for run in runs}
                plots.loss_curves(losses, title).savefig(path)
    except OSError as error:
        args.fail(str(error))


def _follow(epochs: Iterator[list[Run]], total: int) -> list[Run]:
    """Print a line after each epoch; below, in a long run on a terminal, a progress bar."""
    may_have_bar = sys.stderr.isatty() and find_spec("tqdm")
    bar: Any = None
    started = time.monotonic()
    runs: list[Run] = []
    try:
        for epoch, runs in enumerate(epochs):
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


def _result(run: Run, native: Run | None, data: Dataset) -> dict[str, Any]:
    """What a run came to; beside `native` where it is given."""
    result: dict[str, Any] = {"ms_per_epoch": 1e3 * median(run.seconds)}
    if native:
        ratios = [n / s for n, s in zip(native.seconds, run.seconds, strict=True)]
        losses = torch.tensor([run.losses, native.losses], dtype=torch.float64)
        result["speed_up"] = median(ratios)
        result["largest_difference"] = (losses[0] - losses[1]).abs().max().item()
    if data.classes:
        result["accuracy"] = accuracy(run.model, data.x, data.y)
        result["held_out"] = accuracy(run.model, data.x_test, data.y_test)
    return {**result, "losses": run.losses, "seconds": run.seconds}


def _table(results: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each kind of layer, with those COLUMNS that the results have."""
    known = [name for name in COLUMNS if name in next(iter(results.values()))]
    rows = [["", *(name.replace("_", " ") for name in known)]]
    for kind, result in results.items():
        rows.append([kind, *(format(result[name], COLUMNS[name]) for name in known)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def _write_json(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    options = ("layers", "data", "hidden", "epochs", "lr", "batch_size", "seed", "device", "dtype")
    record = {
        "args": {name: getattr(args, name) for name in options},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "build": build_info(),
        "results": results,
    }
    # JSON has no NaN and no infinity: null.
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with arguments.replacing(args.json) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")


def _parser() -> arguments.Parser:
    parser = arguments.Parser(prog="mlp-ext", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    info = commands.add_parser("info", help="how this package was built and what it uses here")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(command=_info)

    formatter = argparse.ArgumentDefaultsHelpFormatter
    train = commands.add_parser(
        "train",
        help="train a multi-layer perceptron with SGD",
        description="Train Linear, ReLU, ..., Linear, Sigmoid with MSELoss and SGD.",
        epilog="--layers all trains the same initial weights on the same batches with every kind "
        "of layer in turn. ms per epoch: in the training steps alone; speed up: native's time over "
        "this one's; both the median over the epochs. largest difference: of a loss from native's.",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    train.set_defaults(command=_train, fail=train.error)
    add = train.add_argument
    add("--layers", choices=[*LAYERS, "all"], default="native", help="what the model is made of")
    add("--data", choices=[*DATASETS], default="seed", help="the data set")
    add("--hidden", type=_widths, default="5", metavar="N[,N...]", help="hidden widths")
    add("--epochs", type=count, default=50, metavar="N", help="passes over the data")
    add("--lr", type=_rate, default=0.01, metavar="X", help="learning rate")
    add("--batch-size", type=count, default=10, metavar="N", help="rows of one step")
    add("--seed", type=_seed, default=0, metavar="N", help="of weights, rows and shuffling")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    add("--dtype", choices=arguments.DTYPES, default="float32", help="of weights and data")
    add("--plot", type=arguments.file, metavar="FILE.png", help="draw the losses")
    add("--json", type=arguments.file, metavar="FILE", help="write settings, versions and results")

    add_bench(commands)
    return parser


_seed = number(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 4294967295")
_rate = number(float, lambda x: 0 < x < float("inf"), "a positive number")


def _widths(text: str) -> list[int]:
    return [count(width) for width in text.split(",")]
