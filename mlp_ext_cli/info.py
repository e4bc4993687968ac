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
        help="what was built, and the names that options take",
        description="How this package was built, what it uses on this machine, and the names of\n"
        "activations, losses, optimizers and data sets that the other commands take.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
