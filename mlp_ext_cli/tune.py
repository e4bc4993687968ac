"""The arguments of `mlp-ext tune`."""

from __future__ import annotations

from typing import Any

from mlp_ext_cli.arguments import FLOATS, add_command, count, file, listed, number

DTYPES = tuple(name for name in FLOATS if name != "float64")  # float64 has float32's limits

DESCRIPTION = """\
Measure on this processor where one path of the CPU kernels becomes faster than
another, and write the limits that differ from the built-in ones.
"""
EPILOG = """\
On both sides of each limit the two paths run in turn on shapes near it. A limit
moves only if another value is faster by more than the noise. The picture has a
panel for each limit: above 1, the path below the limit is faster; whiskers are
the 20% and 80% quantiles; dashed is the current limit, solid the new one.

The file is used only where MLP_EXT_MACHINE names it when mlp_ext is imported.
Training never measures anything. Leave the machine idle while it measures.

examples:
  mlp-ext tune
  mlp-ext tune --minutes 20 --out laptop.json
  MLP_EXT_MACHINE=laptop.json mlp-ext bench --suite train
"""


def add_tune(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = add_command(
        commands,
        "tune",
        "mlp_ext.commands.tune:run",
        help="measure the limits between paths of the CPU kernels on this processor",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    minutes = number(float, lambda n: 0 < n < float("inf"), "a number above 0")
    add(
        "--minutes",
        type=minutes,
        default=10.0,
        metavar="N",
        help="minutes to measure (default: 10)",
    )
    add("--out", type=file, default="machine.json", metavar="FILE", help="(default: machine.json)")
    add("--plot", type=file, metavar="FILE.png", help="(default: as --out, ending in .png)")
    add("--threads", type=count, metavar="N", help="CPU threads (default: torch's)")
    add(
        "--dtype",
        type=listed,
        default=[*DTYPES],
        metavar="D,...",
        help=f"(default: {','.join(DTYPES)})",
    )
