"""The arguments of `mlp-ext compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlp_ext_cli.arguments import add_command

DESCRIPTION = """\
Compare two result files of `mlp-ext bench --csv`, before and after a change.
"""
EPILOG = """\
Rows are matched by suite, case, mode, activation, optimizer, dtype, device,
threads and provider. The speedups over native are compared rather than the
times, since they change less with the state of the machine. The range of a
change goes from the 20% quantile after divided by the 80% quantile before, to
the 80% quantile after divided by the 20% quantile before. A row is faster if
its range is above 1, slower if it is below 1, and the same if it includes 1.

The exit status is 0, or 2 if there is nothing to compare. With
--fail-if-slower, it is 1 if any row is slower.

examples:
  mlp-ext bench --suite train --csv before.csv
  mlp-ext bench --suite train --csv after.csv
  mlp-ext compare before.csv after.csv
"""


def add_compare(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = add_command(
        commands,
        "compare",
        "mlp_ext.commands.compare:run",
        help="compare two result files of bench: faster, slower or the same",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("before", type=Path, metavar="before.csv", help="written by mlp-ext bench --csv")
    add("after", type=Path, metavar="after.csv", help="the same after the change")
    add("--fail-if-slower", action="store_true", help="exit with status 1 if any row is slower")
