"""Rows of `mlp-ext bench`: where they were measured, their files, their noise and their
pictures."""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benching import ROW

from mlp_ext import _C
from mlp_ext.bench import machine, plot
from mlp_ext.bench.noise import noise
from mlp_ext.bench.rows import (
    COLUMNS,
    OLDER_COLUMNS,
    Row,
    as_number,
    as_time,
    read_csv,
    write_csv,
)

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.0, "2 s"),
        (3.14e-3, "3.14 ms"),
        (0.9996e-3, "1 ms"),
        (1e-6, "1 us"),
        (3.5e-7, "350 ns"),
        (4e-10, "0.4 ns"),
        (1234.5, "1230 s"),
    ],
)
def test_time_has_a_unit(seconds: float, text: str) -> None:
    assert as_time(seconds) == text


# --- Where it was measured ---


def test_device_name_has_the_instruction_set() -> None:
    names = {"avx512": "AVX-512", "avx2": "AVX2", "generic": "generic"}
    assert machine.device_name("cpu").endswith(
        f" ({_C.machine()['name']}, {names[_C.instruction_set()]})"
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A package under git, committed."""
    package = tmp_path / "mlp_ext"
    package.mkdir()
    (package / "__init__.py").write_text("")
    identity = ["-c", "user.name=name", "-c", "user.email=name@example.org"]
    for args in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *args], cwd=tmp_path, check=True)
    return tmp_path


def test_commit_has_a_plus_where_a_source_has_changed(repository: Path) -> None:
    package = repository / "mlp_ext"
    clean = machine.commit.__wrapped__(package)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (repository / "results.csv").write_text("no source")
    assert machine.commit.__wrapped__(package) == clean
    (package / "__init__.py").write_text("changed")
    assert machine.commit.__wrapped__(package) == clean + "+"


def test_commit_is_unknown_where_the_package_is_not_under_git(repository: Path) -> None:
    for installed in (repository / ".venv" / "mlp_ext", repository.parent):
        installed.mkdir(parents=True, exist_ok=True)
        assert machine.commit.__wrapped__(installed) == "unknown"


# --- Pictures and files ---


@pytest.fixture
def rows() -> list[Row]:
    native = replace(ROW, provider="native", ratio_to_native=1.0, ratio_q20=1.0, ratio_q80=1.0)
    other = replace(ROW, case="4x3x2", ratio_to_native=0.5, ratio_q20=0.4, ratio_q80=0.6)
    return [native, ROW, replace(ROW, provider="another", ratio_to_native=1.9), other]


COLUMN_NAMES = (
    "suite, case, mode, activation, optimizer, dtype, device, device_name, threads, provider, "
    "median_s, q20_s, q80_s, ratio_to_native, ratio_q20, ratio_q80, torch, mlp_ext, commit, "
    "timestamp, gflops, bound, share_of_bound, path, other_cpus"
)


def test_columns_are_those_promised() -> None:
    assert COLUMN_NAMES.split(", ") == COLUMNS


def test_csv_is_read_as_it_was_written(rows: list[Row], tmp_path: Path) -> None:
    rows.append(replace(ROW, ratio_q20=None, share_of_bound=None, other_cpus=None))
    write_csv(rows, tmp_path / "rows.csv")
    assert read_csv(tmp_path / "rows.csv") == rows


OTHERS = ("accuracy", "sklearn-fit")  # with columns of their own
PATHS = [path for path in sorted(RESULTS.rglob("*.csv")) if path.stem not in OTHERS]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_committed_rows_are_read(path: Path) -> None:
    rows = read_csv(path)
    with path.open() as file:
        assert len(rows) == len(file.readlines()) - 1 > 0


def test_csv_of_an_older_version_is_read(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for suite, optimizer in (("layers", ""), ("train", "sgd")):
        without = {"ratio_q20": None, "ratio_q80": None, "other_cpus": None, "path": ""}
        expected = [replace(row, suite=suite, optimizer=optimizer, **without) for row in rows]
        write_csv(expected, path)
        head, *lines = [line.split(",") for line in path.read_text().splitlines()]
        places = [head.index(name) for name in OLDER_COLUMNS[:-1] if name != "optimizer"]
        places.append(head.index("share_of_bound"))
        head[places[-1]] = "share_of_peak"
        older = [",".join(cells[place] for place in places) for cells in (head, *lines)]
        path.write_text("\n".join(older) + "\n")
        assert read_csv(path) == expected


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.234, "0.23"), (1.0, "1.00"), (9.996, "10.0"), (50.58, "50.6"), (104.5, "104")],
)
def test_ratio_has_three_digits(ratio: float, text: str) -> None:
    assert as_number(ratio) == text


# --- Noise ---

NOISY = [
    ({"other_cpus": 0.15}, 1, ""),
    ({"other_cpus": None, "share_of_bound": None, "ratio_q20": None}, 1, ""),
    ({"other_cpus": 1.1}, 2, ""),  # one thread leaves a CPU free
    ({"other_cpus": 1.3}, None, ""),
    ({"other_cpus": math.nan}, 1, ""),
    (
        {"other_cpus": 1.3, "ratio_q20": 1.5},
        2,
        "other processes used 1.3 of 2 CPUs; 1 of 1 ratios vary by over 30%, fused at 10x10x5 "
        "1.50-2.10: stop other programs and measure again",
    ),
    (
        {"ratio_q20": 1.5},
        1,
        "1 of 1 ratios vary by over 30%, fused at 10x10x5 1.50-2.10: measure again with more "
        "--rounds",
    ),
    (
        {"share_of_bound": 1.1},
        1,
        "up to 110% of the compute bound, which was measured too low: measure again",
    ),
    ({"share_of_bound": 1.1, "bound": "memory"}, 1, ""),  # caches are faster
]


@pytest.mark.parametrize(("fault", "cpus", "reason"), NOISY)
def test_noise_is_said_in_one_line(fault: dict[str, object], cpus: int | None, reason: str) -> None:
    native = replace(ROW, provider="native", ratio_to_native=1.0, ratio_q20=1.0, ratio_q80=1.0)
    line = noise([native, replace(ROW, **fault)], cpus)
    assert line == (f"timings unreliable: {reason}" if reason else "")


def test_other_cpu_seconds_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle, waiting and guests' ticks do not count; nor does cpu1, which is not ours to use."""
    lines = "cpu 9 9 9 9\ncpu0 100 20 30 5000 70 1 2 3 4 5\ncpu1 9 9 9 9 9 9 9 9 9 9\n"
    stat = SimpleNamespace(read_text=lambda: lines + "cpu10 200 0 0 9 9 0 0 44 0 0\nintr 5\n")
    monkeypatch.setattr(machine, "Path", {"/proc/stat": stat}.__getitem__)
    monkeypatch.setattr(machine, "cpus", lambda: {0, 10})
    monkeypatch.setattr(os, "sysconf", {"SC_CLK_TCK": 100}.__getitem__)
    monkeypatch.setattr(time, "process_time", lambda: 0.5)
    assert machine.other_cpu_seconds() == 3.5


# --- Pictures ---


def drawn(axes: Any) -> dict[str, list[tuple[float, str]]]:
    """Place and label of each annotated point, by the name in the legend."""
    colors = {
        handle.get_color(): handle.get_label().partition(" ")[0]
        for handle in axes.get_legend().legend_handles
    }
    points: dict[str, list[float]] = {}
    for line in axes.lines:
        if len(line.get_xdata()) == 1 and line.get_marker() != "None":
            points.setdefault(colors[line.get_color()], []).append(line.get_xdata()[0])
    return points


def test_points_are_the_ratios_by_provider(rows: list[Row]) -> None:
    pytest.importorskip("matplotlib")
    (axes,) = plot.ratios(rows).axes
    assert drawn(axes) == {"fused": [2.0, 0.5], "another": [1.9]}
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["fused (mean 1.00x)", "another (mean 1.90x)"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["10x10x5", "4x3x2"]
    assert {"2.00", "0.50", "1.90"} == {text.get_text() for text in axes.texts}
    assert axes.get_xscale() == "log"
    assert "times as fast as native" in axes.get_xlabel()
    for part in ("Processor (AVX2)", "1 thread", "float32", "forward and backward", "relu"):
        assert part in axes.get_title()


def test_ticks_are_plain_numbers(rows: list[Row]) -> None:
    pytest.importorskip("matplotlib")
    (axes,) = plot.ratios([*rows, replace(ROW, ratio_to_native=2000.0, ratio_q80=2100.0)]).axes
    assert axes.get_xticklabels()[-1].get_text() == "2000x"


def test_whiskers_are_the_quantiles(rows: list[Row]) -> None:
    pytest.importorskip("matplotlib")

    def whiskers(rows: list[Row]) -> list[list[float]]:
        (axes,) = plot.ratios(rows).axes
        return [[*line.get_xdata()] for line in axes.lines if line.get_alpha()]

    assert whiskers(rows) == [[1.8, 2.1], [1.8, 2.1], [0.4, 0.6]]
    assert whiskers([replace(row, ratio_q20=None, ratio_q80=None) for row in rows]) == []


def test_nothing_is_drawn_over_another() -> None:
    """Eight providers in the committed rows: labels, markers and legend keep clear."""
    pytest.importorskip("matplotlib")
    rows = read_csv(RESULTS / "train-step-relu.csv")
    rows += [replace(row, provider="mine") for row in rows if row.provider == "compile"]
    rows += [replace(row, provider="yours") for row in rows if row.provider == "fused"]
    figure = plot.ratios(rows)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    boxes += [axes.get_legend().get_window_extent(), axes.title.get_window_extent()]
    boxes += [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) == 8 * 7 + 2 + 7
    pairs = combinations(boxes, 2)
    assert not [(a, b) for a, b in pairs if a.shrunk(0.9, 0.9).overlaps(b.shrunk(0.9, 0.9))]
    line = axes.transData.transform((1, 0))[0]
    assert not [box for box in boxes[: 8 * 7] if box.x0 < line < box.x1]


def test_each_setting_has_a_panel(rows: list[Row]) -> None:
    pytest.importorskip("matplotlib")
    sigmoid = [replace(row, activation="sigmoid") for row in rows]
    assert len(plot.ratios(rows + sigmoid).axes) == 2


def test_plot_is_drawn_again_from_files(rows: list[Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second, picture = (tmp_path / name for name in ("a.csv", "b.csv", "bars.svg"))
    write_csv(rows, first)
    write_csv([replace(row, threads=2) for row in rows], second)
    plot.main([str(first), str(second), str(picture)])
    assert picture.read_text().count("2 threads") == 1


@pytest.mark.parametrize(
    ("content", "picture", "message"),
    [
        (None, "bars.png", "cannot read 'rows.csv': No such file or directory"),
        ("a,b\n1,2\n", "bars.png", "rows.csv: missing columns suite, case, mode and 22 more"),
        (",".join(COLUMNS[:-1]) + "\n", "bars.png", "rows.csv: missing column other_cpus"),
        (",".join(COLUMNS) + ",x\n", "bars.png", "rows.csv: unknown column x"),
        (",".join(COLUMNS) + "\n", "bars.png", "nothing to plot: native is the only provider"),
        (",".join(COLUMNS) + "\nlayers,1x1x1\n", "bars.png", "rows.csv, line 2: "),
        ("", "bars.xyz", "argument picture: the file must end in one of "),
        ("", "missing/bars.png", "argument picture: cannot write 'missing/bars.png': No such"),
    ],
)
def test_drawing_again_has_errors_of_one_line(
    content: str | None,
    picture: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("rows.csv").write_text(content)
    with pytest.raises(SystemExit) as stop:
        plot.main(["rows.csv", picture])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"python -m mlp_ext.bench.plot: error: {message}")
    assert err.count("\n") == 1
