"""The command `mlp-ext train`: what it prints and writes."""

import json
import math
import re
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from terminals import on_terminal
from torch import nn

import mlp_ext
from mlp_ext.bench import noise
from mlp_ext.bench.training import LAYERS, LOSSES, OPTIMIZERS, Layers, sgd_step
from mlp_ext.commands import loop, plots, progress
from mlp_ext.commands import train as train_command
from mlp_ext.commands.loop import TrainingRun
from mlp_ext_cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBER = r"\d\.\d{4}"


def epoch_lines(out: str) -> list[str]:
    """Of one kind; or the rows of the table of several."""
    row = rf"epoch: \d+ loss: .*| *\d+( +({NUMBER}|nan))+"
    return [line for line in out.splitlines() if re.fullmatch(row, line)]


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


def test_long_run_has_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(loop, "GROUP_SECONDS", 0.0)
    monkeypatch.setattr(progress, "BAR_AFTER", 0.0)
    assert main(["train", "--epochs", "20"]) == 0
    assert "/20 [" in terminal.getvalue()
    assert len(epoch_lines(capsys.readouterr().out)) == 11


def test_short_run_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "BAR_AFTER", 1e9)
    assert main(["train", "--epochs", "20"]) == 0
    assert terminal.getvalue() == ""


def test_long_run_has_no_bar_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "BAR_AFTER", 0.0)
    assert main(["train", "--layers", "step", "--epochs", "20"]) == 0
    assert capsys.readouterr().err == ""


def test_short_run_is_not_called_unreliable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(noise, "OTHER_CPUS", -math.inf)
    for shortest, said in ((1e9, False), (0.0, True)):
        monkeypatch.setattr(train_command, "SHORTEST", shortest)
        assert main(["train", "--quiet", "--epochs", "5"]) == 0
        assert ("Timings unreliable (" in capsys.readouterr().out) is said
