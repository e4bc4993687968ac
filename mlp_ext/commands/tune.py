"""What `mlp-ext tune` does: measures the limits between paths, and writes those that differ."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from math import exp
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch

from mlp_ext import _C, machine
from mlp_ext.bench.cases import Setting
from mlp_ext.bench.machine import cpus, device_name, other_cpu_seconds, torch_set
from mlp_ext.bench.noise import busy
from mlp_ext.bench.rows import as_number, as_threads, replacing
from mlp_ext.bench.tuning import NEVER, Choice, Machine, choose_all, measure, points
from mlp_ext.commands import arguments
from mlp_ext_cli.tune import DTYPES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 79  # of a terminal
COLUMNS = 4  # of panels
TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10, 20)


def run(args: argparse.Namespace) -> None:
    for dtype in args.dtype:
        arguments.check_name("--dtype", dtype, DTYPES, args.fail)
    picture = args.plot or args.out.with_suffix(".png")
    arguments.check_picture(picture, args.fail)
    if picture == args.out:
        args.fail("argument --out: is the file of the picture; name another")
    threads, before = args.threads or torch.get_num_threads(), _C.machine()
    place = f"{device_name('cpu')}, {as_threads(threads)}"
    print(place, flush=True)
    try:
        with torch_set(Setting("layers", "full", threads=threads)):
            found = points(before, args.dtype, threads)
            print(f"{len(found)} points near limits, {args.minutes:g} minutes", flush=True)
            others, started = other_cpu_seconds(), time.perf_counter()
            measure(found, 60 * args.minutes, progress=_progress)
            others = (other_cpu_seconds() - others) / (time.perf_counter() - started)
        choices = choose_all(found, before)
        _C.use_machine(None)
        own = _own(before, choices, _C.machine())
        with replacing(args.out) as path:
            path.write_text(json.dumps(own, indent=2) + "\n")
            machine.read(str(path))
        with replacing(picture) as path:
            _figure(choices, place).savefig(path)
    except (OSError, ValueError) as error:
        args.fail(str(error))
    finally:
        _C.use_machine(before)
    _report(choices)
    if used := busy(others, threads, len(cpus())):
        print(fill(f"timings unreliable: {used}: stop other programs and measure again", WIDTH))
    count = sum(len(limits) for limits in own.values() if isinstance(limits, dict))
    what = f"{count} limit{'s' * (count != 1)} to {args.out} and the picture {picture}"
    print(f"Wrote {what}; to use them: MLP_EXT_MACHINE={args.out} python ...")


def _progress(share: float) -> None:
    if sys.stderr.isatty():
        print(f"\r{share:.0%}\r", end="", file=sys.stderr, flush=True)


def _own(before: Machine, choices: Sequence[Choice], detected: Machine) -> Machine:
    """What differs from the limits built in for this processor."""
    tuned = {key: dict(value) for key, value in before.items() if isinstance(value, dict)}
    for choice in choices:
        if choice.moved:
            tuned[choice.table][choice.limit] = choice.new
    own: Machine = {"name": f"{detected['name']}-tuned"}
    if before["bfloat16"] != detected["bfloat16"]:
        own["bfloat16"] = before["bfloat16"]
    for table, limits in tuned.items():
        if differ := {name: n for name, n in limits.items() if n != detected[table][name]}:
            own[table] = differ
    return own


def _report(choices: Sequence[Choice]) -> None:
    moved = [choice for choice in choices if choice.moved]
    if moved:
        print(f"{'limit':26}{'mode':10}{'from':>11}{'to':>11}  gain")
    for c in moved:
        gain = f"{as_number(c.gain)}x at {len(c.moved)} points"
        print(f"{c.limit:26}{c.table:10}{_value(c.old):>11}{_value(c.new):>11}  {gain}")
    missing = sum(not choice.measured for choice in choices)
    print(f"{len(choices) - len(moved) - missing} limits stay: no other is faster beyond the noise")
    if missing:
        print(f"{missing} limits stay: not all of their points were measured; more --minutes")


def _value(limit: int) -> str:
    return "never" if limit == NEVER else str(limit)


def _figure(choices: Sequence[Choice], place: str) -> Figure:
    """A panel for each limit, those that move first."""
    from matplotlib.figure import Figure

    shown = sorted((c for c in choices if c.measured), key=lambda c: not c.moved)
    rows = max(1, -(-len(shown) // COLUMNS))
    figure = Figure(figsize=(4.5 * COLUMNS, 3 * rows + 1), dpi=100, layout="constrained")
    figure.suptitle(
        f"{place}. Above 1 the path below the limit is faster; whiskers: 20 % to 80 % of the "
        "rounds; dashed: the limit so far, solid: the new one"
    )
    for i, choice in enumerate(shown):
        _panel(figure.add_subplot(rows, COLUMNS, i + 1), choice)
    return figure


def _panel(axes: Any, choice: Choice) -> None:
    rule = choice.points[0].rule
    for k, family in enumerate(rule.families.split()):
        part = [p for p in choice.points if p.family == family]
        x = [p.size * 1.06 ** (k - 1) for p in part]  # side by side
        low, high = ([exp(p.range[end]) for p in part] for end in (0, 1))
        axes.vlines(x, low, high, color=f"C{k}", linewidth=1, alpha=0.5)
        axes.plot(x, [exp(p.ratio) for p in part], "o", color=f"C{k}", markersize=3, label=family)
    axes.axhline(1, color="black", linewidth=0.8)
    between = 1.15 if rule.sides.up_to else 1 / 1.15  # sizes of the ladder
    limits = {"--": choice.old} | ({"-": choice.new} if choice.moved else {})
    for style, limit in limits.items():
        if limit <= 2 * rule.ladder[-1]:
            axes.axvline(max(limit, rule.ladder[0] / 1.3) * between, color="C3", linestyle=style)
    axes.set(xscale="log", yscale="log")
    low, high = axes.get_ylim()
    axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS], fontsize="x-small")
    axes.set_ylim(min(low, 0.7), max(high, 1.4))
    sizes = rule.ladder[::2]
    names = [f"2^{n.bit_length() - 1}" if n >= 1024 else str(n) for n in sizes]
    axes.set_xticks(sizes, names, fontsize="x-small")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    below, _, above = rule.names.partition(", ")
    axes.set_ylabel(f"{above} / {below}", fontsize="small")
    moves = " to ".join(map(_value, limits.values()))
    axes.set_title(f"{choice.limit}, {choice.table}: {moves}", fontsize="small")
    axes.legend(fontsize="xx-small", frameon=False, handletextpad=0)
