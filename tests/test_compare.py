"""The command `mlp-ext compare`: rows before and after a change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benching import ROW

from mlp_ext.bench.rows import Row, write_csv
from mlp_ext.commands.compare import change
from mlp_ext_cli import main

NATIVE = replace(ROW, provider="native", ratio_to_native=1.0, ratio_q20=1.0, ratio_q80=1.0, path="")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def compare(before: list[Row], after: list[Row], *options: str) -> int:
    write_csv(before, Path("before.csv"))
    write_csv(after, Path("after.csv"))
    return main(["compare", "before.csv", "after.csv", *options])


def scaled(row: Row, factor: float) -> Row:
    """As many times as fast."""
    assert row.ratio_q20 and row.ratio_q80
    return replace(
        row,
        ratio_to_native=factor * row.ratio_to_native,
        ratio_q20=factor * row.ratio_q20,
        ratio_q80=factor * row.ratio_q80,
    )


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.2, "faster"), (1.1, "same"), (0.9, "same"), (0.8, "slower")]
)
def test_verdict_is_same_within_the_quantiles(factor: float, verdict: str) -> None:
    found = change(ROW, scaled(ROW, factor))  # 1.8 to 2.1
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(factor)
    assert (found.low, found.high) == (
        pytest.approx(factor * 1.8 / 2.1),
        pytest.approx(factor * 2.1 / 1.8),
    )


def test_quantiles_of_older_files_are_those_of_times() -> None:
    older = replace(ROW, ratio_q20=None, ratio_q80=None)  # 0.9 to 2 ms, median 1 ms
    found = change(older, ROW)
    assert (found.low, found.high) == (pytest.approx(1.8 / (2 / 0.9)), pytest.approx(2.1 / (2 / 2)))


def test_table_has_ratios_range_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    fast = replace(scaled(ROW, 1.5), case="4x3x2", path="dots/small")
    before = [NATIVE, ROW, replace(ROW, provider="mine"), replace(ROW, case="4x3x2")]
    after = [
        replace(NATIVE, median_s=1.1e-3),
        ROW,
        scaled(replace(ROW, provider="mine"), 0.5),
        fast,
    ]
    assert compare(before, after) == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "layers full relu float32 cpu, 1 thread" in lines
    at = lines.index("10x10x5")
    assert lines[at + 1] == "fused 2.00x 2.00x 1.00x 0.86-1.17 same"
    assert lines[at + 2] == "mine 2.00x 1.00x 0.50x 0.43-0.58 slower"
    assert lines[at + 3 : at + 6] == [
        "4x3x2",
        "fused 2.00x 3.00x 1.50x 1.29-1.75 faster",
        "path: small -> dots/small",
    ]
    assert " ".join(lines[-2:]) == (
        "3 rows: 1 faster, 1 slower, 1 same; geometric mean change 0.91x; "
        "native itself ran in 1.10x the time"
    )
    assert all(len(line) <= 80 for line in out.splitlines())
    assert err == ""


def test_exit_status_tells_slower_rows_only_if_asked() -> None:
    for factor, status in ((0.5, 1), (1.0, 0), (2.0, 0)):
        rows = [NATIVE, scaled(ROW, factor)]
        assert compare([NATIVE, ROW], rows) == 0
        assert compare([NATIVE, ROW], rows, "--fail-if-slower") == status


@pytest.mark.parametrize("column", ["case", "mode", "activation", "dtype", "threads", "provider"])
def test_rows_are_matched_by_what_was_run(column: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(ROW, **{column: 2 if column == "threads" else "other"})
    assert compare([ROW, other], [ROW]) == 0
    out, err = capsys.readouterr()
    assert "\n1 row: " in out
    assert err == "mlp-ext compare: 1 of 2 rows skipped: only in before.csv\n"
    assert compare([other], [ROW]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("mlp-ext compare: error: nothing to compare: ")
    assert (out, err.count("\n")) == ("", 1)


def test_two_machines_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare([ROW], [replace(ROW, device_name="Another (AVX-512)")]) == 0
    line = "mlp-ext compare: different machines: Processor (AVX2) before, Another (AVX-512) after\n"
    assert capsys.readouterr().err == line


def test_noisy_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare([ROW], [replace(ROW, ratio_q80=4.0)]) == 0
    err = capsys.readouterr().err
    assert err.startswith("mlp-ext compare: after.csv: timings unreliable: 1 of 1 ratios vary")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (None, "cannot read 'before.csv': No such file or directory"),
        ([], "nothing to compare: before.csv has no rows, after.csv has layers full relu float32"),
        ([NATIVE], "nothing to compare: no matching rows other than native"),
        ([ROW, ROW], "before.csv has two rows for fused: layers full relu float32 cpu, 1 thread"),
    ],
)
def test_error_is_one_line(
    before: list[Row] | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = compare(before or [], [ROW])
    if before is None:
        Path("before.csv").unlink()
        capsys.readouterr()
        status = main(["compare", "before.csv", "after.csv"])
    assert status == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"mlp-ext compare: error: {message}")
    assert (out, err.count("\n")) == ("", 1)
