"""What `mlp-ext train` does: its lines, its table, its sentence and its files."""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlp_ext.bench.machine import cpus, other_cpus
from mlp_ext.bench.noise import busy
from mlp_ext.bench.rows import as_number, as_range, as_time, replacing, write_json
from mlp_ext.bench.runner import summarize
from mlp_ext.bench.training import LAYERS, LOSSES, make_mlp
from mlp_ext.commands import arguments, plots
from mlp_ext.commands.data import Dataset, held_out
from mlp_ext.commands.distributed import Processes, joined
from mlp_ext.commands.loop import TrainingRun, accuracy, test_loss, train, unscaled_state
from mlp_ext.commands.progress import Bar
from mlp_ext.commands.summary import WIDTH, aligned, fastest
from mlp_ext.ops import build_info

OPTIONS = (  # recorded in the JSON file
    "layers",
    "data",
    "target",
    "regression",
    "hidden",
    "activation",
    "loss",
    "optimizer",
    "epochs",
    "lr",
    "weight_decay",
    "batch_size",
    "validation",
    "patience",
    "seed",
    "device",
    "dtype",
    "distributed",
)
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # name in _result: heading, format
    "ms_per_epoch": ("time per epoch", lambda ms: as_time(ms / 1e3)),
    "speed_up": ("speed", lambda ratio: f"{as_number(ratio)}x"),
    "speed_up_range": ("20-80%", lambda q: as_range(*q) if q[0] < q[1] else ""),
    "largest_difference": ("max loss diff", "{:.2g}".format),
    "accuracy": ("train acc", "{:.1%}".format),
    "validation_loss": ("val loss", "{:.4f}".format),
    "validation_accuracy": ("val acc", "{:.1%}".format),
    "best_epoch": ("best epoch", str),
    "held_out": ("test acc", "{:.1%}".format),
    "test_loss": ("test loss", "{:.4f}".format),
}
# Not in the table with --validation, whose columns take their place.
REPLACED = ("speed_up_range", "largest_difference", "accuracy")
# Kinds that --distributed does not have: fit draws its own batches, step needs whole parameters.
LEFT_OUT: dict[str | None, tuple[str, ...]] = {None: (), "ddp": ("fit",), "fsdp": ("step", "fit")}
LINES = 10  # of epochs, about
SAME = 1e-4  # losses are called the same if they differ by at most this part of the largest
SHORTEST = 1.0  # seconds of training; the system's clock ticks are too coarse to judge less


def run(args: argparse.Namespace) -> None:
    fail, source = args.fail, arguments.source(args)
    if args.patience and not args.validation:
        fail("argument --patience: requires --validation X, such as 0.2")
    arguments.check_files(args, data=source, plot=args.plot, save=args.save, json=args.json)
    arguments.check_training(args)
    if args.layers in LEFT_OUT[args.distributed]:
        others = ", ".join(kind for kind in LAYERS if kind not in LEFT_OUT[args.distributed])
        fail(f"argument --layers: {args.distributed} has {others}, got '{args.layers}'")
    with joined(args.distributed, args.device, fail) as processes:
        _train_in(processes, args, source)


def _train_in(processes: Processes, args: argparse.Namespace, source: Path | None) -> None:
    data = arguments.read_data(args, source)
    arguments.check_loss(args, data)
    validation = None
    if args.validation:
        try:
            data, validation = held_out(data, args.validation)
        except ValueError as error:
            args.fail(f"argument --validation: {error}")
    last = torch.nn.Identity if data.is_number else LOSSES[args.loss].last
    widths = [data.x.shape[1], *args.hidden, data.y.shape[1]]
    dtype = getattr(torch, args.dtype)
    try:
        model = make_mlp(widths, args.seed, args.activation, last).to(args.device, dtype)
    except RuntimeError as error:  # out of memory
        args.fail(f"argument --hidden: {str(error).splitlines()[0]}")

    title = _title(args, data, validation, widths, processes.count)
    shown = processes.rank == 0 and not args.quiet
    if shown:
        print(*(textwrap.fill(line, WIDTH) for line in title.splitlines()), sep="\n", flush=True)
        if min(args.batch_size, len(data.x)) % processes.count:
            print("batches cannot be split evenly: each process trains on all rows")
    kinds = [kind for kind in LAYERS if args.layers in ("all", kind)]
    kinds = [kind for kind in kinds if kind not in LEFT_OUT[args.distributed]]
    names = ("epochs", "lr", "weight_decay", "batch_size", "seed", "loss", "optimizer")
    settings = {name: getattr(args, name) for name in names}
    stopping = {"validation": validation, "patience": args.patience}
    epochs = train(kinds, model, data, **settings, **stopping, processes=processes)
    every = args.log_every or math.ceil(args.epochs / LINES)
    others = other_cpus()
    runs = _follow(epochs, args.epochs, every, shown)
    used = others()

    native = runs[0] if len(runs) > 1 else None
    results = {run.kind: _result(run, native, data, args.loss) for run in runs}
    state = unscaled_state(runs[0].model, data) if args.save else {}
    if processes.rank:
        return
    noise = ""
    if args.device == "cpu" and sum(sum(run.seconds) for run in runs) > SHORTEST:
        noise = busy(used, torch.get_num_threads(), len(cpus()))
    sentence = textwrap.fill(_sentence(results, noise) + _ending(results, args.patience), WIDTH)
    print(*[""] * shown, *_table(results), "", sentence, sep="\n", flush=True)
    try:
        if args.json:
            write_json(_record(args, processes.count, data, results), args.json)
        if args.plot:
            with replacing(args.plot) as path:
                plots.loss_curves(runs, title).savefig(path)
        if args.save:
            with replacing(args.save) as path, path.open("wb") as file:
                torch.save(state, file)  # given a path, it refuses one whose name begins with a dot
            if shown:
                print("", *_loading(args, model, data), sep="\n")
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's of a full disk
        args.fail(str(error).splitlines()[0])


def _title(
    args: argparse.Namespace,
    data: Dataset,
    validation: tuple[Tensor, Tensor] | None,
    widths: Sequence[int],
    processes: int,
) -> str:
    rows = f"{len(data.x)} rows"
    if validation:
        rows += f", {len(validation[0])} to validate"
    rows += f" and {len(data.x_test)} to test" * bool(len(data.x_test))
    target = ""
    if args.target:
        kind = "a number" if data.is_number else f"{data.classes} classes"
        if data.classes > 2 and all(name.lstrip("-").isdigit() for name in data.names):
            kind += "; for a number, add --regression"
        target = f", target {args.target} ({kind})"
    threads = torch.get_num_threads()
    place = f"{threads} CPU thread{'s' * (threads > 1)}" if args.device == "cpu" else args.device
    decay = "" if args.weight_decay is None else f" and weight decay {args.weight_decay:g}"
    title = (
        f"{data.name}: {rows}, {widths[0]} features{target}\n"
        f"network {'-'.join(map(str, widths))}, {args.activation}; {args.dtype} on {place}\n"
        f"{args.loss}, {args.optimizer} with lr {args.lr:g}{decay}, batches of {args.batch_size}"
    )
    if args.distributed:
        title += f"\n{args.distributed} in {processes} process{'es' * (processes > 1)}"
    return title


def _follow(
    epochs: Iterator[list[TrainingRun]], total: int, every: int, shown: bool
) -> list[TrainingRun]:
    """If `shown`, prints every so many epochs and the last one, with a progress bar."""
    runs: list[TrainingRun] = []
    done = 0
    with Bar(total, shown) as bar:
        for runs in epochs:
            before, done = done, max(len(run.losses) for run in runs)
            last = done - 1 if all(run.has_ended for run in runs) else total - 1
            lines = [
                _line(epoch, runs)
                for epoch in range(before, done)
                if shown and (epoch % every == 0 or epoch == last)
            ]
            if lines:
                with bar.aside():
                    print(*lines, sep="\n", flush=True)
            bar.advance(done - before)
    return runs


def _line(epoch: int, runs: Sequence[TrainingRun]) -> str:
    """One run's loss, or a table row, the first one with a heading."""
    if len(runs) == 1:
        text = f"epoch: {epoch} loss: {runs[0].losses[epoch]:.4f}"
        if validation := runs[0].validation:
            text += f" val loss: {validation.losses[epoch]:.4f}"
            text += "".join(f" val acc: {a:.1%}" for a in validation.accuracies[epoch : epoch + 1])
        return text
    heading = "\n epoch" + "".join(f"{run.kind:>9}" for run in runs) + "\n"
    losses = [run.losses[epoch] if epoch < len(run.losses) else None for run in runs]
    cells = "".join(" " * 9 if loss is None else f"{loss:>9.4f}" for loss in losses)
    return heading * (epoch == 0) + f"{epoch:>6}{cells}"


def _result(
    run: TrainingRun, native: TrainingRun | None, data: Dataset, loss: str
) -> dict[str, Any]:
    """The results of a run, compared with `native` if given."""
    count = min(len(each.seconds) for each in (native or run, run))
    seconds = {each.kind: each.seconds[:count] for each in (native or run, run)}
    seconds.setdefault("native", run.seconds)
    summary = summarize(seconds)[run.kind]
    result: dict[str, Any] = {"ms_per_epoch": 1e3 * summary.median_s}
    if native:
        losses = torch.tensor([run.losses[:count], native.losses[:count]], dtype=torch.float64)
        result["speed_up"] = summary.ratio_to_native
        result["speed_up_range"] = [summary.ratio_q20, summary.ratio_q80]
        result["largest_difference"] = (losses[0] - losses[1]).abs().max().item()
    if validation := run.validation:
        best = -1 if validation.best.epoch is None else validation.best.epoch
        result["validation_loss"] = validation.losses[best]
        if data.classes:
            result["validation_accuracy"] = validation.accuracies[best]
        result["best_epoch"] = validation.best.epoch
        result["has_ended"] = run.has_ended
        result["validation_losses"] = validation.losses
        result["validation_accuracies"] = validation.accuracies
    if data.classes:
        result["accuracy"] = accuracy(run.model, data.x, data.y, loss)
        result["held_out"] = accuracy(run.model, data.x_test, data.y_test, loss)
    if data.is_number:
        result["test_loss"] = test_loss(run.model, data, loss)
    return {**result, "losses": run.losses, "seconds": run.seconds}


def _table(results: dict[str, dict[str, Any]]) -> list[str]:
    """A table row for each kind, with the COLUMNS that the results have."""
    first = next(iter(results.values()))
    left_out = REPLACED if "best_epoch" in first else ()
    known = [name for name in COLUMNS if name in first and name not in left_out]
    rows = [["", *(COLUMNS[name][0] for name in known)]]
    for kind, result in results.items():
        rows.append([kind, *(COLUMNS[name][1](result[name]) for name in known)])
    return aligned(rows)


def _sentence(results: dict[str, dict[str, Any]], noise: str = "") -> str:
    """What happened. noise: why timings are unreliable, or ""."""
    first, *others = results
    losses = results[first]["losses"]
    if not others:
        trained = as_time(sum(results[first]["seconds"])) + f" ({noise})" * bool(noise)
        text = f"{first} trained in {trained}: loss {losses[0]:.4f} in the first epoch, "
        return f"{text}{losses[-1]:.4f} in the last." + _advice(losses)
    text = fastest({k: (results[k]["speed_up"], *results[k]["speed_up_range"]) for k in others})
    if noise:
        text = f"Timings unreliable ({noise})"
    if _advice(losses):
        return f"{text}.{_advice(losses)}"
    differences = {kind: results[kind]["largest_difference"] for kind in others}
    largest = max(differences, key=lambda kind: _nan_last(differences[kind]))
    if differences[largest] <= SAME * max(losses):
        return f"{text}; the losses are the same."
    return (
        f"{text}; the losses of {largest} differ from torch's by up to {differences[largest]:.2g}."
    )


def _ending(results: dict[str, dict[str, Any]], patience: int | None) -> str:
    """Why training with validation ended."""
    kinds: dict[str, list[str]] = {}
    for kind, result in results.items():
        if "best_epoch" not in result:
            return ""
        why = "after all epochs"
        if result["has_ended"]:
            why = f"at epoch {len(result['losses']) - 1}, {patience} after the best"
        kinds.setdefault(why, []).append(kind)
    if len(kinds) == 1:
        return f" Training ended {next(iter(kinds))}."
    return "".join(f" {', '.join(names)} ended {why}." for why, names in kinds.items())


def _loading(args: argparse.Namespace, model: nn.Sequential, data: Dataset) -> list[str]:
    """The code that loads the saved weights."""
    modules = [*model][: -1 if isinstance(model[-1], nn.Identity) else None]
    sequential = f"nn.Sequential({', '.join(map(_code, modules))})"
    if args.dtype == "float64":
        sequential += ".double()"
    lines = [
        f"Wrote {args.save}. To load it:",
        f"  model = {sequential}",
        f'  model.load_state_dict(torch.load("{args.save}"))',
    ]
    if data.classes > 2 and data.names:
        lines.append(f"  # outputs, by class: {', '.join(data.names)}")
    elif data.names:
        what = "probability" if isinstance(model[-1], nn.Sigmoid) else "logit"
        lines.append(f"  # output: {what} of {data.names[1]}")
    return [textwrap.fill(line, WIDTH, subsequent_indent="      ") for line in lines]


def _code(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"nn.Linear({module.in_features}, {module.out_features})"
    return f"nn.{module!r}"


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _advice(losses: Sequence[float]) -> str:
    return "" if math.isfinite(losses[-1]) else " The loss is not finite: try a smaller --lr."


def _record(
    args: argparse.Namespace, processes: int, data: Dataset, results: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "args": {name: getattr(args, name) for name in OPTIONS},
        "processes": processes,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "build": build_info(),
        "classes": [*data.names],
        "results": results,
    }
