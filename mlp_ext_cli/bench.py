"""The arguments of `mlp-ext bench`."""

from __future__ import annotations

from typing import Any

from mlp_ext_cli.arguments import DEVICES, FLOATS, add_command, count, file, listed

SUITES = {"layers": ("full", "forward", "backward"), "train": ("step",)}  # their modes
DTYPES = (*FLOATS, "tf32")

DESCRIPTION = """\
Measure layers and training steps against native torch and its peers.
"""
EPILOG = """\
In each round the providers run in turn on the same inputs. A row has the median
time of a call with its 20 % and 80 % quantiles, and the median over the rounds
of native's time over this one's: above 1 is faster. full is forward and
backward with the gradient of the input, forward requires no gradient, backward
is backward alone; step is forward, MSELoss, zero_grad, backward and the update.

examples:
  mlp-ext bench --cases 64x784x256,4096x64x64 --providers native,compile,fused
  mlp-ext bench --suite train --cases 784-256-10@64 --threads 1 --csv rows.csv
  mlp-ext bench --suite train --optimizer adam --plot bars.png
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
    add("--providers", type=listed, metavar="P,...", help="mlp-ext info lists them")
    add("--activation", default="relu", metavar="NAME", help="in train the hidden one")
    add("--optimizer", metavar="NAME", help="of train (default: sgd)")
    add("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    add("--device", choices=DEVICES, default="cpu", help="(default: cpu)")
    add("--threads", type=count, metavar="N", help="of the CPU (default: as torch is set)")
    add("--rounds", type=count, default=20, metavar="R", help="samples of each (default: 20)")
    add("--peak", action="store_true", help="measure the device's limits; alone, only these")
    add("--csv", type=file, metavar="FILE", help="write the rows")
    add("--json", type=file, metavar="FILE", help="write the rows")
    add("--plot", type=file, metavar="FILE.png", help="draw the ratios to native")
