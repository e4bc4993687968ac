"""The command `mlp-ext`: its arguments, parsed without torch, which takes seconds to import.

A file for each command has its arguments and its help. What it does is a function `run` of
mlp_ext.commands, which is imported when it is called.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from mlp_ext_cli.arguments import Help, Parser
from mlp_ext_cli.bench import add_bench
from mlp_ext_cli.compare import add_compare
from mlp_ext_cli.info import add_info
from mlp_ext_cli.plan import add_plan
from mlp_ext_cli.profile import add_profile
from mlp_ext_cli.sweep import add_sweep
from mlp_ext_cli.train import add_train
from mlp_ext_cli.tune import add_tune

COMMANDS = (
    add_info,
    add_train,
    add_sweep,
    add_bench,
    add_compare,
    add_plan,
    add_tune,
    add_profile,
)

DESCRIPTION = "Train multi-layer perceptrons in PyTorch faster: try it and measure it."

EPILOG = """\
examples:
  mlp-ext info
  mlp-ext train --data digits --hidden 64 --lr 2 --epochs 20
  mlp-ext sweep --data digits --hidden 64,32-16 --seeds 8
  mlp-ext bench --suite train
  mlp-ext train --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own); returns the exit status.

    0: success; 1: wrong results, or a broken installation; 2: a user's error; 130: Ctrl-C; 141:
    broken pipe. All but the last are explained in one line on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        if "run" in args:
            _run(args)
        else:
            parser.print_help()
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


def _run(args: argparse.Namespace) -> None:
    module, _, function = args.run.partition(":")
    try:
        run = getattr(import_module(module), function)
    except (ImportError, OSError) as error:  # OSError: a library of torch does not load
        what = " ".join(str(error).split())
        args.exit(1, f"{args.prog}: error: {what}\n")
    run(args)


class Version(argparse.Action):
    """--version: prints the installed versions, which are looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("mlp_ext")
        except PackageNotFoundError:
            parser.exit(
                1, f"{parser.prog}: error: mlp_ext is not installed, only on Python's path\n"
            )
        print(parser.prog, found)
        parser.exit()


def _parser() -> Parser:
    parser = Parser(
        prog="mlp-ext",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for add in COMMANDS:
        add(commands)
    return parser
