"""The arguments of `mlp-ext info`."""

from __future__ import annotations

from typing import Any

from mlp_ext_cli.arguments import add_command

EXAMPLES = """\
examples:
  mlp-ext info
  mlp-ext info --json
"""


def add_info(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = add_command(
        commands,
        "info",
        "mlp_ext.commands.info:run",
        help="show the build, and the names that train and sweep take",
        description="Show how this package was built, what it uses on this machine, and the names\n"
        "that the options of mlp-ext train and sweep take.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
