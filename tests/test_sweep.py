"""The command `mlp-ext sweep`: each network is the one that train would have trained; the table,
the best setting and the files say what the networks say."""

import csv
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from samples import load
from terminals import on_terminal

from mlp_ext.bench import noise
from mlp_ext.bench.training import LOSSES, make_mlp, sgd_step
from mlp_ext.commands import many, progress
from mlp_ext.commands import sweep as sweep_command
from mlp_ext.commands.loop import accuracy, make_optimizer
from mlp_ext.commands.many import Held, Network, Result, Setting, Sweep, networks, train_many
from mlp_ext.commands.sweep import ACCURACY, LOSS, Outcome
from mlp_ext_cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "--data breast_cancer --hidden 4 --epochs 3 --seeds 2"


@pytest.fixture(autouse=True)
def data_sets() -> None:
    load("digits")  # or skip


def sweep(args: str) -> list[dict[str, str]]:
    """Runs it in the current folder; returns the rows of its CSV file."""
    assert main(["sweep", *args.split(), "--results", "networks.csv"]) == 0
    with open("networks.csv", newline="") as file:
        return list(csv.DictReader(file))


def table(out: str) -> list[list[str]]:
    """The cells of the printed table, its heading first."""
    lines = out.split("\n\n")[-2].splitlines()
    return [re.split(r" {2,}", line.strip()) for line in lines]


def next_command(out: str) -> list[str]:
    text = out.partition("To train it:\n")[2].replace("\\\n", " ")
    name, *args = shlex.split(text)
    assert name == "mlp-ext"
    return args


def test_output_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    args = "--data digits --lr 0.01,0.3 --hidden 8,6-5 --seeds 2 --epochs 4 --folds 3"
    assert main(["sweep", *args.split()]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) < 80
    assert out.splitlines()[:5] == [
        "digits: 1437 rows in 3 folds, 64 features",
        "networks 64-8-10, 64-6-5-10, relu; float32 on 1 CPU thread",
        "cross_entropy, sgd, 4 epochs",
        "24 networks: 2 hidden x 2 lr x 2 seeds x 3 folds",
        "",
    ]
    heading, *rows = table(out)
    found = ["held-out acc", "std", "held-out loss", "train loss"]
    assert heading == ["hidden", "lr", *found]
    assert [row[:2] for row in rows] == [
        ["8", "0.01"],
        ["8", "0.3"],
        ["6-5", "0.01"],
        ["6-5", "0.3"],
    ]
    (best,) = (row for row in rows if row[-1] == "best")
    shares = [float(row[2].rstrip("%")) for row in rows]
    assert float(best[2].rstrip("%")) == max(shares)
    number = r"[\d.]+ ([mu]s|s)"
    last = " ".join(out.split("\n\n")[-1].split())
    last = re.sub(r"Timings unreliable \(.*?\)\. ", "", last)
    assert re.match(
        rf"24 networks trained in {number}\. One after another: about {number} with TrainStep.fit, "
        rf"{number} with torch \(estimates from one network of each structure\)\. Best: hidden "
        rf"{best[0]}, batch size 32, lr {best[1]}: held-out accuracy {best[2]} \+- {best[3]}\. "
        "To train it: mlp-ext train ",
        last,
    )


def test_quiet_prints_the_table_and_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *SMALL.split(), "--quiet"]) == 0
    heading, *rest = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["lr", "held-out"]
    assert rest[4] == ""
    assert rest[5].startswith("8 networks trained in ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        "--data digits --hidden 8-6 --lr 0.3 --batch-size 50 --optimizer sgd",
        "--data breast_cancer --lr 0.01 --weight-decay 0.2 --optimizer adamw --activation tanh",
        "--data breast_cancer --loss mse --lr 0.1 --batch-size 1000 --seed 3",
        "--data own.csv --target y --lr 0.01 --optimizer adam",
        "--data own.csv --target kind --lr 0.01 --optimizer rmsprop --loss bce",
    ],
)
def test_train_has_the_numbers_of_the_first_seed(
    args: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the command that the sweep prints."""
    rows = [f"{i % 7},{i * i % 11},{(i % 7) * (i % 3)}.5,{i % 3 % 2}" for i in range(80)]
    Path("own.csv").write_text("\n".join(["a,b,y,kind", *rows]))
    first, *_ = sweep(f"{args} --epochs 3 --seeds 2 --dtype float64")
    command = next_command(capsys.readouterr().out)
    assert main([*command, "--layers", "native", "--quiet", "--json", "train.json"]) == 0
    result = json.loads(Path("train.json").read_text())["results"]["native"]
    assert float(first["train_loss"]) == pytest.approx(result["losses"][-1], rel=1e-9)
    if "held_out" in result:
        assert float(first["held_out_accuracy"]) == pytest.approx(result["held_out"], rel=1e-9)
    if "test_loss" in result:
        assert float(first["held_out_loss"]) == pytest.approx(result["test_loss"], rel=1e-9)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_networks_are_those_of_an_eager_loop_on_their_folds(loss: str) -> None:
    data = load("digits", dtype=torch.float64)
    run = Sweep(data, 3, "relu", loss, "sgd", epochs=2)
    settings = [
        Setting((6,), 40, 0.3, None),
        Setting((6,), 40, 0.1, 0.01),
        Setting((5, 4), 40, 0.2, 0),
    ]
    chosen = networks(settings, [0, 5], 3)
    results, _ = train_many(run, chosen, lambda epochs: None)
    assert [result.network for result in results] == chosen
    for network, train_loss, (held,) in results[::4]:
        widths = [64, *network.setting.hidden, 10]
        model = make_mlp(widths, network.seed, last=LOSSES[loss].last).double()
        criterion = LOSSES[loss].criterion()
        optimizer = make_optimizer(model, "sgd", network.setting.lr, network.setting.weight_decay)
        step = sgd_step(model, criterion, optimizer)
        rows, out = run.parts[network.fold]
        generator = torch.Generator().manual_seed(network.seed)
        for _ in range(run.epochs):
            losses = []
            for batch in rows[torch.randperm(len(rows), generator=generator)].split(40):
                losses.append(step(data.x[batch], data.y[batch]) * len(batch))
        assert train_loss == pytest.approx(sum(losses).item() / len(rows), rel=1e-9)
        assert held.epochs == 2
        assert held.accuracy == pytest.approx(accuracy(model, data.x[out], data.y[out], loss))
        with torch.no_grad():
            expected = criterion(model(data.x[out]), data.y[out]).item()
        assert held.loss == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "tutorial"])
@pytest.mark.parametrize("folds", [2, 3, 10])
def test_folds_part_the_training_rows_evenly(name: str, folds: int) -> None:
    data = load(name)
    parts = Sweep(data, folds, "relu", "mse", "sgd", 1, seed=4).parts
    assert list(parts) == list(range(folds))
    every = torch.arange(len(data.x))
    assert torch.equal(torch.cat([out for _, out in parts.values()]).sort().values, every)
    for rows, out in parts.values():
        assert torch.equal(torch.cat([rows, out]).sort().values, every)
    if data.classes:
        classes = torch.cat([data.y, 1 - data.y], 1) if data.classes == 2 else data.y
        counts = torch.stack([classes[out].sum(0) for _, out in parts.values()])
        assert (counts.amax(0) - counts.amin(0)).max() <= 1


def test_other_seeds_draw_other_folds() -> None:
    data = load("digits")
    first, second = (Sweep(data, 3, "relu", "mse", "sgd", 1, seed=s).parts[0][1] for s in (0, 1))
    assert not torch.equal(first, second)


def test_networks_that_do_not_fit_memory_train_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Sweep(load("breast_cancer"), 2, "relu", "mse", "sgd", epochs=2)
    chosen = networks([Setting((4,), 50, 0.1, None), Setting((4,), 50, 0.2, None)], range(3), 2)
    expected, _ = train_many(run, chosen, lambda epochs: None)
    seen: list[int] = []
    monkeypatch.setattr(many, "TOGETHER", 5 * (30 * 4 + 4 + 5))
    assert train_many(run, chosen, seen.append)[0] == expected
    assert seen == [5, 5, 5, 5, 2, 2]


def test_table_has_mean_and_deviation_of_the_networks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = "--data digits --hidden 8 --lr 0.03,0.3 --batch-size 32,64 --weight-decay 0,0.1"
    rows = sweep(f"{args} --seeds 2 --folds 2 --epochs 3")
    assert len(rows) == 2 * 2 * 2 * 2 * 2
    assert list(rows[0]) == [
        *("hidden", "batch_size", "lr", "weight_decay", "seed", "fold"),
        *("held_out_accuracy", "held_out_loss", "train_loss"),
    ]
    assert len({tuple(row.values())[:6] for row in rows}) == len(rows)
    heading, *lines = table(capsys.readouterr().out)
    assert heading[:3] == ["batch size", "lr", "weight decay"]
    assert len(lines) == 8
    for line in lines:
        setting = [float(cell) for cell in line[:3]]
        own = [r for r in rows if [float(r[n]) for n in list(r)[1:4]] == setting]
        assert len(own) == 4
        shares, held, train = ([float(row[name]) for row in own] for name in list(rows[0])[6:])
        found = [f"{mean(shares):.1%}", f"{stdev(shares):.1%}", f"{mean(held):.4f}"]
        assert line[3:7] == [*found, f"{mean(train):.4f}"]


def outcome(lr: float, *values: tuple[float, float, float]) -> Outcome:
    setting = Setting((4,), 32, lr, None)
    held = [(train, Held(1, accuracy, loss)) for accuracy, loss, train in values]
    results = [Result(Network(setting, i, None), t, (h,)) for i, (t, h) in enumerate(held)]
    return Outcome(setting, results)


def test_best_setting() -> None:
    low, high = outcome(1, (0.5, 0.2, 0.1), (0.7, 0.4, 0.1)), outcome(2, (0.8, 0.9, 0.1))
    same, nan = outcome(3, (0.8, 0.8, 0.1)), outcome(4, (0.9, 0.1, math.nan))
    best = sweep_command._best
    assert best([low, high, nan], ACCURACY) is high
    assert best([low, high, same], ACCURACY) is same
    assert best([low, high, nan], LOSS) is low
    assert best([nan], LOSS) is None


@pytest.mark.slow
def test_losses_that_are_not_finite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = "--data own.csv --target y --seeds 2 --epochs 5 --hidden 4"
    Path("own.csv").write_text("\n".join(["a,y", *(f"{i},{i * i}" for i in range(60))]))
    assert {row["train_loss"] for row in sweep(f"{data} --lr 1e30")} == {"nan"}
    out = capsys.readouterr().out
    assert out.endswith("\nThe loss of every setting is not finite: try a smaller --lr.\n")
    sweep(f"{data} --lr 1e30,0.1 --plot curves.png")
    _, bad, good = table(capsys.readouterr().out)
    assert bad == ["1e+30", "nan", "nan", "nan"]
    assert good[-1] == "best"


def test_bce_of_a_network_that_diverged_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = "--data breast_cancer --loss bce --lr 1e300 --seeds 2 --epochs 3"
    assert main(["sweep", *args.split()]) == 2
    err = capsys.readouterr().err
    what = "argument --loss: bce: a network's outputs are not finite"
    assert err == f"mlp-ext sweep: error: {what}; use a smaller --lr or bce_with_logits\n"


def figure(folder: Path, args: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path: drawn.append(self) or save(self, path)
    )
    assert main(["sweep", *args.split(), "--plot", "sweep.png"]) == 0
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    return drawn[0]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [3, 25])
def test_plot_of_one_axis_is_curves(
    epochs: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = f"--data digits --hidden 8,6-5 --lr 0.3 --seeds 3 --epochs {epochs}"
    axes = figure(folder, args, monkeypatch).axes[0]
    assert [line.get_label() for line in axes.lines] == ["hidden 8", "hidden 6-5"]
    expected = [1, 2, 3] if epochs == 3 else [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert all(list(line.get_xdata()) == expected for line in axes.lines)
    last = [f"{line.get_ydata()[-1]:.1%}" for line in axes.lines]
    assert last == [row[1] for row in table(capsys.readouterr().out)[1:]]
    assert axes.get_ylabel() == "held-out accuracy"


@pytest.mark.slow
def test_plot_of_several_axes_is_a_heat_map(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = "--data digits --hidden 8,6-5 --lr 0.1,0.2,0.4 --weight-decay 0,0.1 --seeds 2 --epochs 2"
    axes, _ = figure(folder, args, monkeypatch).axes
    heading, *rows = table(capsys.readouterr().out)
    assert heading[:3] == ["hidden", "lr", "weight decay"]
    assert [text.get_text() for text in axes.texts] == [row[3] for row in rows]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["hidden 8", "hidden 6-5"]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    assert columns == [f"lr {row[1]}, weight decay {row[2]}" for row in rows[:6]]
    (frame,) = axes.patches
    row, column = divmod([row[-1] for row in rows].index("best"), 6)
    assert frame.get_xy() == (column - 0.5, row - 0.5)


@pytest.mark.slow
def test_plot_of_losses_with_networks_that_diverged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own.csv").write_text("\n".join(["a,y", *(f"{i},{i * i}" for i in range(60))]))
    data = "--data own.csv --target y --seeds 1 --epochs 3"
    figure(folder, f"{data} --hidden 4,5 --lr 1e30,0.1", monkeypatch)
    figure(folder, f"{data} --hidden 4,5 --lr 1e30,1e29", monkeypatch)


ERRORS = [
    ("--data iris", "argument --data: must be one of "),
    ("--data digit", "argument --data: must be one of "),
    ("--data seed", "argument --data: 'seed' is now called tutorial"),
    ("--data tutorial", "argument --data: tutorial has no rows to hold out; add --folds"),
    ("--data none.csv --target y", "argument --data: cannot read 'none.csv': No such file"),
    ("--data none.csv", "argument --data: add --target COLUMN, the column to predict"),
    ("--data folder --target y", "argument --data: cannot read 'folder': Is a directory"),
    ("--data file --target y", "argument --data: file has only the column 'before'; expected "),
    ("--target y", "argument --target: requires --data FILE.csv"),
    ("--csv file --target y", "argument --target: requires --data FILE.csv"),
    ("--regression", "argument --regression: requires --data FILE.csv"),
    ("--data file --target y --results file", "argument --results: is the file of --data; name "),
    ("--results file", "argument --results: 'file' has no results of a sweep, which would "),
    ("--hidden 0", "argument --hidden: must be a whole number from 1 to 2147483647, got '0'"),
    ("--hidden 5-", "argument --hidden: must be a whole number from 1 to 2147483647, got ''"),
    ("--hidden 5,,5", "argument --hidden: must be a whole number"),
    ("--hidden 1000000000-1000000000", "argument --hidden: "),  # 4e18 bytes
    ("--lr 0.1,fast", "argument --lr: must be a positive number, got 'fast'"),
    ("--lr 0", "argument --lr: must be a positive number, got '0'"),
    ("--weight-decay=-1", "argument --weight-decay: must be a number from 0, got '-1'"),
    ("--batch-size 0", "argument --batch-size: must be a whole number"),
    ("--seeds 0", "argument --seeds: must be a whole number"),
    ("--seeds 1000000", "4000000 networks are too many; at most 1000000 are trained"),
    ("--folds 1", "argument --folds: must be a whole number from 2 to 2147483647, got '1'"),
    ("--folds 1500 --seeds 1", "argument --folds: digits has 1437 rows, got 1500"),
    ("--epochs 0", "argument --epochs: must be a whole number"),
    ("--seed=-1", "argument --seed: must be a whole number from 0"),
    ("--activation rellu", "argument --activation: must be one of "),
    ("--loss nll", "argument --loss: must be one of "),
    ("--data breast_cancer --loss cross_entropy", "argument --loss: cross_entropy needs an output"),
    ("--optimizer lion", "argument --optimizer: must be one of "),
    ("--dtype int8", "argument --dtype: must be one of "),
    ("--device tpu", "argument --device: must be one of "),
    ("--plot sweep.xyz", "argument --plot: the file must end in one of "),
    ("--plot missing/sweep.png", "argument --plot: cannot write 'missing/sweep.png': No such file"),
    ("--results missing/f.csv", "argument --results: cannot write 'missing/f.csv': No such file"),
    ("--results folder", "argument --results: 'folder' is not a file"),
    ("--csv folder", "argument --csv: 'folder' is not a file"),  # its first name
]


@pytest.mark.parametrize(("args", "message"), ERRORS, ids=[args for args, _ in ERRORS])
def test_error_is_one_line_before_training(
    args: str, message: str, assert_refused: Callable[[str, str, str], None]
) -> None:
    assert_refused("sweep", args, message)


def test_folder_may_have_the_name_of_a_data_set(folder: Path) -> None:
    (folder / "breast_cancer").mkdir()
    assert main(["sweep", *SMALL.split()]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--data digit", "got 'digit'; did you mean digits?"),
        ("--activation rellu", "got 'rellu'; did you mean relu?"),
        ("--loss cross_entopy", "did you mean cross_entropy?"),
        ("--optimizer adm", "got 'adm'; did you mean adam?"),
        ("--fold 5", "unrecognized arguments: --fold 5; did you mean --folds?"),
    ],
)
def test_near_miss_suggests(args: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *args.split()]) == 2
    assert capsys.readouterr().err.endswith(f"{message}\n")


def test_interrupted_sweep_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    before = f"{','.join(sweep_command.AXES)},seed,fold,of another sweep"
    (folder / "file").write_text(before)
    monkeypatch.setattr(many.TrainSteps, "fit", interrupt)
    assert main(["sweep", *SMALL.split(), "--results", "file", "--plot", "sweep.png"]) == 130
    assert capsys.readouterr().err == "\nmlp-ext: interrupted\n"
    assert {path.name for path in folder.iterdir()} == {"folder", "file"}
    assert (folder / "file").read_text() == before


@pytest.mark.parametrize("shown", [True, False])
def test_long_sweep_has_a_bar_on_a_terminal(shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "BAR_AFTER", 0.0)
    assert main(["sweep", *SMALL.split(), *["--quiet"] * (not shown)]) == 0
    assert ("/24 [" in terminal.getvalue()) is shown
    assert terminal.getvalue() == "" or shown


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--data digits", "--loss cross_entropy"),
        ("--data breast_cancer", "--loss bce_with_logits"),
        ("--data tutorial --folds 2", "--loss mse"),
    ],
)
def test_usual_loss_is_that_of_the_targets(
    args: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", *args.split(), "--epochs", "1", "--seeds", "1"]) == 0
    assert expected in " ".join(next_command(capsys.readouterr().out))


def test_next_command_is_complete_and_quoted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{i},{i * i}" for i in range(40)]
    Path("my own.csv").write_text("\n".join(["a,the price", *rows]))
    args = ["--data", "my own.csv", "--target", "the price", "--regression", "--hidden", "4-3"]
    rest = "--lr 0.001 --weight-decay 1e-4 --batch-size 7 --seed 2 --dtype float64 --seeds 1"
    assert main(["sweep", *args, *rest.split(), "--optimizer", "adamw", "--epochs", "2"]) == 0
    assert next_command(capsys.readouterr().out) == [
        *("train", "--data", "my own.csv", "--target", "the price", "--regression"),
        *("--hidden", "4,3", "--activation", "relu", "--loss", "mse", "--optimizer", "adamw"),
        *("--lr", "0.001", "--weight-decay", "0.0001", "--batch-size", "7", "--epochs", "2"),
        *("--seed", "2", "--dtype", "float64"),
    ]


def test_busy_machine_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(noise, "OTHER_CPUS", -math.inf)
    for shortest, said in ((1e9, False), (0.0, True)):
        monkeypatch.setattr(sweep_command, "SHORTEST", shortest)
        assert main(["sweep", *SMALL.split()]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert ("structure). Timings unreliable (other processes used " in out) is said


def test_estimate_is_that_of_the_steps_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the median epoch of the network that is timed, which is cut."""
    timed: list[int] = []

    def fixed(run: Sweep, network: Network, data: Any) -> Sequence[Any]:
        timed.append(len(data.x))
        part = many.TrainingRun("fit", torch.nn.Identity(), sgd_step, [], [3.0, 2.0, 5.0])
        return [part]

    monkeypatch.setattr(many, "_timed", fixed)
    run = Sweep(load("digits"), None, "relu", "mse", "sgd", epochs=7)
    settings = [Setting((4,), 10, 0.1, None), Setting((4,), 100, 0.1, None)]
    found = many.one_after_another(run, networks(settings, range(3), None))
    assert timed == [500, 1437]  # rows: 50 batches, all
    assert found["fit"] == pytest.approx(3 * 7 * 3 * (144 / 50 + 1))


def test_data_is_not_overwritten_by_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.csv"
    path.write_text("age,price\n1,2\n")
    assert main(["sweep", "--results", str(path)]) == 2
    assert f"to train on it: --data {path} --target COLUMN" in capsys.readouterr().err
    assert path.read_text() == "age,price\n1,2\n"
