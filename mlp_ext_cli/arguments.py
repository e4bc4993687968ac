"""What the commands' parsers share: errors in one line that suggest what was meant, types of
arguments, and the sets of values that do not grow."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

DEVICES = ("cpu", "cuda")
FLOATS = ("float32", "float64", "bfloat16", "float16")
SHORT = {"fp16": "float16", "fp32": "float32", "fp64": "float64", "bf16": "bfloat16"}

Number = TypeVar("Number", int, float)
Value = TypeVar("Value")
Help = argparse.RawDescriptionHelpFormatter  # descriptions and examples keep their lines


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints one line, without argparse's usage."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Fails on what is left over: a command's own parser knows which option was meant."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            options = [option for action in self._actions for option in action.option_strings]
            close = meant(rest[0].partition("=")[0], options)
            self.error(f"unrecognized arguments: {' '.join(rest)}{close}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if action.dest == "command":
            self.error(f"there is no command '{value}'{meant(value, action.choices)}")
        raise argparse.ArgumentError(action, unknown(value, action.choices))


def add_command(commands: Any, name: str, run: str, help: str, **texts: str) -> Parser:
    """Adds a command to the subparsers of `mlp-ext`.

    run: module:function that is called with the Namespace. In it are also fail(message), which
    prints a user's error in one line and exits with status 2, exit(status, message), and prog.
    """
    parser: Parser = commands.add_parser(
        name, help=help, formatter_class=Help, allow_abbrev=False, **texts
    )
    parser.set_defaults(run=run, fail=parser.error, exit=parser.exit, prog=parser.prog)
    return parser


def add_shared(add: Callable[..., object], **defaults: object) -> None:
    """Adds these options, which several commands have, by an argument group's add_argument."""
    for name, default in defaults.items():
        options: dict[str, Any] = SHARED[name]
        text = options["help"].format(default)
        add(f"--{name}", **{**options, "default": default, "help": text})


def unknown(value: str, known: Iterable[str]) -> str:
    """The end of an error: what there is, and which of it was probably meant."""
    return f"must be one of {', '.join(known)}, got '{value}'{meant(value, known)}"


def meant(value: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' if one of `known` is close to `value`."""
    # At the default cutoff of 0.6, iris is close to digits.
    close = get_close_matches(SHORT.get(value, value), known, n=1, cutoff=0.65)
    return f"; did you mean {close[0]}?" if close else ""


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
seed = number(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 4294967295")
rate = number(float, lambda x: 0 < x < float("inf"), "a positive number")
decay = number(float, lambda x: 0 <= x < float("inf"), "a number from 0")


def each(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """An argparse type: values of `kind` separated by commas, each once."""
    return lambda text: list(dict.fromkeys(map(kind, text.split(","))))


counts = each(count)
listed = each(str)


def code(text: str) -> tuple[str, str]:
    """An argparse type: module or FILE.py, and a name in it."""
    name = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
    if not re.fullmatch(rf"({name}|.+\.py):{name}", text):
        raise argparse.ArgumentTypeError(f"must be module:name or FILE.py:name, got '{text}'")
    source, _, name = text.rpartition(":")
    return source, name


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


SHARED: dict[str, dict[str, Any]] = {
    "activation": {"metavar": "NAME", "help": "hidden-layer activation (default: {})"},
    "optimizer": {"metavar": "NAME", "help": "(default: {})"},
    "epochs": {"type": count, "metavar": "N", "help": "passes over the data (default: {})"},
    "dtype": {
        "choices": FLOATS,
        "metavar": "TYPE",
        "help": f"{', '.join(FLOATS)} (default: {{}})",
    },
    "device": {"choices": DEVICES, "help": "(default: {})"},
    "data": {
        "metavar": "NAME",
        "help": "a data set listed by mlp-ext info, or FILE.csv (default: {})",
    },
    "target": {"metavar": "COLUMN", "help": "the column of FILE.csv to predict"},
    "regression": {"action": "store_true", "help": "treat the target as a number"},
}
