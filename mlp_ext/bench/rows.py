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
    ratio_q20: float | None  # over the rounds; None in files of older versions
    ratio_q80: float | None
    torch: str
    mlp_ext: str
    commit: str
    timestamp: str  # UTC, ISO 8601
    gflops: float  # operations of the GEMMs / median_s, in 10^9 per second
    bound: str  # compute, memory or latency: which allows the least speed; "" if not measured
    share_of_bound: float | None  # the least time that it allows / median_s
    path: str  # of our kernels, as `mlp-ext plan` has it; "" for native and peers
    other_cpus: float | None  # CPUs that other processes kept busy during the measurement

    @property
    def settings(self) -> str:
        """What the rows of a run share, as "train step relu sgd float32 cpu, 2 threads"."""
        what = (self.suite, self.mode, self.activation, self.optimizer, self.dtype, self.device)
        return " ".join(filter(None, what)) + (
            f", {as_threads(self.threads)}" if self.device == "cpu" else ""
        )


COLUMNS = [field.name for field in fields(Row)]
# Older versions had share_of_peak, on CPUs of the compute bound alone, and none of NEWER.
NEWER = ("ratio_q20", "ratio_q80", "bound", "share_of_bound", "path", "other_cpus")
OLDER_COLUMNS = [name for name in COLUMNS if name not in NEWER] + ["share_of_peak"]
_OPTIMIZER = {"layers": "", "train": "sgd"}  # by suite, in files without that column
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


def write_csv(rows: Iterable[Any], path: Path, kind: type[Any] = Row) -> None:
    """Writes the file atomically: the fields of the dataclass, then a line per row. Raises
    OSError."""
    with replacing(path) as part, part.open("w", newline="") as file:
        names = [field.name for field in fields(kind)]
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows(map(asdict, rows))


def read_csv(path: Path) -> list[Row]:
    """Reads files of write_csv, also of older versions. Raises OSError, and ValueError for any
    other file."""
    with path.open(newline="", errors="replace") as file:
        table = csv.DictReader(file, strict=True)
        oldest = [name for name in OLDER_COLUMNS if name != "optimizer"]
        found = table.fieldnames or []
        if {*found} not in ({*COLUMNS}, {*OLDER_COLUMNS}, {*oldest}):
            raise ValueError(f"{path}: {_difference(found)}")
        try:
            types = {field.name: _READ[str(field.type)] for field in fields(Row)}
            return [
                Row(**{name: types[name](row[name]) for name in COLUMNS})
                for row in map(_newer, table)
            ]
        except (TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {table.line_num}: {error}") from None


def _difference(found: Sequence[str]) -> str:
    """From COLUMNS."""
    missing = [name for name in COLUMNS if name not in found]
    names = missing or [name for name in found if name not in COLUMNS]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    what = "missing" if missing else "unknown"
    return f"{what} column{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}"


def _newer(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the columns of this version."""
    row = {"optimizer": _OPTIMIZER.get(row["suite"])} | row
    if "share_of_peak" not in row:
        return row
    share = row["share_of_peak"]
    bound = "compute" if share and row["device"] == "cpu" else ""
    return dict.fromkeys(NEWER, "") | {"bound": bound, "share_of_bound": share} | row


def write_json(record: Any, path: Path) -> None:
    """Writes the file atomically, with null for NaN and infinity, which JSON does not have. Raises
    OSError."""
    record = json.loads(json.dumps(record, default=str), parse_constant=lambda _: None)
    with replacing(path) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


def as_time(seconds: float) -> str:
    """As "1.64 ms", with three digits."""
    seconds = float(f"{seconds:.3g}")
    units = ((1, "s"), (1e3, "ms"), (1e6, "us"), (1e9, "ns"))
    scale, unit = next((s, u) for s, u in units if seconds * s >= 1 or u == "ns")
    return f"{seconds * scale:{'.0f' if seconds >= 1e3 else '.3g'}} {unit}"


def as_number(ratio: float) -> str:
    """As "0.97", "1.35", "50.6" or "105"."""
    return f"{ratio:.{2 if ratio < 9.995 else 1 if ratio < 99.95 else 0}f}"


def as_range(low: float | None, high: float | None) -> str:
    """As "1.30-1.41"; "" if either is unknown."""
    return "" if low is None or high is None else f"{as_number(low)}-{as_number(high)}"


def as_threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def geometric_mean(ratios: Sequence[float]) -> float:
    return exp(fsum(map(log, ratios)) / len(ratios))


def by_provider(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each provider except native."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.provider != "native":
            found.setdefault(row.provider, []).append(row)
    return found
