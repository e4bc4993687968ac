"""What `mlp-ext tune` does: measures the limits between paths, and writes those that differ."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from textwrap import fill

import torch

from mlp_ext import _C, machine
from mlp_ext.bench.cases import Setting
from mlp_ext.bench.machine import cpus, device_name, other_cpus, torch_set
from mlp_ext.bench.noise import busy
from mlp_ext.bench.rows import as_number, as_threads, replacing
from mlp_ext.bench.tuning import Choice, Machine, choose_all, measure, points
from mlp_ext.commands import arguments, plots
from mlp_ext.commands.summary import WIDTH
from mlp_ext_cli.tune import DTYPES


def run(args: argparse.Namespace) -> None:
    for dtype in args.dtype:
        arguments.check_name("--dtype", dtype, DTYPES, args.fail)
    picture = args.plot or args.out.with_suffix(".png")
    arguments.check_picture(picture, args.fail)
    arguments.check_files(args, plot=picture, out=args.out)
    threads, before = args.threads or torch.get_num_threads(), _C.machine()
    place = f"{device_name('cpu')}, {as_threads(threads)}"
    print(place, flush=True)
    try:
        with torch_set(Setting("layers", "full", threads=threads)):
            found = points(before, args.dtype, threads)
            print(f"{len(found)} points near limits, {args.minutes:g} minutes", flush=True)
            others = other_cpus()
            measure(found, 60 * args.minutes, progress=_progress)
            used = others()
        choices = choose_all(found, before)
        _C.use_machine(None)
        own = _own(before, choices, _C.machine())
        with replacing(args.out) as path:
            path.write_text(json.dumps(own, indent=2) + "\n")
            machine.read(str(path))
        with replacing(picture) as path:
            plots.limits(choices, place).savefig(path)
    except (OSError, ValueError) as error:
        args.fail(str(error))
    finally:
        _C.use_machine(before)
    _report(choices)
    if noise := busy(used, threads, len(cpus())):
        print(fill(f"timings unreliable: {noise}: stop other programs and measure again", WIDTH))
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
        old, new = c.texts
        gain = f"{as_number(c.gain)}x at {len(c.moved)} points"
        print(f"{c.limit:26}{c.table:10}{old:>11}{new:>11}  {gain}")
    missing = sum(not choice.measured for choice in choices)
    print(f"{len(choices) - len(moved) - missing} limits stay: no other is faster beyond the noise")
    if missing:
        print(f"{missing} limits stay: not all of their points were measured; more --minutes")
