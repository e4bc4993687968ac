"""The command `mlp-ext`: build information, training on real data, benchmarks, profiles."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mlp_ext.commands import arguments
from mlp_ext.commands.bench import add_bench
from mlp_ext.commands.info import add_info
from mlp_ext.commands.profile import add_profile
from mlp_ext.commands.train import add_train


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own); returns the exit status.

    0: success; 2: a user's error, explained in one line on stderr; 130: Ctrl-C; 141: broken pipe.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        args.command(args)
        print(end="", flush=True)
    except SystemExit as stop:  # argparse: --help, or an error
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # from stdout: closed pipe or full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> arguments.Parser:
    parser = arguments.Parser(prog="mlp-ext", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_info, add_train, add_bench, add_profile):
        add(commands)
    return parser
