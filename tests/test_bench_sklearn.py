"""`mlp-ext bench --suite sklearn`: its table, its file, its errors."""

import csv
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

from mlp_ext.bench import estimators
from mlp_ext.bench.estimators import CASES, PROVIDERS
from mlp_ext_cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
BENCH = ["bench", "--suite", "sklearn"]


@pytest.mark.slow
def test_rows_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimators, "PAUSE", 0.0)
    monkeypatch.setattr(estimators, "FOLDS", 2)
    monkeypatch.setattr(estimators, "SEARCH", {"alpha": [1e-4, 1e-2]})
    for name in ("breast_cancer", "search"):
        monkeypatch.setitem(CASES, name, CASES[name]._replace(epochs=4))
    path = tmp_path / "rows.csv"
    args = ["--cases", "breast_cancer,search", "--rounds", "2", "--threads", "1", "--csv", path]
    assert main([*BENCH, *map(str, args)]) == 0
    rows: list[dict[str, Any]] = [*csv.DictReader(path.read_text().splitlines())]
    cases = [str(CASES[name]) for name in ("breast_cancer", "search")]
    assert [(r["case"], r["provider"]) for r in rows] == [(c, p) for c in cases for p in PROVIDERS]
    for row in rows:
        assert row["dtype"] == PROVIDERS[row["provider"]][1]
        assert float(row["q20_s"]) <= float(row["median_s"]) <= float(row["q80_s"])
    accuracies = {(row["case"], row["accuracy"]) for row in rows}
    assert len(accuracies) == len(cases)  # the same networks
    out = capsys.readouterr().out
    for row in rows:
        assert f"  {row['provider']} " in out
        assert f"{float(row['accuracy']):.1%}" in out


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, "--list"]) == 0
    assert capsys.readouterr().out.startswith("sklearn: cases digits, ")
    assert main(["bench", "--list"]) == 0
    assert "\nsklearn: cases digits, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--peak", "--peak: not in --suite sklearn"),
        ("--providers fused", "--providers: not in --suite sklearn"),
        ("--device cuda", "--device: sklearn has cpu only"),
        ("--threads 1,2", "--threads: sklearn has one number of threads"),
        (
            "--cases digit",
            "--cases: sklearn has digits, breast_cancer, mnist5k, search, got 'digit'; "
            "did you mean digits?",
        ),
    ],
)
def test_errors(args: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, *args.split()]) == 2
    assert capsys.readouterr().err == f"mlp-ext bench: error: argument {message}\n"
