"""What `mlp-ext plan` does: prints a plan of the kernels, and the sizes at which it changes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import log
from textwrap import fill
from typing import Any, NamedTuple

import torch

from mlp_ext import _C
from mlp_ext.bench.cases import LARGEST, Case, Layer, Net, Setting, parse
from mlp_ext.bench.machine import device_name
from mlp_ext.bench.plans import LAYER_PATHS, SHARED, STEP_PATHS, capability, paths, plan
from mlp_ext.bench.rows import as_threads
from mlp_ext.commands import arguments
from mlp_ext.commands.summary import WIDTH
from mlp_ext.ops import ACTIVATIONS

Plans = Callable[[Case, Setting], dict[str, Any]]

MOST_THREADS = 1024  # that limits are searched for
SHOWN = 4  # ranges, those with the nearest limits
NEIGHBORS = 64  # sizes tried one by one: some limits are multiples
STEP = 1.02  # then by this factor


def run(args: argparse.Namespace) -> None:
    arguments.check_name("--activation", args.activation, ACTIVATIONS, args.fail)
    suite = "train" if "@" in args.case else "layers"
    try:
        case = parse(suite, args.case)
    except ValueError:
        forms = "MxKxN, e.g. 64x784x256, or WIDTHS@BATCH, e.g. 784-256-10@64"
        args.fail(f"argument case: must be {forms}, got '{args.case}'")
    arch = _arch(args)
    if args.machine:
        arguments.check_name("--machine", args.machine, _C.machines(), args.fail)
    planned = partial(plan, arch=arch, machine=args.machine)
    threads = args.threads or torch.get_num_threads()
    mode = "step" if isinstance(case, Net) else "full"
    setting = Setting(suite, mode, args.activation, "", args.dtype, args.device, threads)
    try:
        found = planned(case, setting)
    except ValueError as error:
        args.fail(str(error))

    on_layer = f" {args.activation}" if isinstance(case, Layer) else ""
    print(f"{case}{on_layer} {args.dtype}")
    if arch:
        print(f"GPU of architecture {arch}")
    else:
        place = f"{args.machine or device_name('cpu')}, {as_threads(threads)}"
        print(f"{place}; a piece is the work of one thread")
    for way, path in paths(found).items():
        print(f"\n{way}: {path}{_split(way, path, found, case)}")
        reason = (
            found.get("reason") or found.get(f"{way}_reason") or (LAYER_PATHS | STEP_PATHS)[path]
        )
        print(fill(reason, WIDTH, initial_indent="  ", subsequent_indent="  "))
        ranges = _ranges(case, setting, planned, way)
        print("  for all sizes" if not ranges else "  for these sizes, changed one at a time:")
        for one in ranges:
            print(f"    {one}")


def _arch(args: argparse.Namespace) -> int:
    """0 on CPUs."""
    if args.device == "cuda" and args.machine:
        args.fail("argument --machine: is for --device cpu")
    if args.device == "cpu":
        if args.arch:
            args.fail("argument --arch: requires --device cuda")
        if args.dtype == "tf32":
            args.fail("argument --dtype: tf32 requires --device cuda")
        return 0
    if args.threads:
        args.fail("argument --threads: requires --device cpu")
    if args.arch:
        if args.arch not in SHARED:
            known = ", ".join(map(str, SHARED))
            args.fail(f"argument --arch: must be one of {known}, got '{args.arch}'")
        return int(args.arch)
    if not torch.cuda.is_available():
        args.fail("argument --arch: no CUDA device available; add e.g. --arch 90")
    return capability()


def _split(way: str, path: str, found: dict[str, Any], case: Case) -> str:
    """How the work is split on the CPU."""
    if path == "library" or {"reason", f"{way}_reason"} & found.keys():
        return ""
    if isinstance(case, Net):
        if path == "layers":
            return f"; see mlp-ext plan {Layer(case.batch, *case.widths[:2])}"
        return f", {_pieces(found['pieces'])}"
    if way == "forward":
        return f", {_grid('y', found['forward'])}"
    dx, dw = found["grad_input"], found["grad_weight"]
    if path == "few_rows":
        return f", {_pieces(max(dx))} of {'rows' if dx[2] > 1 else 'columns'}"
    if path == "amx":
        return f", {_grid('dx', dx)}, {_grid('dW', dw)}"
    if path != "packed":  # in one pass
        return f", {_pieces(max(dx[2], dw[2]))}"
    at_once = ", at once" if found["concurrent_gemms"] else ", one after the other"
    return f", {_grid('dx', dx)}, {_grid('dW', dw)}{at_once}"


def _grid(name: str, grid: tuple[int, int, int]) -> str:
    rows, columns, samples = grid
    if rows * columns * samples == 1:
        return f"{name} in 1 piece"
    return f"{name} in {rows} x {columns}{f' x {samples}' * (samples > 1)} pieces"


def _pieces(count: int) -> str:
    return f"{count} piece{'s' * (count != 1)}"


class Limit(NamedTuple):
    """The path is taken up to, or down to, this size; the next one has another path."""

    size: int
    next: int
    other: str


class Range(NamedTuple):
    """The sizes around the case's own that have its path, with a limit at one end or both."""

    name: str
    size: int
    low: Limit | None
    high: Limit | None

    @property
    def distance(self) -> float:
        """Of the nearer limit, in sizes' logarithms."""
        return min(abs(log(limit.size / self.size)) for limit in (self.low, self.high) if limit)

    def __str__(self) -> str:
        low, high = self.low, self.high
        sizes = f"{low.size} to {high.size}" if low and high else ""
        sizes = sizes or (f">= {low.size}" if low else f"<= {high.size}" if high else "")
        beyond = ", ".join(f"{limit.next}: {limit.other}" for limit in (low, high) if limit)
        return f"{self.name} {sizes} ({beyond})"


def _ranges(case: Case, setting: Setting, planned: Plans, way: str) -> list[Range]:
    """Those with the nearest limits of this path, one size varied at a time."""
    if isinstance(case, Layer):
        names, sizes = [*case._fields], [*case]
    else:
        names = ["batch", *(f"width {i} ({n})" for i, n in enumerate(case.widths, 1))]
        sizes = [case.batch, *case.widths]
    if setting.device == "cpu":
        names.append("threads")
        sizes.append(setting.threads)

    def path(place: int, size: int) -> str | None:
        """With another size there; None where that is too large."""
        tried = [*sizes[:place], size, *sizes[place + 1 :]]
        threads = tried.pop() if setting.device == "cpu" else 1
        other = Layer(*tried) if isinstance(case, Layer) else Net(tuple(tried[1:]), tried[0])
        try:
            return paths(planned(other, replace(setting, threads=threads)))[way]
        except ValueError:
            return None

    found = []
    for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
        last = MOST_THREADS if name == "threads" else LARGEST
        low, high = (_limit(size, end, partial(path, place)) for end in (1, last))
        if low or high:
            found.append(Range(name, size, low, high))
    return sorted(found, key=lambda one: one.distance)[:SHOWN]


def _limit(size: int, end: int, path: Callable[[int], str | None]) -> Limit | None:
    """The one between `size` and `end`, if there is any."""
    here, last = path(size), size
    for tried in _outward(size, end):
        other = path(tried)
        if other is None:
            return None
        if other != here:
            while abs(tried - last) > 1:  # the path changes between them
                middle = (tried + last) // 2
                found = path(middle)
                if found == here:
                    last = middle
                else:
                    tried, other = middle, str(found)
            return Limit(last, tried, other)
        last = tried
    return None


def _outward(size: int, end: int) -> Iterator[int]:
    """Sizes after `size`, farther and farther apart, to `end`."""
    sign, at = (1 if end > size else -1), size
    while at != end:
        step = 1 if abs(at - size) < NEIGHBORS else max(1, int(at * (STEP - 1)))
        at = min(at + step, end) if sign > 0 else max(at - step, end)
        yield at
