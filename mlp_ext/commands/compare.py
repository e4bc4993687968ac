"""What `mlp-ext compare` does: compares rows from before and after a change."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from mlp_ext.bench.noise import noise
from mlp_ext.bench.rows import Row, as_number, as_range, geometric_mean
from mlp_ext.commands.arguments import read_rows
from mlp_ext.commands.summary import WIDTH

Rows = Mapping[tuple[str, str, str], Row]  # by settings, case and provider


class Change(NamedTuple):
    """Of a provider's ratio to native in a case: after / before, above 1 is faster."""

    before: Row
    after: Row
    ratio: float
    low: float  # 20% quantile after / 80% quantile before
    high: float  # 80% quantile after / 20% quantile before

    @property
    def verdict(self) -> str:
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "same"


def change(before: Row, after: Row) -> Change:
    """Compares two rows with a ratio_to_native."""
    (low, high), (new_low, new_high) = _quantiles(before), _quantiles(after)
    ratio = after.ratio_to_native / before.ratio_to_native
    return Change(before, after, ratio, new_low / high, new_high / low)


def _quantiles(row: Row) -> tuple[float, float]:
    """Of the ratio to native; in files of older versions from those of the provider's time."""
    if row.ratio_q20 is None or row.ratio_q80 is None:
        scaled = row.ratio_to_native * row.median_s
        return scaled / row.q80_s, scaled / row.q20_s
    return row.ratio_q20, row.ratio_q80


def run(args: argparse.Namespace) -> None:
    """Prints a line for each row that both files have. Exits with status 1 if args.fail_if_slower
    and one is slower."""
    paths = (args.before, args.after)
    try:
        first, second = map(_read, paths)
    except ValueError as error:
        args.fail(str(error))
    pairs = [(row, second[key]) for key, row in first.items() if key in second]
    changes = [change(*pair) for pair in pairs if pair[0].provider != "native"]
    if not changes:
        args.fail(_nothing_in_common(paths, first, second))
    for warning in _warnings(paths, first, second, pairs):
        print(f"{args.prog}: {warning}", file=sys.stderr)
    _print_table(changes)
    print("\n" + fill(_summary(changes, pairs), WIDTH))
    if args.fail_if_slower and any(found.verdict == "slower" for found in changes):
        args.exit(1)


def _read(path: Path) -> Rows:
    found: dict[tuple[str, str, str], Row] = {}
    for row in read_rows(path):
        key = (row.settings, row.case, row.provider)
        if key in found:
            raise ValueError(f"{path} has two rows for {row.provider}: {row.settings}, {row.case}")
        found[key] = row
    return found


def _nothing_in_common(paths: Sequence[Path], first: Rows, second: Rows) -> str:
    settings = [dict.fromkeys(row.settings for row in rows.values()) for rows in (first, second)]
    if settings[0].keys() & settings[1].keys():
        return "nothing to compare: no matching rows other than native"
    parts = (f"{p} has {'; '.join(s) or 'no rows'}" for p, s in zip(paths, settings, strict=True))
    return f"nothing to compare: {', '.join(parts)}"


def _warnings(
    paths: Sequence[Path], first: Rows, second: Rows, pairs: Sequence[tuple[Row, Row]]
) -> list[str]:
    found = []
    before, after = (
        ", ".join(dict.fromkeys(r.device_name for r in rows)) for rows in zip(*pairs, strict=True)
    )
    if before != after:
        found.append(f"different machines: {before} before, {after} after")
    for path, rows, others in ((paths[0], first, second), (paths[1], second, first)):
        if only := len(rows.keys() - others.keys()):
            found.append(f"{only} of {len(rows)} rows skipped: only in {path}")
        if any(row.ratio_q20 is None for row in rows.values()):
            found.append(f"{path} has no quantiles of speedups; using those of the times")
        if noisy := noise([*rows.values()]):
            found.append(f"{path}: {noisy}")
    return found


def _print_table(changes: Sequence[Change]) -> None:
    width = max(22, *(2 + len(found.before.provider) for found in changes))
    settings = case = ""
    print("before, after: speedup over native. change: after / before, with its range")
    print("(20-80% quantiles); 'same' if the range includes 1.")
    for found in changes:
        before, after = found.before, found.after
        if before.settings != settings:
            settings, case = before.settings, ""
            heading = f"{'':{width}}{'before':>8}{'after':>8}{'change':>8}{'20-80%':>13}"
            print(f"\n{settings}\n{heading}")
        if before.case != case:
            case = before.case
            print(case)
        ratios = (before.ratio_to_native, after.ratio_to_native, found.ratio)
        cells = "".join(f"{as_number(ratio) + 'x':>8}" for ratio in ratios)
        spread = as_range(found.low, found.high)
        print(f"  {before.provider:{width - 2}}{cells}{spread:>13}  {found.verdict}")
        if before.path and after.path and before.path != after.path:
            print(f"    path: {before.path} -> {after.path}")


def _summary(changes: Sequence[Change], pairs: Sequence[tuple[Row, Row]]) -> str:
    verdicts = Counter(found.verdict for found in changes)
    counts = ", ".join(f"{verdicts[name]} {name}" for name in ("faster", "slower", "same"))
    mean = geometric_mean([found.ratio for found in changes])
    native = [a.median_s / b.median_s for b, a in pairs if b.provider == "native"]
    drift = (
        f"; native itself ran in {as_number(geometric_mean(native))}x the time" if native else ""
    )
    rows = f"{len(changes)} row{'s' * (len(changes) > 1)}"
    return f"{rows}: {counts}; geometric mean change {as_number(mean)}x{drift}"
