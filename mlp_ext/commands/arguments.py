"""Checks of the commands' arguments that need torch, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import torch

from mlp_ext.bench.rows import Row, read_csv
from mlp_ext.commands import plots
from mlp_ext_cli.arguments import unknown

Fail = Callable[[str], NoReturn]  # prints a user's error in one line and exits with status 2


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
