"""The arguments of `mlp-ext bench`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from mlp_ext_cli.arguments import DEVICES, FLOATS, add_command, count, file, listed

SUITES = {"layers": ("full", "forward", "backward"), "train": ("step",)}  # their modes
DTYPES = (*FLOATS, "tf32")

DESCRIPTION = """\
Measure layers and training steps against native torch and its peers.
"""
EPILOG = """\
In each round the providers run in turn on the same inputs, and their results
are compared with native's before. time: the median of a call. speed: native's
time over this one's, the median over the rounds; above 1 is faster. 20-80 %:
its quantiles over the rounds. of bound, with --peak: the least time that the
machine's arithmetic, memory or latency allows, over the time. path: of our
kernels; `mlp-ext plan` explains it.

full is forward and backward with the gradient of the input, forward requires no
gradient, backward is backward alone; step is forward, MSELoss, zero_grad,
backward and the update.

Your own provider is a function. In layers, make(setting) returns
function(input, weight, bias); in train, make(model, criterion, optimizer)
returns step(input, target), which updates the model and returns the loss:

  def mine(setting):
      return lambda x, w, b: torch.addmm(b, x, w.t()).relu_()

examples:
  mlp-ext bench --list
  mlp-ext bench --cases 64x784x256,4096x64x64 --providers native,compile,fused
  mlp-ext bench --cases 64x784x256 --provider own.py:mine
  mlp-ext bench --suite train --cases 784-256-10@64 --threads 1 --csv rows.csv
  mlp-ext bench --suite train --optimizer adam --plot speed.png
  mlp-ext bench --peak
"""


def add_bench(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = add_command(
        commands,
        "bench",
        "mlp_ext.commands.bench:run",
        help="measure layers and training steps against native torch and its peers",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    modes = [mode for suite in SUITES.values() for mode in suite]
    add("--suite", choices=[*SUITES], help="what to measure (default: layers)")
    add("--mode", choices=modes, help="what of it (default: full, in train step)")
    add(
        "--cases",
        type=listed,
        metavar="C,...",
        help="layers: MxKxN, as 64x784x256, or sweep; train: WIDTHS@BATCH, as 784-256-10@64 "
        "(default: those published)",
    )
    add("--providers", type=listed, metavar="P,...", help="what to compare; --list has them")
    add(
        "--provider",
        type=_function,
        action="append",
        default=[],
        metavar="FILE.py:FUNCTION",
        help="your own, beside them; again for a second one",
    )
    add("--list", action="store_true", help="list suites, modes and providers; measure nothing")
    add("--activation", default="relu", metavar="NAME", help="in train the hidden one")
    add("--optimizer", metavar="NAME", help="of train (default: sgd)")
    add("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    add("--device", choices=DEVICES, default="cpu", help="(default: cpu)")
    add("--threads", type=count, metavar="N", help="of the CPU (default: as torch is set)")
    add("--rounds", type=count, default=20, metavar="R", help="samples of each (default: 20)")
    add("--peak", action="store_true", help="measure the machine's bounds; alone, only these")
    add("--csv", type=file, metavar="FILE", help="write the rows")
    add("--json", type=file, metavar="FILE", help="write the rows")
    add("--plot", type=file, metavar="FILE.png", help="draw the speeds")


def _function(text: str) -> tuple[Path, str]:
    path, _, function = text.rpartition(":")
    if not re.fullmatch(r".+\.py", path) or not function.isidentifier():
        raise argparse.ArgumentTypeError(f"must be FILE.py:FUNCTION, got '{text}'")
    return Path(path), function
