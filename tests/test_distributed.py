"""Many processes: mlp-ext train and sweep under torchrun, fused models in DDP, FSDP2, tensor
parallel and checkpoints, all as in one process with torch.nn."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import two_processes
from once import Once
from samples import load
from torch import nn

import mlp_ext
from mlp_ext.bench.training import sgd_step
from mlp_ext.commands.distributed import LAUNCHED, Processes
from mlp_ext_cli import main

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed"),
]


def torchrun(folder: Path, *args: str) -> str:
    """Runs two processes in `folder`; returns what they print."""
    where = [str(Path(mlp_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, where)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = {"cwd": folder, "env": env, "timeout": 300}
    result = subprocess.run([*command, *args], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch_size", "way", "kinds"),
    [
        (
            "breast_cancer",
            32,
            "ddp",
            ["native", "fused", "stack", "step"],
        ),  # the last batch: 7 rows
        ("digits", 64, "fsdp", ["native", "fused", "stack"]),  # 29
        pytest.param(
            "mnist5k", 200, "ddp", ["native", "fused", "stack", "step"], marks=pytest.mark.release
        ),
    ],
)
def test_two_processes_have_the_losses_of_one(
    name: str, batch_size: int, way: str, kinds: list[str], tmp_path: Path
) -> None:
    load(name)  # or skip
    args = f"train --layers all --data {name} --hidden 16 --lr 0.2 --dtype float64"
    args += f" --epochs 2 --batch-size {batch_size}"

    def files(name: str) -> list[str]:
        return ["--json", str(tmp_path / f"{name}.json"), "--save", str(tmp_path / f"{name}.pt")]

    assert main([*args.split(), *files("one")]) == 0
    shared = [*args.split(), *files("two"), "--distributed", way]
    out = torchrun(tmp_path, "-m", "mlp_ext", *shared)
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert list(two["results"]) == kinds
    native = one["results"]["native"]
    for kind, result in two["results"].items():
        assert result["losses"] == pytest.approx(native["losses"], rel=1e-9), kind
        for part in ("accuracy", "held_out"):
            assert result[part] == native[part], kind
    weights, expected = (
        torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("two", "one")
    )
    torch.testing.assert_close(weights, expected)
    assert re.findall(r"^ +([01]) ", out, re.MULTILINE) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("args", ["--folds 3 --seeds 3", "--seeds 1 --hidden 4 --lr 0.1"])
def test_sweep_in_two_processes_is_that_of_one(
    args: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load("digits")  # or skip
    sweep = ["sweep", *f"--data digits --lr 0.03,0.3 --hidden 8,6-5 --epochs 2 {args}".split()]
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    assert main([*sweep, "--results", str(one)]) == 0
    title, *expected = capsys.readouterr().out.split("\n\n")
    out = torchrun(tmp_path, "-m", "mlp_ext", *sweep, "--results", str(two))
    found_title, *found = out.split("\n\n")
    assert found_title == f"{title}\nin 2 processes"
    assert found[0] == expected[0]  # the table
    ends = [text.partition("Best: ")[2] for text in (found[1], expected[1])]  # after the times
    assert ends[0] == ends[1] != ""
    assert two.read_text() == one.read_text()


@pytest.fixture(scope="session")
def folder(once: Once) -> Path:
    """results.json and the checkpoints of two_processes."""
    return once("two_processes", lambda path: torchrun(path, two_processes.__file__))


@pytest.mark.slow
@pytest.mark.parametrize("check", two_processes.CHECKS)
def test_two_processes(check: str, folder: Path) -> None:
    error = json.loads((folder / "results.json").read_text())[check]
    assert not error, error


@pytest.mark.slow
@pytest.mark.parametrize("saved_by", ["native", "layers", "stack"])
@pytest.mark.parametrize("loaded_by", two_processes.CHANGES)
def test_one_process_goes_on_from_the_checkpoint_of_two(
    saved_by: str, loaded_by: str, folder: Path
) -> None:
    model = two_processes.CHANGES[loaded_by](two_processes.network())
    optimizer = two_processes.load(folder / saved_by, model, no_dist=True)
    step = sgd_step(model, nn.MSELoss(), optimizer)
    rest = two_processes.losses(step, two_processes.HALF)
    assert rest == pytest.approx(two_processes.expected()[two_processes.HALF :], rel=1e-7)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 10, 12])
def test_parts_have_the_mean_of_the_batch(rows: int, count: int) -> None:
    """The parts are equal, so that the mean of their means is that of the batch."""
    batch = torch.arange(rows, dtype=torch.float64)
    parts = [Processes(rank, count).part(batch) for rank in range(count)]
    assert len({len(part) for part in parts}) == 1
    torch.testing.assert_close(torch.stack([p.mean() for p in parts]).mean(), batch.mean())
    assert torch.equal(torch.cat(parts).unique(), batch)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a launcher that started this process alone."""
    for name, value in zip(LAUNCHED, ("0", "1", "0", "localhost", "0"), strict=True):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    "args", ["--distributed ddp", "--distributed fsdp", "--distributed fsdp --layers stack"]
)
def test_one_process_alone(
    args: str, device: str, launched: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    train = ["train", "--layers", "native", "--epochs", "2", "--device", device, "--save"]
    alone, shared = tmp_path / "alone.pt", tmp_path / "shared.pt"
    assert main([*train, str(alone)]) == 0
    expected = capsys.readouterr().out.splitlines()[:5]
    assert main([*train, str(shared), *args.split()]) == 0
    found = capsys.readouterr().out.splitlines()[:6]
    assert found == [*expected[:3], f"{args.split()[1]} in 1 process", *expected[3:]]
    weights, expected = (torch.load(path, weights_only=True) for path in (shared, alone))
    torch.testing.assert_close(weights, expected)
    assert not dist.is_initialized()


def test_sweep_in_one_process_alone(launched: None, capsys: pytest.CaptureFixture[str]) -> None:
    load("digits")  # or skip
    assert main(["sweep", "--epochs", "1", "--seeds", "1"]) == 0
    assert "in 1 process" not in capsys.readouterr().out
    assert not dist.is_initialized()


def test_code_of_the_docs_runs(launched: None) -> None:
    page = Path(__file__).parents[1] / "docs" / "distributed.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(examples) == 7
    try:
        exec("".join(examples), {})
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_group_is_left_after_an_error(launched: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--distributed", "ddp", "--loss", "cross_entropy"]) == 2
    assert "cross_entropy needs an output for each class" in capsys.readouterr().err
    assert not dist.is_initialized()


COMMAND = "type: torchrun --nproc_per_node 2 -m mlp_ext train --distributed"
UNSET = ", ".join(LAUNCHED)
ERRORS = [
    ("", {"TORCHELASTIC_RUN_ID": "1"}, f"torchrun would train alone; {COMMAND} ddp"),
    ("--distributed ddp", {}, f"the launcher has not set {UNSET}; {COMMAND} ddp"),
    ("--distributed fsdp", {}, f"the launcher has not set {UNSET}; {COMMAND} fsdp"),
    ("--distributed fsdp --layers step", {}, "fsdp has native, fused, stack, got 'step'"),
    ("--distributed ddp --layers fit", {}, "ddp has native, fused, stack, step, got 'fit'"),
    ("--distributed zero", {}, "argument --distributed: must be one of "),
]


@pytest.mark.parametrize(("args", "variables", "message"), ERRORS)
def test_error_is_one_line_before_training(
    args: str,
    variables: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", *LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", *args.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mlp-ext train: error: ") and message in err
    assert err.count("\n") == 1


def test_torch_without_distributed_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert main(["train", "--distributed", "ddp"]) == 2
    assert capsys.readouterr().err.endswith("torch was built without torch.distributed\n")
