"""The arguments of `mlp-ext profile`."""

from __future__ import annotations

import argparse
import re
from typing import Any

from mlp_ext_cli.arguments import DEVICES, add_command, code, count, file

DESCRIPTION = """\
Show which layers of your model fuse finds, how much the results differ from
native's, and the times of native, fused, stack and, with --train, step. They
take turns in each round.
"""
EXAMPLES = """\
examples:
  mlp-ext profile my_models.py:make_model --input 64x784
  mlp-ext profile my_package.models:make_model --input 64x784 --train
"""


def add_profile(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = add_command(
        commands,
        "profile",
        "mlp_ext.commands.profile:run",
        help="show what fuse finds in your model, and how much faster it gets",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "model",
        type=code,
        metavar="MODULE:NAME",
        help="a function or class, called without arguments, or a model, in a module or FILE.py",
    )
    add(
        "--input",
        type=_sizes,
        action="append",
        required=True,
        metavar="64x784",
        help="shape of a random float32 input; repeatable",
    )
    add("--train", action="store_true", help="measure training steps (default: forward passes)")
    add("--device", choices=DEVICES, default="cpu", help="(default: cpu)")
    add("--rounds", type=count, default=20, metavar="R", help="samples per variant (default: 20)")
    add("--json", type=file, metavar="FILE", help="write the results as JSON")


def _sizes(text: str) -> list[int]:
    if not re.fullmatch("[1-9][0-9]{0,9}(x[1-9][0-9]{0,9})*", text):
        raise argparse.ArgumentTypeError(f"must be a shape, e.g. 64x784, got '{text}'")
    return [int(size) for size in text.split("x")]
