"""The arguments of `mlp-ext compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlp_ext_cli.arguments import add_command

DESCRIPTION = """\
Compare two files of `mlp-ext bench --csv`, of before and after a change.
"""
EPILOG = """\
Rows are matched by suite, case, mode, activation, optimizer, dtype, device,
threads and provider. Compared are the ratios to native, because native's time
in the same rounds tells what the machine did. A row is faster if its whole
range is above 1 and slower if it is below: from the 20 % quantile after over
the 80 % quantile before to the 80 % quantile after over the 20 % quantile
before.

The exit status is 0 whatever the verdicts, and 2 if there is nothing to
compare. With --fail-if-slower it is 1 if a row is slower.

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
        help="compare two files of bench: faster, slower or the same",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("before", type=Path, metavar="before.csv", help="written by mlp-ext bench --csv")
    add("after", type=Path, metavar="after.csv", help="the same after the change")
    add("--fail-if-slower", action="store_true", help="exit with status 1 if a row is slower")
