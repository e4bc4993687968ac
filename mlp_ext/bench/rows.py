"""Result rows: one provider in one case, with where and how it was measured."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from math import exp, fsum, log
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    suite: str
    case: str
    mode: str
    activation: str
    optimizer: str  # "" in layers
    dtype: str
    device: str
    device_name: str
    threads: int
    provider: str
    median_s: float  # seconds per call, over the rounds
    q20_s: float
    q80_s: float
    ratio_to_native: float  # native's time / this one's, the median over the rounds
    torch: str
    mlp_ext: str
    commit: str
    timestamp: str  # UTC, ISO 8601
    gflops: float  # operations of the GEMMs / median_s, in 10^9 per second
    share_of_peak: float | None  # see benchmarks/README.md; None if not measured


COLUMNS = [field.name for field in fields(Row)]
_DEFAULT_OPTIMIZER = {"layers": "", "train": "sgd"}  # in files without that column
_READ: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file that replaces `path` after the body."""
    path = path.resolve()
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Writes the file atomically: COLUMNS, then a line per row. Raises OSError."""
    with replacing(path) as part, part.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(map(asdict, rows))


def read_csv(path: Path) -> list[Row]:
    """Reads files of write_csv, also of versions without the column `optimizer`.

    Raises OSError, and ValueError for any other file.
    """
    with path.open(newline="") as file:
        table = csv.DictReader(file, strict=True)
        older = [name for name in COLUMNS if name != "optimizer"]
        if table.fieldnames not in (COLUMNS, older):
            raise ValueError(f"{path} does not have the columns {', '.join(COLUMNS)}")
        try:
            types = {field.name: _READ[str(field.type)] for field in fields(Row)}
            return [
                Row(**{name: types[name](row[name]) for name in COLUMNS})
                for row in (
                    {"optimizer": _DEFAULT_OPTIMIZER.get(row["suite"])} | row for row in table
                )
            ]
        except (TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {table.line_num}: {error}") from None


def write_json(rows: Iterable[Row], path: Path) -> None:
    """Writes the file atomically: a list of one object per row. Raises OSError."""
    with replacing(path) as part:
        part.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def as_time(seconds: float) -> str:
    """As "1.64 ms", with three digits."""
    units = ((1, "s"), (1e3, "ms"), (1e6, "us"), (1e9, "ns"))
    scale, unit = next((s, u) for s, u in units if seconds * s >= 1)
    return f"{seconds * scale:.3g} {unit}"


def geometric_mean(ratios: Sequence[float]) -> float:
    return exp(fsum(map(log, ratios)) / len(ratios))


def by_provider(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each provider except native."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.provider != "native":
            found.setdefault(row.provider, []).append(row)
    return found
