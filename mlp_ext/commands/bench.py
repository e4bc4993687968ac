"""What `mlp-ext bench` does: its table and its files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch

from mlp_ext.bench import plot
from mlp_ext.bench.cases import SUITES, Case, Setting, parse_all
from mlp_ext.bench.machine import Peak, device_name, measure_peak
from mlp_ext.bench.providers import DEFAULT, PROVIDERS
from mlp_ext.bench.rows import (
    Row,
    as_time,
    by_provider,
    geometric_mean,
    replacing,
    write_csv,
    write_json,
)
from mlp_ext.bench.runner import WrongResult, measure
from mlp_ext.bench.training import OPTIMIZERS
from mlp_ext.commands import arguments
from mlp_ext.ops import ACTIVATIONS


def run(args: argparse.Namespace) -> None:
    arguments.check_name("--activation", args.activation, ACTIVATIONS, args.fail)
    if args.optimizer:
        arguments.check_name("--optimizer", args.optimizer, OPTIMIZERS, args.fail)
    arguments.check_device(args.device, args.fail)
    arguments.check_picture(args.plot, args.fail)
    if args.dtype == "tf32" and args.device == "cpu":
        args.fail("argument --dtype: tf32 is for --device cuda")
    suite = args.suite or "layers"
    mode = args.mode or SUITES[suite].modes[0]
    if mode not in SUITES[suite].modes:
        args.fail(f"argument --mode: {suite} has {', '.join(SUITES[suite].modes)}, got '{mode}'")
    if args.optimizer and not SUITES[suite].optimizer:
        args.fail(f"argument --optimizer: {suite} has none, use --suite train")
    optimizer = args.optimizer or SUITES[suite].optimizer
    threads = args.threads or torch.get_num_threads()
    setting = Setting(suite, mode, args.activation, optimizer, args.dtype, args.device, threads)
    requested = (args.suite, args.mode, args.cases, args.providers, args.csv, args.json, args.plot)
    if args.peak and not any(requested):
        _print_peak(measure_peak(setting), setting)
        return
    try:
        cases = parse_all(suite, args.cases or ()) or SUITES[suite].published(args.device)
    except ValueError as error:
        args.fail(f"argument --cases: {error}")
    providers = _providers(args, setting)
    if args.plot and providers == ["native"]:
        args.fail("argument --plot: nothing to draw: no provider besides native")

    peak = measure_peak(setting) if args.peak else None
    if peak:
        _print_peak(peak, setting)
    rows = _run(args, cases, setting, providers, peak)
    try:
        if args.csv:
            write_csv(rows, args.csv)
        if args.json:
            write_json(rows, args.json)
        if args.plot:
            with replacing(args.plot) as path:
                plot.ratio_bars(rows).savefig(path)
    except OSError as error:
        args.fail(str(error))


def _providers(args: argparse.Namespace, setting: Setting) -> list[str]:
    """native, then the selected providers; prints which of them do not apply, and why."""
    known = PROVIDERS[setting.suite]
    found = ["native"]
    for name in args.providers or [n for n in DEFAULT[setting.device] if n in known]:
        if name not in known:
            args.fail(f"argument --providers: {setting.suite} has {', '.join(known)}, got '{name}'")
        if obstacle := known[name].obstacle(setting):
            print(f"{args.prog}: {name} is left out: {obstacle}", file=sys.stderr)
        elif name != "native":
            found.append(name)
    return found


def _run(
    args: argparse.Namespace,
    cases: Sequence[Case],
    setting: Setting,
    providers: Sequence[str],
    peak: Peak | None,
) -> list[Row]:
    """Measures and prints; exits with status 1 if a provider's results are wrong."""
    machine = f"{device_name(setting.device)}, {_threads(setting.threads)}"
    print(f"{setting.suite} {setting.name} on {machine}")
    print("median time of a call, times as fast as native" + ", share of peak" * bool(peak))
    first = max(len("geometric mean"), *(len(str(case)) for case in cases))
    other = max(24 if peak else 16, first, *map(len, providers))

    def line(name: str, cells: Sequence[str]) -> str:
        return "  ".join([name.ljust(first), *(cell.rjust(other) for cell in cells)])

    print(line("", providers), flush=True)
    rows: list[Row] = []
    bar = _progress_bar(len(cases) * args.rounds)
    try:
        for case in cases:
            if bar:
                bar.set_description(str(case))
            after_round = bar.update if bar else (lambda: None)
            part = measure(case, setting, providers, args.rounds, peak, after_round)
            rows += part
            with bar.external_write_mode() if bar else nullcontext():
                cells = {row.provider: _cell(row) for row in part}
                print(line(str(case), [cells.get(name, "-") for name in providers]), flush=True)
    except WrongResult as error:
        args.exit(1, f"{args.prog}: error: {error}\n")
    except RuntimeError as error:  # out of memory
        args.fail(f"argument --cases: {case}: {str(error).strip().splitlines()[0]}")
    finally:
        if bar:
            bar.close()

    peers = by_provider(rows)
    if not peers:
        return rows

    def summary(name: str, of: Callable[[list[Row]], str]) -> str:
        return line(name, [of(peers[p]) if p in peers else "" for p in providers])

    def least(part: list[Row]) -> Row:
        return min(part, key=lambda row: row.ratio_to_native)

    def mean(part: list[Row]) -> str:
        return f"{geometric_mean([row.ratio_to_native for row in part]):.2f}x"

    print(summary("geometric mean", mean))
    print(summary("minimum", lambda part: f"{least(part).ratio_to_native:.2f}x"))
    print(summary("  at", lambda part: least(part).case))
    return rows


def _cell(row: Row) -> str:
    cell = as_time(row.median_s)
    if row.provider != "native":
        cell += f"  {row.ratio_to_native:5.2f}x"
    if row.share_of_peak is not None:
        cell += f"  {row.share_of_peak:4.0%}"
    return cell


def _threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def _print_peak(peak: Peak, setting: Setting) -> None:
    on_cpu = setting.device == "cpu"
    print(
        f"peak {f'with {_threads(setting.threads)} ' * on_cpu}of {device_name(setting.device)}: "
        f"{peak.flops / 1e9:.1f} GFLOP/s {'float32' if on_cpu else setting.dtype}, "
        f"copy {peak.bandwidth / 1e9:.1f} GB/s",
        flush=True,
    )


def _progress_bar(total: int) -> Any:
    """None if stderr is not a terminal or tqdm is missing."""
    if not (sys.stderr.isatty() and find_spec("tqdm")):
        return None
    from tqdm import tqdm

    return tqdm(total=total, unit="round", leave=False)
