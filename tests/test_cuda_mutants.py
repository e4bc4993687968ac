"""Each barrier, fence and bound of the CUDA kernels is needed: without it the tests here fail.

A mutant is a copy of a header with one of them removed or moved by one.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cuda_kernels import CSRC, Runner, compile_all, linear_act
from cuda_steps import Training, assert_trains_as_torch, model_of_cuda
from references import assert_matches_native
from shapes import Shape, grad_output, operands
from torch import Tensor

import mlp_ext

pytestmark = pytest.mark.usefixtures("one_thread")


class Mutant(NamedTuple):
    header: str
    family: str  # whose kernels show it
    begin: int
    end: int
    text: str  # what takes the place of those characters

    def __str__(self) -> str:
        before = source(self.header)[: self.begin]
        line = before.count("\n") + 1
        return f"{self.header}:{line}:{self.begin - before.rfind(chr(10))}"


def source(header: str) -> str:
    return (CSRC / "cuda" / header).read_text()


FAMILIES = {
    "small.cuh": "small",
    "tall.cuh": "tall",
    "pointwise.cuh": "passes",
    "step.cuh": "step",
}
ENTRIES = {"small": "small", "tall": "tall", "passes": "pointwise", "step": "step"}
BARRIER = re.compile(r"__(?:syncthreads|threadfence)\(\);|__syncthreads_or\((\w+)\)")


def without_each_barrier() -> Iterator[Mutant]:
    for header, family in FAMILIES.items():
        for m in BARRIER.finditer(source(header)):
            yield Mutant(header, family, m.start(), m.end(), m[1] or ";")


# Header, text that it has once, what takes its place. The shapes below reach each of them.
BOUNDS = [
    ("small.cuh", "if (row >= rows || k0", "if (row > rows || k0"),
    ("small.cuh", "k0 + k >= depth) return", "k0 + k > depth) return"),
    ("small.cuh", "k0 + k < a.depth; k +=", "k0 + k + kStep < a.depth; k +="),
    ("small.cuh", "if (row < a.rows &&", "if (row <= a.rows &&"),
    ("small.cuh", "column < b.rows) finish", "column <= b.rows) finish"),
    ("small.cuh", "shared_bytes<T>(kSlices * kSliceStride)", "shared_bytes<T>(kSlices * kThreads)"),
    ("small.cuh", "dw_columns(tiles(b.K + (b.db ? 1 : 0))", "dw_columns(tiles(b.K)"),
    ("tile.cuh", "return j < columns ?", "return j <= columns ?"),
    ("tall.cuh", "column + c < columns_end;", "column + c <= columns_end;"),
    ("tall.cuh", "if (r < rows && row + r < rows_end", "if (r < rows && row + r <= rows_end"),
    ("tall.cuh", "if (r >= rows) break;", "if (r > rows) break;"),
    ("tall.cuh", "if (m >= rows_end) break;", "if (m > rows_end) break;"),
    ("tall.cuh", "if (n < columns_end) store", "if (n <= columns_end) store"),
    ("tall.cuh", "if (n + i < columns_end) *out", "if (n + i <= columns_end) *out"),
    ("tall.cuh", "n < tiles.N ? to_accumulator(*f.w", "n <= tiles.N ? to_accumulator(*f.w"),
    ("tall.cuh", "n < tiles.N ? to_accumulator(f.bias", "n <= tiles.N ? to_accumulator(f.bias"),
    ("tall.cuh", "k0 + k < tiles.K;", "k0 + k + kStep < tiles.K;"),
    ("tall.cuh", "column + c >= columns_end) return;", "column + c > columns_end) return;"),
    ("tall.cuh", "r < rows && row + r < rows_end; r", "r < rows && row + r <= rows_end; r"),
    ("tall.cuh", "wait_copies();\n      __sync", "__sync"),
    ("tall.cuh", "wait_copies();\n    const GradZ", "const GradZ"),
    ("tall.cuh", "n < tiles.depth;", "n + kStep < tiles.depth;"),
    ("tall.cuh", "if (n + p >= tiles.N) break;", "if (n + p > tiles.N) break;"),
    ("tall.cuh", "column < tiles.K) part", "column <= tiles.K) part"),
    ("tall.cuh", "if (b.db && k == 0) part", "if (b.db && k == 4) part"),
    ("tall.cuh", "wanted = i < size &&", "wanted = i <= size &&"),
    ("tall.cuh", "p < count;", "p <= count;"),
    ("pointwise.cuh", "half > 0;", "half > 1;"),
    ("pointwise.cuh", "if (column >= f.N) return;", "if (column > f.N) return;"),
    ("pointwise.cuh", "if (m + r * step < f.M) z", "if (m + r * step <= f.M) z"),
    ("pointwise.cuh", "if (m + r * step >= f.M) break;", "if (m + r * step > f.M) break;"),
    ("pointwise.cuh", "rows_end = column < g.N ?", "rows_end = column <= g.N ?"),
    ("pointwise.cuh", "if (m + r * step < rows_end) raw", "if (m + r * step <= rows_end) raw"),
    (
        "pointwise.cuh",
        "if (m + r * step >= rows_end) break;",
        "if (m + r * step > rows_end) break;",
    ),
    ("pointwise.cuh", "part < gridDim.y;", "part <= gridDim.y;"),
    ("pointwise.cuh", "blocks - 1) == blocks - 1;", "blocks - 1) == 0;"),
    ("step.cuh", "w < kWarps;", "w + 1 < kWarps;"),
    ("step.cuh", "i < layer.N * columns;", "i <= layer.N * columns;"),
    ("step.cuh", "smaller(row + i * down, a.count - 1)", "smaller(row + i * down, a.count)"),
    ("step.cuh", "smaller(column + i * across, b.count - 1)", "(column + i * across)"),
    ("step.cuh", "k < depth;", "k + 1 < depth;"),
    ("step.cuh", "row + i * down < a.count &&", "row + i * down <= a.count &&"),
    ("step.cuh", "column + j * across < b.count)", "column + j * across <= b.count)"),
    ("step.cuh", "m < count; m += kThreads", "m <= count; m += kThreads"),
    ("step.cuh", "i < rows * layer.N;", "i <= rows * layer.N;"),
    ("step.cuh", "if (m >= rows) return 0;", "if (m > rows) return 0;"),
    ("step.cuh", "threadIdx.x < kStepRows)", "threadIdx.x + 1 < kStepRows)"),
    ("step.cuh", "i < rows * lowest.K;", "i <= rows * lowest.K;"),
    ("step.cuh", "rows, m0 == 0, chip", "rows, true, chip"),
    ("step.cuh", "begin + f.batch >= f.rows;", "begin + f.batch > f.rows;"),
    ("problem.cuh", "aligned(m.data, 16) && ", ""),
    ("problem.cuh", "m.stride % kVector<S> == 0 && ", ""),
    ("problem.cuh", " && columns % kVector<S> == 0;", ";"),
]


def with_each_bound_moved() -> Iterator[Mutant]:
    for header, text, replacement in BOUNDS:
        found = source(header).count(text)
        assert found == 1, f"{header} has {text!r} {found} times: mend the table"
        begin = source(header).index(text)
        family = FAMILIES.get(header, "small" if header == "tile.cuh" else "tall")
        yield Mutant(header, family, begin, begin + len(text), replacement)


BARRIERS, MOVED = list(without_each_barrier()), list(with_each_bound_moved())
AS_THEY_ARE = [Mutant(header, family, 0, 0, "") for header, family in FAMILIES.items()]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Mutant, Future[Path]]]:
    def compiled(mutant: Mutant, folder: Path) -> Path:
        text = source(mutant.header)
        (folder / "cuda").mkdir()
        (folder / "cuda" / mutant.header).write_text(
            text[: mutant.begin] + mutant.text + text[mutant.end :]
        )
        flags = ["-O1", "-DMUTANT", f"-I{folder}"]
        return compile_all(folder / "mutant.so", [ENTRIES[mutant.family]], *flags)

    pool = ThreadPoolExecutor(2)
    yield {
        mutant: pool.submit(compiled, mutant, tmp_path_factory.mktemp("mutant"))
        for mutant in [*AS_THEY_ARE, *BARRIERS, *MOVED]
    }
    pool.shutdown(cancel_futures=True)


# Shape, elements before the first row and between rows.
CASES = {
    "small": [(Shape((17,), 132, 5), 0, 0), (Shape((70,), 16, 17), 0, 0)],
    "tall": [
        (Shape((300,), 66, 9), 0, 0),
        (Shape((70,), 12, 4), 0, 0),
        (Shape((10,), 12, 8), 1, 4),  # misaligned
        (Shape((10,), 12, 8), 0, 1),
        (Shape((10,), 6, 6), 0, 2),
    ],
    "passes": [(Shape((300,), 2, 40), 0, 0), (Shape((37,), 2, 5), 0, 0)],
}


STEPS = [
    Training((3, 17, 5), 66, 33),
    Training((4, 33, 17), 30, 30),
    Training((2, 3), 40, 36, "cross_entropy"),
]


def check(library: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "step":
        for training in STEPS:
            assert_trains_as_torch(model_of_cuda(ctypes.CDLL(str(library))), training)
        return
    run = Runner(ctypes.CDLL(str(library)), processors=1)
    monkeypatch.setattr(mlp_ext, "linear_act", linear_act(family, run))
    for shape, before, between in CASES[family]:

        def laid(t: Tensor, before: int = before, between: int = between) -> Tensor:
            rows, columns = t.shape
            big = t.new_full((before + rows * (columns + between),), torch.nan)
            return big.as_strided(t.shape, (columns + between, 1), before).copy_(t)

        arranged = operands(shape)
        arranged |= {name: laid(arranged[name]) for name in ("input", "weight")}
        assert_matches_native(arranged, "sigmoid", laid(grad_output(shape)))


def test_every_barrier_has_its_mutant() -> None:
    headers = (path.read_text() for path in (CSRC / "cuda").glob("*.cu*"))
    assert sum(len(re.findall("__sync|__threadfence", text)) for text in headers) == len(BARRIERS)


@pytest.mark.parametrize("same", AS_THEY_ARE, ids=lambda same: same.family)
def test_kernels_pass_as_they_are(
    same: Mutant, libraries: dict[Mutant, Future[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(libraries[same].result(), same.family, monkeypatch)


@pytest.mark.parametrize("mutant", BARRIERS, ids=str)
def test_a_missing_barrier_is_a_fault(
    mutant: Mutant, libraries: dict[Mutant, Future[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = libraries[mutant].result()
    with pytest.raises(AssertionError, match=r"a race for|that nobody wrote|a barrier that some"):
        check(library, mutant.family, monkeypatch)


@pytest.mark.parametrize("mutant", MOVED, ids=str)
def test_a_moved_bound_is_seen(
    mutant: Mutant, libraries: dict[Mutant, Future[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = libraries[mutant].result()  # it compiles
    with pytest.raises(AssertionError):
        check(library, mutant.family, monkeypatch)
