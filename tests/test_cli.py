"""The command line as a whole: info, help, versions, and how it ends."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest

import mlp_ext
from mlp_ext.bench import cases
from mlp_ext.bench.training import LAYERS, LOSSES, OPTIMIZERS
from mlp_ext.commands.data import DATASETS
from mlp_ext.commands.distributed import WRAPPERS
from mlp_ext_cli import COMMANDS, arguments, main
from mlp_ext_cli import bench as bench_arguments
from mlp_ext_cli import train as train_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

ENV = {  # finds the package that is tested here; users' output is buffered
    **{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    "PYTHONPATH": os.pathsep.join([str(Path(mlp_ext.__file__).parents[1]), *sys.path[1:]]),
}


def command(*args: str) -> tuple[list[str], dict[str, object]]:
    """`python -m mlp_ext` in a process of its own, with the package that is tested here."""
    return [sys.executable, "-m", "mlp_ext", *args], {"env": ENV, "text": True}


def test_info_prints_the_build_and_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) < 80
    found = {
        name: text.split()
        for name, text in re.findall(r"^(\w+)\s+(.*(?:\n .*)*)", out, flags=re.MULTILINE)
    }
    build = mlp_ext.build_info()
    assert found.keys() > build.keys()
    assert found["torch"] == [build["torch"]]
    assert found["activations"] == list(mlp_ext.ACTIVATIONS)
    assert found["losses"] == list(LOSSES)
    assert found["optimizers"] == list(OPTIMIZERS)
    assert found["data_sets"] == list(DATASETS)
    assert "\n\nnames for the options of mlp-ext train and sweep:\nactivations " in out


def test_info_as_json_holds_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info.items() >= mlp_ext.build_info().items()
    assert info["data_sets"] == list(DATASETS)


@pytest.mark.parametrize("args", [["nonsense"], ["train", "--nonsense"], ["train", "extra"]])
def test_wrong_command_is_an_error(args: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"mlp-ext( train)?: error: .+\n", err)
    assert out == ""


@pytest.mark.slow
def test_module_runs_as_a_command() -> None:
    args, options = command("train", "--layers", "step", "--epochs", "2")
    result = subprocess.run(args, capture_output=True, **options)
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.count("epoch: ") == 2


@pytest.mark.slow
def test_module_exits_2_without_traceback() -> None:
    args, options = command("train", "--lr", "nan")
    result = subprocess.run(args, capture_output=True, **options)
    assert result.returncode == 2
    message = "mlp-ext train: error: argument --lr: must be a positive number, got 'nan'\n"
    assert (result.stdout, result.stderr) == ("", message)


@pytest.mark.slow
def test_closed_pipe_is_silent() -> None:
    args, options = command("train", "--layers", "step", "--epochs", "1000000", "--log-every", "1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(args, **pipes, **options) as process:
        assert process.stdout.readline().startswith("tutorial: 10 rows")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_full_disk_under_the_output_is_an_error() -> None:
    args, options = command("info")
    with open("/dev/full", "w") as full:
        result = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, **options)
    message = "mlp-ext: error: [Errno 28] No space left on device\n"
    assert (result.returncode, result.stderr) == (2, message)


def test_fixed_choices_are_the_librarys() -> None:
    assert arguments.FLOATS == cases.FLOATS
    assert bench_arguments.DTYPES == cases.DTYPES
    assert {name: suite.modes for name, suite in cases.SUITES.items()} == bench_arguments.SUITES
    assert tuple(LAYERS) == train_arguments.LAYERS
    assert tuple(WRAPPERS) == train_arguments.WRAPPERS


NAMES = [add.__name__.removeprefix("add_") for add in COMMANDS]
HELP = [[], ["--help"], ["help"], *([name, "--help"] for name in NAMES)]


@pytest.mark.parametrize("args", [*HELP, ["--version"], ["train", "--epochs", "0"]], ids=" ".join)
def test_arguments_are_parsed_without_torch(args: list[str]) -> None:
    code = f"""
import sys
from mlp_ext_cli import main
main({args!r})
print({{"torch", "mlp_ext", "numpy"}} & {{name.partition(".")[0] for name in sys.modules}})
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert out.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("args", HELP, ids=" ".join)
def test_help_fits_80_columns(
    args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert "%%" not in out and "%(" not in out
    assert err == ""
    _, examples = out.split("\nexamples:\n")
    assert " ".join(["  mlp-ext", *args[:-1]]) in examples


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "plan"]) == main(["plan", "--help"]) == 0
    first, second = capsys.readouterr().out.split("usage: ")[1:]
    assert first == second


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("trian", "mlp-ext: error: there is no command 'trian'; did you mean train?"),
        ("--vresion", "mlp-ext: error: unrecognized arguments: --vresion; did you mean --version?"),
        ("train --epoch 3", "unrecognized arguments: --epoch 3; did you mean --epochs?"),
        ("train --epoch=3", "unrecognized arguments: --epoch=3; did you mean --epochs?"),
        ("train --layers stak", "got 'stak'; did you mean stack?"),
        ("train --activation rellu", "got 'rellu'; did you mean relu?"),
        ("train --loss mes", "got 'mes'; did you mean mse?"),
        ("train --optimizer adm", "got 'adm'; did you mean adam?"),
        ("train --data digit", "got 'digit'; did you mean digits?"),
        ("train --data iris", "got 'iris'"),
        ("train --dtype fp16", "got 'fp16'; did you mean float16?"),
        ("train --dtype bf16", "got 'bf16'; did you mean bfloat16?"),
        ("bench --dtype fp64", "got 'fp64'; did you mean float64?"),
        ("help trian", "mlp-ext: error: there is no command 'trian'; did you mean train?"),
        ("bench --suite layer", "got 'layer'; did you mean layers?"),
    ],
)
def test_near_miss_suggests(args: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(f"{message}\n")
    assert err.count("\n") == 1


def test_version_is_the_installed_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", {"mlp_ext": "1.2.3"}.__getitem__)
    assert main(["--version"]) == 0
    assert capsys.readouterr() == ("mlp-ext 1.2.3\n", "")


@pytest.mark.parametrize(
    "name", ["info", "train", "sweep", "bench --peak", "profile a:b --input 1"]
)
def test_broken_install_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so:\\n cannot open')")
    code = f"import sys; from mlp_ext_cli import main; sys.exit(main({name.split()!r}))"
    env = {**ENV, "PYTHONPATH": os.pathsep.join([str(tmp_path), ENV["PYTHONPATH"]])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    message = f"mlp-ext {name.split()[0]}: error: libtorch.so: cannot open\n"
    assert (out.returncode, out.stdout, out.stderr) == (1, "", message)
