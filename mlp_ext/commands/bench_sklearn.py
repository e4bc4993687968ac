"""What `mlp-ext bench --suite sklearn` does."""

from __future__ import annotations

import argparse
from textwrap import fill

import torch

from mlp_ext.bench.estimators import CASES, PROVIDERS, EstimatorRow, measure
from mlp_ext.bench.machine import cpus, device_name
from mlp_ext.bench.noise import busy, wide
from mlp_ext.bench.rows import as_number, as_range, as_threads, as_time, write_csv
from mlp_ext.commands import arguments
from mlp_ext.commands.summary import WIDTH
from mlp_ext_cli.arguments import meant
from mlp_ext_cli.bench import SKLEARN

ABOUT = f"{SKLEARN}: cases {', '.join(CASES)}; native is scikit-learn's"
OTHERS = (  # options of the other suites
    *("mode", "providers", "provider", "optimizer", "json", "plot", "peak", "beside_load"),
)


def run(args: argparse.Namespace) -> None:
    if args.list:
        print(ABOUT)
        return
    for name in OTHERS:
        if getattr(args, name):
            args.fail(f"argument --{name.replace('_', '-')}: not in --suite {SKLEARN}")
    for name, only in (("device", "cpu"), ("activation", "relu")):
        if getattr(args, name) != only:
            args.fail(f"argument --{name}: {SKLEARN} has {only} only")
    for name in args.cases or ():
        if name not in CASES:
            has = f"{SKLEARN} has {', '.join(CASES)}, got '{name}'"
            args.fail(f"argument --cases: {has}{meant(name, CASES)}")
    if len(args.threads or ()) > 1:
        args.fail(f"argument --threads: {SKLEARN} has one number of threads")
    threads = (args.threads or [torch.get_num_threads()])[0]
    print(f"{SKLEARN} fit relu adam", f"{device_name('cpu')}, {as_threads(threads)}", sep="\n")
    width = 2 + max(map(len, PROVIDERS))
    print(f"{'':{width}}{'an epoch':>9}{'speed':>8}{'20-80%':>13}{'accuracy':>10}", flush=True)
    rows: list[EstimatorRow] = []
    with arguments.advising(args.fail):
        for name in args.cases or CASES:
            rows += (part := measure(CASES[name], args.rounds, threads))
            print(CASES[name])
            for row in part:
                print(_line(row, width), flush=True)
    others = max(row.other_cpus or 0.0 for row in rows)
    spread = wide((f"{r.provider} at {r.case}", r.ratio_q20, r.ratio_q80) for r in rows)
    if found := [*filter(None, (busy(others, threads, len(cpus())), spread))]:
        print(fill(f"timings unreliable: {'; '.join(found)}: measure again", WIDTH))
    if args.csv:
        try:
            write_csv(rows, args.csv, EstimatorRow)
        except OSError as error:
            args.fail(str(error))


def _line(row: EstimatorRow, width: int) -> str:
    ratio = "" if row.provider == "native" else f"{as_number(row.ratio_to_native)}x"
    spread = as_range(row.ratio_q20, row.ratio_q80) if ratio else ""
    cells = f"{as_time(row.median_s):>9}{ratio:>8}{spread:>13}{row.accuracy:>10.1%}"
    return f"  {row.provider:{width - 2}}{cells}"
