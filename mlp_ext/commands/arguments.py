"""Checks of the commands' arguments that need torch, before anything is computed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import torch

from mlp_ext.bench.rows import Row, read_csv
from mlp_ext.bench.training import LOSSES, OPTIMIZERS
from mlp_ext.commands import plots
from mlp_ext.commands.data import DATASETS, RENAMED, Dataset, load, load_csv
from mlp_ext.ops import ACTIVATIONS
from mlp_ext_cli.arguments import unknown

Fail = Callable[[str], NoReturn]  # prints a user's error in one line and exits with status 2
OF_PROBABILITIES = ("bce", "bce_with_logits", "cross_entropy")  # losses for classes only


def check_name(
    option: str,
    value: str,
    known: Iterable[str],
    fail: Fail,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Fails if the option's value is not in a table of the library."""
    if value in renamed:
        fail(f"argument {option}: '{value}' is now called {renamed[value]}")
    if value not in known:
        fail(f"argument {option}: {unknown(value, known)}")


def check_training(args: argparse.Namespace) -> None:
    """Fails if the network, its training or the picture has a name that is not known here."""
    check_name("--activation", args.activation, ACTIVATIONS, args.fail)
    if args.loss is not None:
        check_name("--loss", args.loss, LOSSES, args.fail)
    check_name("--optimizer", args.optimizer, OPTIMIZERS, args.fail)
    check_device(args.device, args.fail)
    check_picture(args.plot, args.fail)


def check_device(device: str, fail: Fail) -> None:
    """Fails if torch does not find `device`, "cpu" or "cuda"."""
    if device == "cuda" and not torch.cuda.is_available():
        fail("argument --device: no CUDA device available")


def check_picture(path: Path | None, fail: Fail, argument: str = "--plot") -> None:
    """Fails if matplotlib is not installed or does not support the file type of `path`."""
    with advising(fail):
        if path and path.suffix[1:].lower() not in plots.file_types():
            fail(
                f"argument {argument}: the file must end in one of "
                f"{', '.join('.' + t for t in sorted(plots.file_types()))}, got '{path}'"
            )


def source(args: argparse.Namespace) -> Path | None:
    """The CSV file that is --data, or None if that names a data set."""
    path = Path(args.data)
    if args.data in DATASETS or not (path.suffix or path.exists()):
        for name in ("target", "regression"):
            if getattr(args, name):
                args.fail(f"argument --{name}: requires --data FILE.csv")
        check_name("--data", args.data, DATASETS, args.fail, RENAMED)
        return None
    if args.target is None:
        args.fail("argument --data: add --target COLUMN, the column to predict")
    return path


def check_files(args: argparse.Namespace, **options: Path | None) -> None:
    """Fails if two options name one file; the later one would replace it."""
    first: dict[Path, str] = {}
    for option, path in options.items():
        if path and (other := first.setdefault(path.resolve(), option)) != option:
            args.fail(f"argument --{option}: is the file of --{other}; name another")


def read_data(args: argparse.Namespace, path: Path | None) -> Dataset:
    """The rows of the CSV file, or else of the data set that --data names."""
    place = (args.seed, getattr(torch, args.dtype), args.device)
    with advising(args.fail):
        try:
            if path:
                return load_csv(path, args.target, *place, args.regression)
        except OSError as error:
            args.fail(f"argument --data: cannot read '{path}': {error.strerror}")
        except ValueError as error:
            args.fail(f"argument --data: {error}")
        return load(args.data, *place)


def check_loss(args: argparse.Namespace, data: Dataset) -> None:
    """Fails if the loss cannot be computed on the data."""
    if data.is_number and args.loss in OF_PROBABILITIES:
        others = ", ".join(name for name in LOSSES if name not in OF_PROBABILITIES)
        what = f"{args.loss} is for classes, and {args.target} is a number"
        args.fail(f"argument --loss: {what}; use one of {others}")
    if args.loss == "cross_entropy" and data.y.shape[1] == 1:
        what = f"{data.name} has one output, a probability; use bce_with_logits"
        args.fail(f"argument --loss: cross_entropy needs an output for each class, and {what}")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of `mlp-ext bench --csv`; raises ValueError if it is not one."""
    try:
        return read_csv(path)
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror}") from None


@contextmanager
def advising(fail: Fail) -> Iterator[None]:
    """Fails with install instructions if the body misses a package."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        fail(f'{package} is not installed; try: pip install "mlp_ext[demo]"')
