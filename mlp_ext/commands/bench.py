"""What `mlp-ext bench` does: its tables and its files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from textwrap import fill

import torch

from mlp_ext.bench import plot
from mlp_ext.bench.cases import SUITES, Case, Setting, parse_all
from mlp_ext.bench.machine import Peak, busy_core, cpus, device_name, measure_peak
from mlp_ext.bench.noise import noise
from mlp_ext.bench.own import own_provider
from mlp_ext.bench.providers import DEFAULT, PROVIDERS, Provider
from mlp_ext.bench.rows import (
    Row,
    as_number,
    as_range,
    as_threads,
    as_time,
    by_provider,
    geometric_mean,
    replacing,
    write_csv,
    write_json,
)
from mlp_ext.bench.runner import WrongResult, measure
from mlp_ext.bench.training import OPTIMIZERS
from mlp_ext.commands import arguments, bench_sklearn
from mlp_ext.commands.progress import Bar
from mlp_ext.commands.summary import WIDTH
from mlp_ext.ops import ACTIVATIONS
from mlp_ext_cli.arguments import meant
from mlp_ext_cli.bench import SKLEARN


def run(args: argparse.Namespace) -> None:
    if args.suite == SKLEARN:
        bench_sklearn.run(args)
        return
    arguments.check_name("--activation", args.activation, ACTIVATIONS, args.fail)
    if args.optimizer:
        arguments.check_name("--optimizer", args.optimizer, OPTIMIZERS, args.fail)
    if args.list:
        _print_list(args)
        return
    arguments.check_device(args.device, args.fail)
    arguments.check_picture(args.plot, args.fail)
    arguments.check_files(args, csv=args.csv, json=args.json, plot=args.plot)
    setting = _setting(args, args.suite or "layers")
    requested = (args.suite, args.mode, args.cases, args.providers, args.csv, args.json, args.plot)
    if args.peak and not any((*requested, args.provider)):
        print(_machine(setting))
        print(_peak(measure_peak(setting), setting))
        return
    try:
        cases = parse_all(setting.suite, args.cases or ())
    except ValueError as error:
        args.fail(f"argument --cases: {error}{_suite_with(args.cases)}")
    cases = cases or [*SUITES[setting.suite].published(args.device)]
    providers = _providers(args, setting)
    if args.plot and [*providers] == ["native"]:
        args.fail("argument --plot: nothing to plot: native is the only provider")
    if args.peak and len(args.threads or ()) > 1:
        args.fail("argument --peak: allows one number of threads only")
    with busy_core() if args.beside_load else nullcontext():
        rows = _measure(args, cases, setting, providers)
    try:
        if args.csv:
            write_csv(rows, args.csv)
        if args.json:
            write_json([asdict(row) for row in rows], args.json)
        if args.plot:
            with replacing(args.plot) as path:
                plot.ratios(rows).savefig(path)
    except OSError as error:
        args.fail(str(error))


def _setting(args: argparse.Namespace, suite: str) -> Setting:
    modes = SUITES[suite].modes
    if args.dtype == "tf32" and args.device == "cpu":
        args.fail("argument --dtype: tf32 requires --device cuda")
    if (mode := args.mode or modes[0]) not in modes:
        elsewhere = _elsewhere(mode, {name: s.modes for name, s in SUITES.items()})
        args.fail(f"argument --mode: {suite} has {', '.join(modes)}, got '{mode}'{elsewhere}")
    if args.optimizer and not SUITES[suite].optimizer:
        args.fail(f"argument --optimizer: {suite} has none; use --suite train")
    optimizer = args.optimizer or SUITES[suite].optimizer
    threads = max(args.threads or [torch.get_num_threads()])
    return Setting(suite, mode, args.activation, optimizer, args.dtype, args.device, threads)


def _providers(args: argparse.Namespace, setting: Setting) -> dict[str, Provider]:
    """native, then the selected providers; prints which of them do not apply, and why."""
    known = PROVIDERS[setting.suite]
    found = {"native": known["native"]}
    for name in args.providers or [n for n in DEFAULT[setting.device] if n in known]:
        if name not in known:
            has = f"{setting.suite} has {', '.join(known)}, got '{name}'"
            hint = _elsewhere(name, PROVIDERS) or meant(name, known)
            args.fail(f"argument --providers: {has}{hint}")
        if obstacle := known[name].obstacle(setting):
            print(f"{args.prog}: {name} skipped: {obstacle}", file=sys.stderr)
        else:
            found[name] = known[name]
    for source, function in args.provider:
        try:
            own = own_provider(source, function)
        except ValueError as error:
            args.fail(f"argument --provider: {error}")
        if function in known or function in found:
            args.fail(f"argument --provider: {function} already exists; rename yours")
        found[function] = own
    return found


def _elsewhere(name: str, by_suite: Mapping[str, Container[str]]) -> str:
    """The end of an error: the suite that has this mode or provider, if one has."""
    found = [suite for suite, names in by_suite.items() if name in names]
    return f"; {name} is in --suite {found[0]}" if found else ""


def _suite_with(cases: Sequence[str]) -> str:
    """The end of an error: the suite that has all these cases, if one has."""
    for suite in SUITES:
        with suppress(ValueError):
            parse_all(suite, cases)
            return f"; use --suite {suite}"
    return ""


def _print_list(args: argparse.Namespace) -> None:
    """The suites, their modes and providers, and whether these apply with the arguments here."""
    for suite in [args.suite] if args.suite else SUITES:
        setting = _setting(args, suite)
        print(f"{suite}: cases {SUITES[suite].form}; --mode {', '.join(SUITES[suite].modes)}")
        print(f"  {'provider':22}here")
        for name, provider in PROVIDERS[suite].items():
            obstacle = provider.obstacle(setting)
            line = f"  {name:22}{'no ' if obstacle else 'yes'}  {provider.about}"
            print(fill(line + f": {obstacle}" * bool(obstacle), WIDTH, subsequent_indent=" " * 29))
    if not args.suite:
        print(bench_sklearn.ABOUT)


def _measure(
    args: argparse.Namespace,
    cases: Sequence[Case],
    setting: Setting,
    providers: Mapping[str, Provider],
) -> list[Row]:
    """Measures and prints; exits with status 1 if a provider fails or its results are wrong."""
    print(f"{setting.suite} {setting.name}", _machine(setting), sep="\n", flush=True)
    peak = measure_peak(setting) if args.peak else None
    if peak:
        print(_peak(peak, setting))
    fewer = sorted({*(args.threads or ())} - {setting.threads})
    width = max(22, *(2 + len(name) for name in providers))
    heading = f"{'':{width}}{'time':>9}{'speed':>8}{'20-80%':>13}{'of bound' * bool(peak):>10}"
    print(f"{heading}  path", flush=True)
    rows: list[Row] = []
    try:
        with Bar(len(cases) * args.rounds, unit="round") as bar:
            for case in cases:
                bar.describe(str(case))
                part = measure(case, setting, providers, args.rounds, peak, bar.advance, fewer)
                rows += part
                with bar.aside():
                    bound = peak.bound(case, setting) if peak else None
                    print(f"{case}" + (f", {bound[0]} bound: {as_time(bound[1])}" if bound else ""))
                    for row in part:
                        print(_line(row, width), flush=True)
    except WrongResult as error:
        args.exit(1, f"{args.prog}: error: {error}\n")
    except RuntimeError as error:  # out of memory
        args.fail(f"argument --cases: {case}: {str(error).strip().splitlines()[0]}")
    if len(cases) > 1:
        for line in _summary(rows, width):
            print(line)
    if line := noise(rows, None if args.beside_load else len(cpus())):
        print(fill(line, WIDTH))
    return rows


def _line(row: Row, width: int) -> str:
    ratio = "" if row.provider == "native" else f"{as_number(row.ratio_to_native)}x"
    spread = as_range(row.ratio_q20, row.ratio_q80) if ratio else ""
    share = "" if row.share_of_bound is None else f"{row.share_of_bound:.0%}"
    cells = f"{as_time(row.median_s):>9}{ratio:>8}{spread:>13}{share:>{10 if share else 0}}"
    return f"  {row.provider:{width - 2}}{cells}  {row.path}".rstrip()


def _summary(rows: Sequence[Row], width: int) -> list[str]:
    """The mean and the least ratio of each provider."""
    lines = []
    for name, part in by_provider(rows).items():
        least = min(part, key=lambda row: row.ratio_to_native)
        mean = as_number(geometric_mean([row.ratio_to_native for row in part]))
        lines.append(
            f"  {name:{width - 2}}{'':9}{mean + 'x':>8}"
            f"  least {as_number(least.ratio_to_native)}x at {least.case}"
        )
    return ["geometric mean", *lines] if lines else []


def _machine(setting: Setting) -> str:
    name = device_name(setting.device)
    return f"{name}, {as_threads(setting.threads)}" if setting.device == "cpu" else name


def _peak(peak: Peak, setting: Setting) -> str:
    copies = [f"{peak.bandwidth[size] / 1e9:.0f}" for size in sorted(peak.bandwidth)]
    cached = f" (cached {copies[0]})" if len(copies) > 1 else ""
    return (
        f"peak: {peak.flops / 1e9:.0f} GFLOP/s {setting.dtype}, "
        f"copy {copies[-1]} GB/s{cached}, call {as_time(peak.latency)}"
    )
