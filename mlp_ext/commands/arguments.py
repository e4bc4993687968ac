"""Types and checks shared by the commands' arguments."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from mlp_ext.commands import plots

Number = TypeVar("Number", int, float)

Fail = Callable[[str], NoReturn]  # prints a user's error in one line and exits with status 2


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line, without argparse's usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: Callable[[str], Number], accepts: Callable[[Number], bool], what: str) -> Any:
    """An argparse type; `what` ends the message "must be ..."."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got '{text}'")
        return value

    return parse


count = number(int, lambda n: 1 <= n < 2**31, "a whole number from 1 to 2147483647")


def file(text: str) -> Path:
    """An argparse type: a file that can be written, checked before anything is computed."""
    path = Path(text)
    try:
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(f"'{text}' is not a file")
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write '{text}': {error.strerror}") from None


def check_device(device: str, fail: Fail) -> None:
    """Fails if torch does not find `device`, "cpu" or "cuda"."""
    if device == "cuda" and not torch.cuda.is_available():
        fail("argument --device: torch finds no cuda device here")


def check_picture(path: Path | None, fail: Fail, argument: str = "--plot") -> None:
    """Fails if matplotlib is not installed or does not support the file type of `path`."""
    with advising(fail):
        if path and path.suffix[1:].lower() not in plots.file_types():
            fail(
                f"argument {argument}: the file must end in one of "
                f"{', '.join('.' + t for t in sorted(plots.file_types()))}, got '{path}'"
            )


@contextmanager
def advising(fail: Fail) -> Iterator[None]:
    """Fails with install instructions if the body misses a package."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        fail(f'{package} is not installed; try: pip install "mlp_ext[demo]"')
