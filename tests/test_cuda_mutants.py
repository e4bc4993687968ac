"""Each barrier, fence and bound of the CUDA kernels is needed: without it the tests here fail.

A mutant is one of them removed or moved by one. A family's mutants are compiled together, each
behind a condition on the variable `mutant`, which chooses one at run time.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cuda_kernels import CSRC, Runner, compile_all, linear_act
from cuda_steps import OPTIONS, Training, assert_trains_as_torch, model_of_cuda
from once import Once
from references import assert_matches_native
from shapes import Shape, grad_output, operands
from test_cuda_many import assert_as_alone, networks_of
from torch import Tensor

import mlp_ext
from mlp_ext.nn import Activation

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]  # they test the tests


class Mutant(NamedTuple):
    header: str
    family: str  # whose kernels show it
    begin: int
    end: int
    text: str  # C++ that takes the place of those characters, {} for the mutant's number

    def __str__(self) -> str:
        before = source(self.header)[: self.begin]
        line = before.count("\n") + 1
        return f"{self.header}:{line}:{self.begin - before.rfind(chr(10))}"


def source(header: str) -> str:
    return (KERNELS / header).read_text()


KERNELS = CSRC / "cuda/kernels"
FAMILIES = {
    "small.cuh": "small",
    "tall.cuh": "tall",
    "pointwise.cuh": "passes",
    "step.cuh": "step",
}
ENTRIES = {"small": "small", "tall": "tall", "passes": "pointwise", "step": "step"}
BARRIER = re.compile(r"__(?:syncthreads|threadfence)\(\);|__syncthreads_or\((\w+)\)")


def without(statement: str) -> str:
    return "{{ if (mutant != {}) " + statement + " }}"


def without_each_barrier() -> Iterator[Mutant]:
    for header, family in FAMILIES.items():
        for m in BARRIER.finditer(source(header)):
            text = "(mutant == {} ? " + f"int({m[1]}) : {m[0]})" if m[1] else without(m[0])
            yield Mutant(header, family, m.start(), m.end(), text)


# Header, text that it has once with an expression between dollars, what takes the expression's
# place; "": the statement goes. The shapes below reach each of them.
BOUNDS = [
    ("small.cuh", "if ($row >= rows$ || k0", "row > rows"),
    ("small.cuh", "$k0 + k >= depth$) return", "k0 + k > depth"),
    ("small.cuh", "$k0 + k < a.depth$; k +=", "k0 + k + kStep < a.depth"),
    ("small.cuh", "if ($row < a.rows$ &&", "row <= a.rows"),
    ("small.cuh", "$column < b.rows$) finish", "column <= b.rows"),
    ("small.cuh", "shared_bytes<T>(kSlices * $kSliceStride$)", "kThreads"),
    ("small.cuh", "dw_columns(tiles($b.K + (b.db ? 1 : 0)$)", "b.K"),
    ("tile.cuh", "return $j < columns$ ?", "j <= columns"),
    ("tall.cuh", "$column + c < columns_end$;", "column + c <= columns_end"),
    ("tall.cuh", "if (r < rows && $row + r < rows_end$", "row + r <= rows_end"),
    ("tall.cuh", "if ($r >= rows$) break;", "r > rows"),
    ("tall.cuh", "if ($m >= rows_end$) break;", "m > rows_end"),
    ("tall.cuh", "if ($n < columns_end$) store", "n <= columns_end"),
    ("tall.cuh", "if ($n + i < columns_end$) *out", "n + i <= columns_end"),
    ("tall.cuh", "$n < tiles.N$ ? to_accumulator(*f.w", "n <= tiles.N"),
    ("tall.cuh", "$n < tiles.N$ ? to_accumulator(f.bias", "n <= tiles.N"),
    ("tall.cuh", "$k0 + k < tiles.K$;", "k0 + k + kStep < tiles.K"),
    ("tall.cuh", "$column + c >= columns_end$) return;", "column + c > columns_end"),
    ("tall.cuh", "r < rows && $row + r < rows_end$; r", "row + r <= rows_end"),
    ("tall.cuh", "$wait_copies();$\n      __sync", ""),
    ("tall.cuh", "$wait_copies();$\n    const GradZ", ""),
    ("tall.cuh", "$n < tiles.depth$;", "n + kStep < tiles.depth"),
    ("tall.cuh", "if ($n + p >= tiles.N$) break;", "n + p > tiles.N"),
    ("tall.cuh", "$column < tiles.K$) part", "column <= tiles.K"),
    ("tall.cuh", "if (b.db && $k == 0$) part", "k == 4"),
    ("tall.cuh", "wanted = $i < size$ &&", "i <= size"),
    ("tall.cuh", "$p < count$;", "p <= count"),
    ("pointwise.cuh", "$half > 0$;", "half > 1"),
    ("pointwise.cuh", "if ($column >= f.N$) return;", "column > f.N"),
    ("pointwise.cuh", "if ($m + r * step < f.M$) z", "m + r * step <= f.M"),
    ("pointwise.cuh", "if ($m + r * step >= f.M$) break;", "m + r * step > f.M"),
    ("pointwise.cuh", "rows_end = $column < g.N$ ?", "column <= g.N"),
    ("pointwise.cuh", "if ($m + r * step < rows_end$) raw", "m + r * step <= rows_end"),
    ("pointwise.cuh", "if ($m + r * step >= rows_end$) break;", "m + r * step > rows_end"),
    ("pointwise.cuh", "$part < gridDim.y$;", "part <= gridDim.y"),
    ("pointwise.cuh", "blocks - 1) == $blocks - 1$;", "0u"),
    ("step.cuh", "$w < kWarps$;", "w + 1 < kWarps"),
    ("step.cuh", "$i < layer.N * columns$;", "i <= layer.N * columns"),
    ("step.cuh", "smaller(row + i * down, $a.count - 1$)", "a.count"),
    ("step.cuh", "$smaller(column + i * across, b.count - 1)$", "column + i * across"),
    ("step.cuh", "$k < depth$;", "k + 1 < depth"),
    ("step.cuh", "$row + i * down < a.count$ &&", "row + i * down <= a.count"),
    ("step.cuh", "$column + j * across < b.count$)", "column + j * across <= b.count"),
    ("step.cuh", "$m < count$; m += kThreads", "m <= count"),
    ("step.cuh", "$i < rows * layer.N$;", "i <= rows * layer.N"),
    ("step.cuh", "if ($m >= rows$) return 0;", "m > rows"),
    ("step.cuh", "layer.keeps_z ? $f.on_chip_rows$ : layer.y", "layer.y"),
    ("step.cuh", "saved = chip.rows[$below.saved$ +", "below.y"),
    ("step.cuh", "return networks[$blockIdx.x$]", "0u"),
    ("step.cuh", "parameters[int64_t{blockIdx.x} * $each$ + i]", "each - 1"),
    ("step.cuh", "step::begin_step(f, networks, $done$, chip)", "int64_t(0)"),
    ("step.cuh", "static_cast<double>($done + 1$)", "done"),
    ("step.cuh", "ready = chip.optimizers[$which$]", "2 * l"),
    ("step.cuh", "$s < kStates$; ++s)\n        if (p.states[s]) state", "s + 1 < kStates"),
    ("step.cuh", "$s < kStates$; ++s)\n        if (p.states[s]) p", "s + 1 < kStates"),
    ("step.cuh", "$threadIdx.x < kStepRows$)", "threadIdx.x + 1 < kStepRows"),
    ("step.cuh", "$i < rows * lowest.K$;", "i <= rows * lowest.K"),
    ("step.cuh", "rows, $m0 == 0$, chip", "true"),
    ("step.cuh", "last = $epoch + 1 == f.epochs$ &&", "epoch == f.epochs"),
    ("step.cuh", "$begin + f.batch >= data.rows$;", "begin + f.batch > data.rows"),
    ("step.cuh", "data.order = data.order + $data.rows$;", "0"),
    ("step.cuh", "data.losses = data.losses + $f.batches$;", "0"),
    ("problem.cuh", "$aligned(m.data, 16)$ &&", "true"),
    ("problem.cuh", "$m.stride % kVector<S> == 0$ &&", "true"),
    ("problem.cuh", "&& $columns % kVector<S> == 0$;", "true"),
]


def with_each_bound_moved() -> Iterator[Mutant]:
    for header, marked, replacement in BOUNDS:
        before, expression, after = marked.split("$")
        found = source(header).count(before + expression + after)
        assert found == 1, f"{header} has {marked!r} {found} times: mend the table"
        begin = source(header).index(before + expression + after) + len(before)
        family = FAMILIES.get(header, "small" if header == "tile.cuh" else "tall")
        text = "(mutant == {} ? " + f"({replacement}) : ({expression}))"
        if not replacement:
            text = without(expression)
        yield Mutant(header, family, begin, begin + len(expression), text)


BARRIERS, MOVED = list(without_each_barrier()), list(with_each_bound_moved())
MUTANTS = [*BARRIERS, *MOVED]


@pytest.fixture(scope="session")
def libraries(once: Once) -> Callable[[str], ctypes.CDLL]:
    """The kernels of a family with all its mutants: `mutant` chooses one at run time, -1 none."""

    def mutated(header: str) -> str:
        text = source(header)
        here = sorted((m for m in MUTANTS if m.header == header), key=lambda m: -m.begin)
        for m in here:
            text = text[: m.begin] + m.text.format(MUTANTS.index(m)) + text[m.end :]
        return text

    def compiled(folder: Path, family: str) -> None:
        kernels = folder / KERNELS.relative_to(CSRC)
        kernels.mkdir(parents=True)
        for header in {m.header for m in MUTANTS}:
            (kernels / header).write_text(mutated(header))
        flags = ["-O1", "-DMUTANT", f"-I{folder}"]
        compile_all(folder / "mutants.so", [ENTRIES[family]], *flags)

    def library(family: str) -> ctypes.CDLL:
        folder = once(f"mutants-{family}", lambda folder: compiled(folder, family))
        return ctypes.CDLL(str(folder / "mutants.so"))

    return cache(library)


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
    Training((3, 2, 2), 8, 4, "mse", "mean", *OPTIONS["adam-amsgrad"], hidden=Activation("silu")),
]


def check(
    libraries: Callable[[str], ctypes.CDLL],
    family: str,
    mutant: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = libraries(family)
    ctypes.c_int.in_dll(library, "mutant").value = mutant
    if family == "step":
        for training in STEPS:
            assert_trains_as_torch(model_of_cuda(library), training)
        networks = networks_of(STEPS[2], 2, epochs=2, own="orders")
        assert_as_alone(library, networks, epochs=2)
        return
    monkeypatch.setattr(mlp_ext, "linear_act", linear_act(family, Runner(library, processors=1)))
    for shape, before, between in CASES[family]:

        def laid(t: Tensor, before: int = before, between: int = between) -> Tensor:
            rows, columns = t.shape
            big = t.new_full((before + rows * (columns + between),), torch.nan)
            return big.as_strided(t.shape, (columns + between, 1), before).copy_(t)

        arranged = operands(shape)
        arranged |= {name: laid(arranged[name]) for name in ("input", "weight")}
        assert_matches_native(arranged, "sigmoid", laid(grad_output(shape)))


def test_every_barrier_has_its_mutant() -> None:
    headers = (path.read_text() for path in (CSRC / "cuda").glob("*/*.cu*"))
    assert sum(len(re.findall("__sync|__threadfence", text)) for text in headers) == len(BARRIERS)


@pytest.mark.parametrize("family", ENTRIES)
def test_kernels_pass_as_they_are(
    family: str, libraries: Callable[[str], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(libraries, family, -1, monkeypatch)


@pytest.mark.parametrize("mutant", BARRIERS, ids=str)
def test_a_missing_barrier_is_a_fault(
    mutant: Mutant, libraries: Callable[[str], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match=r"a race for|that nobody wrote|a barrier that some"):
        check(libraries, mutant.family, MUTANTS.index(mutant), monkeypatch)


@pytest.mark.parametrize("mutant", MOVED, ids=str)
def test_a_moved_bound_is_seen(
    mutant: Mutant, libraries: Callable[[str], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError):
        check(libraries, mutant.family, MUTANTS.index(mutant), monkeypatch)
