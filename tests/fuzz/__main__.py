"""Fuzzes for minutes, in one process after another: each instruction set, with 1 to 4 threads.

    PYTHONPATH=tests python -m fuzz --minutes 60 --log build/fuzz.jsonl

Each round has a seed of its own, and a line in the log when it is done. A later call goes on after
them. A crash or a hang ends only its round; the log then has the case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import count, product
from pathlib import Path
from typing import Any

from levels import LEVELS, available

from fuzz.runs import KINDS

THREADS = (1, 2, 3, 4)
SECONDS = 1800  # after which a round hangs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--times", type=int, default=8, help="a quick run's cases in a round")
    parser.add_argument("--log", type=Path, default=Path("build/fuzz.jsonl"))
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS)
    parser.add_argument("--report", action="store_true", help="only prints what the log has")
    options = parser.parse_args()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    options.log.touch()
    end = time.monotonic() + 60 * options.minutes
    first = 1 + max((row["seed"] for row in rows_of(options.log)), default=-1)
    configurations = [*product(options.threads, available())]
    for seed in count(first):
        if options.report or time.monotonic() > end:
            break
        threads, level = configurations[seed % len(configurations)]
        run_round(level, threads, seed, options)
        print(f"seed {seed}: {sum(row['cases'] for row in rows_of(options.log))} cases", flush=True)
    print(text := report(rows_of(options.log)))
    return int("FAILED" in text)


def rows_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def run_round(level: str, threads: int, seed: int, options: argparse.Namespace) -> None:
    """All kinds in a process, whose output is rows for the log; then a row if it did not end."""
    last = options.log.with_suffix(".case")
    last.write_text("no case yet")
    command = [sys.executable, "-c", ROUND, str(seed), str(options.times), str(threads), str(last)]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": LEVELS[level][0]}
    with options.log.open("a") as log:
        try:
            done = subprocess.run(
                command, env=environment, stdout=log, timeout=SECONDS, check=False
            )
            ended = "" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"no end after {SECONDS} s"
    if ended:
        row = {"kind": "crash", "level": LEVELS[level][1], "threads": threads, "seed": seed}
        failure = f"{last.read_text()}\n{ended}"
        with options.log.open("a") as log:
            print(json.dumps(row | {"cases": 0, "failure": failure}), file=log)


ROUND = """
import json, os, sys
from pathlib import Path
import torch
from fuzz.runs import QUICK, run
from mlp_ext import _C
seed, times, threads, last = sys.argv[1:]
torch.set_num_threads(int(threads))
def note(case): Path(last).write_text(repr(case))
for kind, cases in QUICK.items():
    tried, failure = run(kind, int(seed), int(times) * cases, before=note)
    row = {"kind": kind, "level": _C.instruction_set(), "threads": int(threads), "seed": int(seed)}
    print(json.dumps(row | {"cases": tried, "failure": failure}), flush=True)
"""


def report(rows: list[dict[str, Any]]) -> str:
    """Cases of each configuration, and the failures."""
    tried: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        tried[row["level"], str(row["threads"]), row["kind"]] += row["cases"]
    lines = ["instruction set  threads  " + "".join(f"{kind:>12}" for kind in KINDS)]
    for level, threads in sorted({key[:2] for key in tried}):
        counts = "".join(f"{tried[level, threads, kind]:>12}" for kind in KINDS)
        lines.append(f"{level:<15}  {threads:>7}  {counts}")
    seeds = {row["seed"] for row in rows}
    lines.append(f"{tried.total()} cases, seeds {min(seeds, default=0)} to {max(seeds, default=0)}")
    for row in rows:
        if row["failure"]:
            where = "{level}, {threads} threads, {kind}, seed {seed}".format(**row)
            lines.append(f"FAILED {where}: {row['failure']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
