"""Hostile calls of the scikit-learn estimators, profile, the command line and machine files."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from hostile import Row, Table, net, x
from hostile_layers import nested
from torch import nn

import mlp_ext
from mlp_ext import _C, machine
from mlp_ext_cli import main

ROWS: Table = {}

# --- profile ---


class Fails(nn.Module):
    def forward(self, input: object) -> object:
        raise KeyError("of\na user")


ROWS |= {
    "profile of None": Row(
        lambda _: mlp_ext.profile(None, x()),  # type: ignore[arg-type]
        TypeError,
        "profile: model must be a torch.nn.Module, got builtins.NoneType",
    ),
    "profile of a model that fails": Row(
        lambda _: mlp_ext.profile(Fails(), x()),
        RuntimeError,
        "profile: the model cannot be called with [6, 4]: ",
    ),
    "profile of another width": Row(
        lambda _: mlp_ext.profile(net(), x()[:, :2]),
        RuntimeError,
        "profile: the model cannot be called with [6, 2]: ",
    ),
    "profile without inputs": Row(
        lambda _: mlp_ext.profile(net()), RuntimeError, "profile: the model cannot be called with "
    ),
    "profile of no rounds": Row(
        lambda _: mlp_ext.profile(net(), x(), rounds=0),
        ValueError,
        "profile: rounds must be at least 1, got 0",
    ),
    "profile of nested rows": Row(
        lambda _: mlp_ext.profile(net(nn.Sigmoid()), nested(x())),
        RuntimeError,
        "profile: an input must be dense, got a nested tensor; pad it by torch.nested",
    ),
}

# --- scikit-learn ---


def estimator(X: Any, y: Any, error: type[Exception], message: str, **parameters: Any) -> Row:
    def call(_: Any) -> object:
        from mlp_ext.sklearn import MLPRegressor

        return MLPRegressor(hidden_layer_sizes=(4,), max_iter=2, **parameters).fit(X, y)

    return Row(call, error, message)


X, Y = np.ones((6, 4)), np.arange(6.0)
if find_spec("sklearn"):
    ROWS |= {
        "estimator of other rows": estimator(
            X, Y[:3], ValueError, "Found input variables with incon"
        ),
        "estimator of lbfgs": estimator(
            X, Y, ValueError, "MLPRegressor: solver='lbfgs' is not supported; use", solver="lbfgs"
        ),
    }

# --- The command line ---

FILES: dict[str, bytes] = {
    "empty.csv": b"",
    "bytes.csv": bytes(range(256)),
    "utf16.csv": "a,y\n1,2\n".encode("utf-16"),
    "header.csv": b"a,y\n",
    "ragged.csv": b"a,b,y\n1,2,3\n1,2\n",
    "nan.csv": b"a,y\n"
    + b"".join(b"%s,%d\n" % (b"nan" if i == 3 else b"1", i % 2) for i in range(9)),
    "inf.csv": b"a,y\n"
    + b"".join(b"%s,%d\n" % (b"1e400" if i == 3 else b"1", i % 2) for i in range(9)),
    "one.csv": b"a,y\n" + b"".join(b"%d,1\n" % i for i in range(9)),
    "long.csv": b"a,y\n" + b"9" * 200_000 + b",1\n",
    "good.csv": b"a,y\n" + b"".join(b"%d,%d\n" % (i, i % 2) for i in range(20)),
    "exits.py": b"import sys\ndef model(): sys.exit(5)\n",
    "lines.py": b"def model(): raise ValueError('two\\nlines')\n",
    "syntax.py": b"x = (\n",
}


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def command(line: list[str], message: str) -> Row:
    """Fails with status 2, and this line at stderr; changes no file."""

    def call(_: Any) -> None:
        out, err = io.StringIO(), io.StringIO()
        with tempfile.TemporaryDirectory() as folder, _inside(folder):
            for name, content in FILES.items():
                Path(name).write_bytes(content)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main(line)
            assert {p.name: p.read_bytes() for p in Path().iterdir() if p.is_file()} == FILES
        assert (status, out.getvalue()) == (2, ""), (status, out.getvalue(), err.getvalue())
        raise SystemExit(err.getvalue().removesuffix("\n"))

    return Row(call, SystemExit, f"mlp-ext{f' {line[0]}' * bool(message)}: error: {message}")


TRAIN = ["train", "--epochs", "1", "--layers", "step", "--target", "y", "--data"]
COMMANDS: dict[str, tuple[list[str], str]] = {
    "command with a line break": (["tr\nain"], ""),
    "activation with a line break": (
        ["train", "--activation", "re\nlu"],
        f"argument --activation: must be one of {', '.join(mlp_ext.ACTIVATIONS)}, got 're lu'; ",
    ),
    "loss of half a surrogate pair": (
        ["train", "--loss", "\ud800"],
        "argument --loss: must be one of ",
    ),
    "weights over the data": (
        [*TRAIN, "good.csv", "--save", "good.csv"],
        "argument --save: is the file of --data; name another",
    ),
    "results over the weights": (
        [*TRAIN, "good.csv", "--save", "new", "--json", "./new"],
        "argument --json: is the file of --save; name another",
    ),
    "NaN as rate": (
        ["sweep", "--lr", "0.1,nan"],
        "argument --lr: must be a positive number, got 'nan'",
    ),
    "networks without number": (
        ["sweep", "--seeds", "2147483647"],
        "8589934588 networks are too many; at ",
    ),
    "widths without number": (
        ["sweep", "--hidden", "5-"],
        "argument --hidden: must be a whole number from",
    ),
    "shape of 0": (
        ["plan", "0x0x0"],
        "argument case: must be MxKxN, e.g. 64x784x256, or WIDTHS@BATCH",
    ),
    "huge shape": (
        ["plan", f"{10**30}x1x1"],
        "argument case: must be MxKxN, e.g. 64x784x256, or WIDTHS@",
    ),
    "comparison of bytes": (
        ["compare", "bytes.csv", "bytes.csv"],
        "bytes.csv: missing columns suite, ",
    ),
    "comparison of nothing": (
        ["compare", "empty.csv", "empty.csv"],
        "empty.csv: missing columns suite, ",
    ),
    "provider that does not compile": (
        ["bench", "--cases", "4x4x4", "--provider", "syntax.py:f"],
        "argument --provider: syntax.py fails: SyntaxError: ",
    ),
    "model that exits": (
        ["profile", "exits.py:model", "--input", "2x4"],
        "exits.py:model fails: SystemExit: 5",
    ),
    "model with an error of two lines": (
        ["profile", "lines.py:model", "--input", "2x4"],
        "lines.py:model fails: ValueError: two",
    ),
    "NaN minutes": (
        ["tune", "--minutes", "nan"],
        "argument --minutes: must be a number above 0, got 'nan'",
    ),
}
CSV = {
    "empty.csv": " is empty",
    "bytes.csv": " is not text in UTF-8",
    "utf16.csv": " is not text in UTF-8",
    "header.csv": " has 0 rows; at least 5 are required",
    "ragged.csv": ", line 3: 2 cells, expected 3",
    "nan.csv": ", line 5: column 'a' must be a finite number, got 'nan'",
    "inf.csv": ", line 5: column 'a' must be a finite number, got '1e400'",
    "one.csv": ": column 'y' has only one value, 1",
    "long.csv": ", line 3: field larger than field limit (131072)",
}
for name, message in CSV.items():
    COMMANDS[f"training on {name}"] = ([*TRAIN, name], f"argument --data: {name}{message}")
    sweep = ["sweep", "--target", "y", "--data", name]
    COMMANDS[f"sweep on {name}"] = (sweep, f"argument --data: {name}{message}")
ROWS |= {name: command(*given) for name, given in COMMANDS.items()}

# --- Machine files ---


def machine_file(content: bytes, message: str) -> Row:
    """Is a warning of one line, and the limits stay as they are."""

    def call(_: Any) -> None:
        before = _C.machine()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            path = Path(folder) / "m.json"
            path.write_bytes(content)
            warnings.simplefilter("error")
            try:
                machine.use_file(str(path))
            finally:
                assert _C.machine() == before
                _C.use_machine(None)

    pattern = "MLP_EXT_MACHINE: '"
    return Row(lambda lib: _named(call, message), UserWarning, pattern)


def _named(call: Callable[[Any], None], message: str) -> None:
    """Raises the call's warning if it tells this."""
    try:
        call(None)
    except UserWarning as warning:
        assert message in str(warning), str(warning)
        raise


ROWS |= {
    f"machine: {name}": machine_file(content, message)
    for name, (content, message) in {
        "nothing": (b"", "the file is not JSON"),
        "bytes": (bytes(range(256)), "the file is not JSON"),
        "cut short": (b'{"fma": {"dot_rows": 1', "the file is not JSON"),
        "null": (b"null", "the file must hold an object"),
        "half a surrogate pair as name": (b'{"name": "\\ud800"}', "the file is not JSON"),
        "half a surrogate pair as limit": (b'{"fma": {"\\ud800": 1}}', "the file is not JSON"),
        "line break": (b'{"a\\nb": {}}', "expected name, bfloat16, fma"),
        "NaN": (b'{"fma": {"dot_rows": NaN}}', "fma.dot_rows must be a whole number"),
        "huge limit": (
            b'{"fma": {"dot_rows": 1%s}}' % (b"0" * 400),
            "fma.dot_rows must be a whole",
        ),
        "second limit": (
            b'{"fma": {"dot_rows": 9}, "bf16_dot": {"dot_rows": -1}}',
            "bf16_dot.dot_rows",
        ),
    }.items()
}
