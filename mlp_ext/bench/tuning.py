"""Measures the limits between paths of the CPU, csrc/cpu/machine.h, on the processor at hand."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, cycle, zip_longest
from math import exp, fsum, log, sqrt
from statistics import fmean, median, quantiles
from types import MappingProxyType
from typing import Any, NamedTuple

from mlp_ext import _C
from mlp_ext.bench.cases import Case, Net, Setting, parse
from mlp_ext.bench.plans import plan
from mlp_ext.bench.providers import PROVIDERS
from mlp_ext.bench.runner import Clock, in_turn
from mlp_ext.bench.work import Work, set_up
from mlp_ext.ops import build_info

Machine = dict[str, Any]  # as _C.machine()
NEVER = 2**62  # kNever
SAMPLE_SECONDS = 0.0005  # far below a time slice, so that other programs interrupt few samples
ROUNDS, MORE_ROUNDS = 3, 9  # of a visit; more where calls are short
SHORT = 10**8  # FLOPs of a call
LARGEST_BYTES = 2**26  # of a case's operands and results
MOST = 0.25  # of a logarithm counts, so that one rung does not outweigh many
MARGIN = 0.02  # a limit stays where another is faster by less,
ERRORS = 3  # or by less than so many standard errors: the best of many limits is chosen


class Sides(NamedTuple):
    """The limits that put a size below and above, from the size and the number of threads."""

    below: Callable[[int, int], int]
    above: Callable[[int, int], int]
    up_to: bool = False  # a size equal to the limit is below
    may_be_never: bool = False


UP_TO = Sides(lambda size, threads: size, lambda size, threads: size - 1, up_to=True)
FROM = Sides(lambda size, threads: size + 1, lambda size, threads: size)
FROM_OR_NEVER = FROM._replace(may_be_never=True)
PER_THREAD = Sides(lambda size, threads: size * threads + 1, lambda size, threads: size)
HALVED = Sides(lambda size, threads: size, lambda size, threads: size // 2, up_to=True)


class Rule(NamedTuple):
    """A limit, and the cases that tell it."""

    limit: str
    mode: str  # of layers
    sides: Sides
    names: str  # what runs below and above, for the picture
    ladder: tuple[int, ...]  # of q, the size that it bounds
    families: str  # cases, with products and quotients of q and of t, the threads
    also: Mapping[str, int] = MappingProxyType({})  # other limits, so that this one decides
    planned: bool = True  # the plan tells the sides apart


def doubling(least: int, most: int) -> tuple[int, ...]:
    return tuple(least << i for i in range((most // least).bit_length()))


def halves(least: int, most: int) -> tuple[int, ...]:
    """Doubling, and the sizes between."""
    between = (size * 3 // 2 for size in doubling(least, most // 2))
    return tuple(sorted({*doubling(least, most), *between}))


OWN = {"library_multiply_adds": NEVER, "library_weights": NEVER}  # without torch's GEMM
NO_TILES = {"amx_rows": NEVER}
OF_MANY = ("lane_weights", "core_multiply_adds")  # of many networks: not measured
IF_LIBRARY = ("library_inputs", "library_outputs", "library_forward_inputs")
EDGES = (16, 32, 48, 64, 96, 128, 192, 256)  # rows without empty lanes
EMPTY = (5, 7, 9, 11, 15, 23, 31, 47, 63)  # rows over empty lanes
# fmt: off
RULES = (
    Rule("small_multiply_adds", "full", UP_TO, "small, packed", doubling(2**9, 2**16),
         "q/64x8x8 8xq/128x16 32xq/512x16", {"narrow_bytes": 0}),
    Rule("multiply_adds_per_thread", "full", PER_THREAD, "one thread, all", doubling(2**13, 2**20),
         "64xq*t/4096x64 q*t/4096x64x64 16-16-16@q*t/512"),
    Rule("small_dot_depth", "forward", FROM, "small, dots", doubling(1, 64),
         "4x4*qx8 2x2*qx16 8x8*qx4", {"small_multiply_adds": 2**16, "narrow_bytes": 0}),
    Rule("dot_rows", "forward", UP_TO, "dots, packed", halves(2, 64),
         "qx256x256 qx784x128 qx128x1000", {"dot_rows_if_deep": 0}),
    Rule("dot_rows_if_deep", "forward", UP_TO, "dots, packed", halves(8, 128),
         "qx16*qx256 qx16*qx64 qx32*qx100", {"dot_rows": 0, "dot_depth": 1}),
    Rule("dot_depth", "forward", FROM, "packed, dots", halves(1, 64),
         "24x24*qx256 32x32*qx100 48x48*qx256", {"dot_rows": 0, "dot_rows_if_deep": NEVER}),
    Rule("dot_columns", "forward", UP_TO, "dots, packed", halves(2, 16),
         "1024x64xq 4096x256xq 256x784xq", {"tiny_depth": 0}),
    Rule("tiny_depth", "forward", UP_TO, "packed, dots", halves(4, 64),
         "16384xqx4 4096xqx3 16384xqx2", {"dot_columns": 4, "narrow_bytes": 0}),
    Rule("narrow_bytes", "forward", UP_TO, "narrow, packed", (8, 16, 24, 32, 48, 64),
         "16384xq/4x4 4096xq/4x8 16384xq/4x3"),
    Rule("narrow_rows", "backward", FROM, "others, narrow", doubling(16, 1024),
         "qx4x4 qx2x8 qx8x3"),
    Rule("tall_inputs", "backward", UP_TO, "tall, packed", halves(16, 1024),
         "1024*txqx16 2048*txqx64 2048*txqx32", {"tall_weights": 2**18}),
    Rule("tall_weights", "backward", UP_TO, "tall, packed", doubling(2**12, 2**18),
         "1024*txq/256x256 2048*txq/64x64 1024*txq/512x512", {"tall_inputs": 1024}),
    Rule("few_rows", "backward", UP_TO, "few_rows, packed", (1, 2, 3, 4, 6, 8, 12, 16),
         "qx512x512 qx1024x1024 qx4096x1000", OWN),
    Rule("library_multiply_adds", "backward", FROM_OR_NEVER, "own, library", doubling(2**18, 2**30),
         "q/16384x128x128 q/262144x512x512 q/1048576x1024x1024",
         NO_TILES | {"library_weights": NEVER}),
    Rule("library_weights", "backward", FROM_OR_NEVER, "own, library", doubling(2**16, 2**22),
         "12x1024xq/1024 16xq/512x512 24x512xq/512",
         NO_TILES | {"library_multiply_adds": NEVER}),
    Rule("library_inputs", "backward", FROM, "own, library", halves(4, 64),
         "4096xqx64 4096xqx256 16384xqx32",
         NO_TILES | {"library_multiply_adds": 0, "library_outputs": 1}),
    Rule("library_outputs", "backward", FROM, "own, library", halves(4, 64),
         "4096x64xq 4096x256xq 16384x32xq",
         NO_TILES | {"library_multiply_adds": 0, "library_inputs": 1}),
    Rule("library_forward_inputs", "forward", FROM_OR_NEVER, "own, library", doubling(64, 4096),
         "128xqx1024 512xqx512 1024xqx256",
         NO_TILES | {"library_multiply_adds": 0}),
    Rule("amx_rows", "full", FROM, "others, amx", halves(2, 64),
         "qx512x512 qx1024x256 qx256x1024"),
    Rule("amx_inputs", "forward", FROM, "others, amx", halves(4, 64),
         "4096xqx64 4096xqx256 1024xqx512"),
    Rule("amx_outputs", "forward", FROM, "others, amx", halves(2, 32),
         "4096x64xq 4096x256xq 1024x784xq"),
    Rule("amx_backward_columns", "backward", FROM, "others, amx", halves(8, 128),
         "4096xqx256 4096x256xq 16384xqxq"),
    Rule("in_place_outputs", "forward", UP_TO, "in place, packed", doubling(16, 1024),
         "4096x784xq 1024x512xq 256x784xq",
         NO_TILES | OWN | {"dot_columns": 0}, planned=False),
    Rule("block_bytes", "full", HALVED, "block, half", doubling(2**19, 2**21),
         "512x1024x1024 1024x1024x1024 256x4096x1024",
         NO_TILES | OWN, planned=False),
    Rule("streamed_depth", "forward", UP_TO, "streamed, cached", halves(16, 1024),
         "8192xqx256 4096xqx512 16384xqx128",
         NO_TILES | OWN | {"dot_columns": 0}, planned=False),
    Rule("step_width", "step", UP_TO, "blocks, others", halves(16, 512),
         "q-q-q@1024 q-q-1@4096 q-q-q-q@512", {"step_weights": 2**22}),
    Rule("step_weights", "step", UP_TO, "blocks, others", doubling(2**12, 2**19),
         "64-q/128-64@1024 128-q/256-128@1024 256-q/512-256@512 512-q/1024-512@256"),
    Rule("step_rows", "step", FROM, "others, blocks", halves(4, 128),
         "128-128-128@q*t 256-256-10@q*t 48-48-48-48-48@q*t"),
    Rule("row_lane_weights", "step", UP_TO, "lanes, blocks", doubling(2**5, 2**11),
         "8-q/16-8@64 16-q/32-16@64 16-q/16@64 16-q/17-1@128"),
    Rule("row_lane_bytes", "step", FROM, "blocks, lanes", halves(16, 128),
         "10-5-1@q/4 8-8-4@q/4 4-16-1@q/4"),
    Rule("panel_rows", "step", FROM, "layers, panels", EDGES,
         "784-256-10@q 784-512-256-10@q 1024-512-10@q",
         {"step_width": 0, "panel_rows_per_empty_lane": 0}),
    Rule("panel_rows_per_empty_lane", "step", FROM, "layers, panels", EMPTY,
         "784-256-10@q 784-256-10@2*q 784-256-10@4*q 784-256-10@8*q", {"step_width": 0}),
    Rule("panel_columns", "step", FROM, "layers, panels", halves(8, 128),
         "784-q*t-512@128 512-q*t-512-10@64", {"step_width": 0}),
    Rule("elements_per_thread", "step", PER_THREAD, "one thread, all", doubling(2**9, 2**16),
         "8-64@q*t/64 8-256@q*t/256 16-1024@q*t/1024", {"step_width": 0}, planned=False),
)
# fmt: on


@dataclass(eq=False)
class Point:
    """A case near a limit, and its time above over its time below, once a round."""

    rule: Rule
    table: str  # of the machine: fma, converted, bf16_dot or amx
    family: str
    size: int
    case: Case
    setting: Setting
    below: Machine
    above: Machine
    ratios: list[float] = field(default_factory=list)  # logarithms; positive: below is faster

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def counted(self) -> float:
        return max(-MOST, min(MOST, self.ratio))

    @property
    def range(self) -> tuple[float, float]:
        """20 % and 80 % of the ratios."""
        low, _, _, high = quantiles(self.ratios, n=5, method="inclusive")
        return low, high

    @property
    def error(self) -> float:
        """Standard error of the median, by ranks: interrupted samples are not normal noise."""
        ordered, n = sorted(self.ratios), len(self.ratios)
        skipped = int((n - 1 - sqrt(n)) / 2)
        return (ordered[n - 1 - skipped] - ordered[skipped]) / 2


def points(machine: Machine, dtypes: Iterable[str], threads: int) -> list[Point]:
    """Those whose two sides differ on this machine; the rules take turns."""
    tables: dict[str, str] = {}
    for dtype in dtypes:
        mode = _C.dot_mode(dtype)
        tables.setdefault("converted" if mode == "fma" and "16" in dtype else mode, dtype)
    of_rules = [
        [*_points(rule, machine, table, dtype, threads)]
        for table, dtype in tables.items()
        for rule in RULES
        if rule.limit not in IF_LIBRARY or not machine[table].items() >= OWN.items()
    ]
    return [point for turn in zip_longest(*of_rules) for point in turn if point]


def _points(rule: Rule, machine: Machine, table: str, dtype: str, threads: int) -> Iterator[Point]:
    for size in rule.ladder:
        limits = [
            machine[table] | rule.also | {rule.limit: n(size, threads)} for n in rule.sides[:2]
        ]
        below, above = (machine | {table: part} for part in limits)
        for family in rule.families.split():
            try:
                case = _case(family, {"q": size, "t": threads})
            except ValueError:  # a fraction
                continue
            net = isinstance(case, Net)
            suite, mode, optimizer = ("train", "step", "sgd") if net else ("layers", rule.mode, "")
            setting = Setting(suite, mode, "relu", optimizer, dtype, "cpu", threads)
            fits = case.elements(mode) * setting.torch_dtype.itemsize <= LARGEST_BYTES
            plans = []
            for side in (below, above):
                _C.use_machine(side)
                plans.append(plan(case, setting))
            if fits and (plans[0] != plans[1] or not rule.planned):
                yield Point(rule, table, family, size, case, setting, below, above)


def _case(family: str, sizes: Mapping[str, int]) -> Case:
    def value(match: re.Match[str]) -> str:
        product = Fraction(1)
        for operator, name in re.findall(r"([*/]?)(\w+)", match[0]):
            factor = sizes.get(name) or int(name)
            product = product / factor if operator == "/" else product * factor
        return str(product)

    return parse("train" if "@" in family else "layers", re.sub(r"[^x@-]+", value, family))


def visit(point: Point) -> list[float]:
    """Ratios of a few rounds, with both sides in turn."""
    suite, short = point.setting.suite, point.case.operations(point.setting.mode) < SHORT
    provider = PROVIDERS[suite]["step" if suite == "train" else "fused"]
    work = set_up(point.case, point.setting)(provider)

    def on(machine: Machine) -> Work:
        def prepare(turn: int) -> Any:
            _C.use_machine(machine)
            return work.prepare(turn)

        return Work(prepare, work.results)

    sides = {"below": on(point.below), "above": on(point.above)}
    rounds = MORE_ROUNDS if short else ROUNDS
    found = in_turn(sides, rounds, time.perf_counter, sample_seconds=SAMPLE_SECONDS)
    return [log(a / b) for a, b in zip(found["above"], found["below"], strict=True)]


def measure(
    points: Sequence[Point],
    seconds: float,
    visit: Callable[[Point], list[float]] = visit,
    clock: Clock = time.perf_counter,
    progress: Callable[[float], object] = lambda share: None,
) -> None:
    """Visits all points again and again until the time is up, so that drift affects all alike."""
    started, longest = clock(), 0.0
    for point in cycle(points):
        before = clock()
        if before + longest > started + seconds:
            return
        point.ratios += visit(point)
        longest = max(longest, clock() - before)
        progress((before - started) / seconds)


class Choice(NamedTuple):
    """A limit before and after; `moved` are the points that change sides."""

    points: Sequence[Point]
    old: int
    new: int
    moved: Sequence[Point] = ()

    @property
    def limit(self) -> str:
        return self.points[0].rule.limit

    @property
    def table(self) -> str:
        return self.points[0].table

    @property
    def texts(self) -> list[str]:
        """The old limit, and the new one if it moves."""
        limits = [self.old, self.new] if self.moved else [self.old]
        return ["never" if limit == NEVER else str(limit) for limit in limits]

    @property
    def measured(self) -> bool:
        return all(len(p.ratios) >= ROUNDS for p in self.points)

    @property
    def gain(self) -> float:
        """Times as fast at the points that change sides: the geometric mean."""
        return exp(abs(fmean(p.ratio for p in self.moved)))


def choose_all(points: Iterable[Point], machine: Machine) -> list[Choice]:
    """A choice for each rule and mode; `machine` has the old limits."""
    parts: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        parts.setdefault((point.table, point.rule.limit), []).append(point)
    half = max(2**17, min(2**21, build_info()["l2_per_core"] // 2))  # as csrc/cpu/machines.cpp
    blocks = {("block_bytes", 0): half}
    old = {(table, limit): machine[table][limit] for table, limit in parts}
    return [choose(part, blocks.get((key[1], old[key]), old[key])) for key, part in parts.items()]


def choose(points: Sequence[Point], old: int) -> Choice:
    """The limit that the points of a rule in a mode tell; `old` if no other is clearly faster.

    Ratios are the medians over families, and of three neighbours on the ladder. The limit is where
    the sum of the times' logarithms is least. One point alone never moves it.
    """
    stay = Choice(points, old, old)
    if not stay.measured:
        return stay
    up_to = points[0].rule.sides.up_to
    sizes = sorted({p.size for p in points})
    rungs = [[p for p in points if p.size == size] for size in sizes]
    raw = [median(p.counted for p in rung) for rung in rungs]
    windows = zip(raw, raw[1:], raw[2:], strict=False)
    smooth = raw[:1] + [median(three) for three in windows] + raw[1:][-1:]
    before = sum(size < old or (size == old and up_to) for size in sizes)
    gains = [r + MARGIN if i < before else r - MARGIN for i, r in enumerate(smooth)]
    sums = [0.0, *accumulate(gains)]  # gained by a limit with so many sizes below
    cut = max(range(len(sums)), key=lambda i: (sums[i], -abs(i - before)))
    first, last = sorted((cut, before))
    sign = 1 if cut > before else -1
    moved = [p for rung in rungs[first:last] for p in rung]
    faster = [sign * p.counted for p in moved]
    error = sqrt(fsum(fmean(p.error for p in rung) ** 2 for rung in rungs[first:last]))
    if (
        sum(gain > 0 for gain in faster) < max(2, len(moved) / 2)
        or fmean(faster) < MARGIN  # families may disagree
        or sign * fsum(smooth[first:last]) <= ERRORS * error
    ):
        return stay
    return Choice(points, old, _limit(points[0], sizes, cut), moved)


def _limit(point: Point, sizes: Sequence[int], cut: int) -> int:
    """The limit with so many sizes below."""
    (below, above, up_to, may_be_never), threads = point.rule.sides, point.setting.threads
    if cut == len(sizes) and may_be_never:
        return NEVER
    last = cut == len(sizes) or (up_to and cut > 0)
    return below(sizes[cut - 1], threads) if last else above(sizes[cut], threads)
