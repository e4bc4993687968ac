"""The arguments of `mlp-ext profile`."""

from __future__ import annotations

import argparse
import re
from typing import Any

from mlp_ext_cli.arguments import DEVICES, add_command, count, file

DESCRIPTION = """\
What fuse finds in your model, how far its results are from native's, and the
times of native, fused, stack and, with --train, step. In each round they run in
turn.
"""
EXAMPLES = """\
examples:
  mlp-ext profile my_package.models:make_model --input 64x784
  mlp-ext profile my_package.models:make_model --input 64x784 --train
"""


def add_profile(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = add_command(
        commands,
        "profile",
        "mlp_ext.commands.profile:run",
        help="what fuse finds in your model, and what it gains",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "factory",
        type=_factory,
        metavar="package.module:factory",
        help="a function or class that makes the model when called without arguments",
    )
    add(
        "--input",
        type=_sizes,
        action="append",
        required=True,
        metavar="64x784",
        help="sizes of a random float32 input; again for a second one",
    )
    add("--train", action="store_true", help="measure training steps (default: forward)")
    add("--device", choices=DEVICES, default="cpu", help="(default: cpu)")
    add("--rounds", type=count, default=20, metavar="R", help="samples of each (default: 20)")
    add("--json", type=file, metavar="FILE", help="write the results")


def _factory(text: str) -> tuple[str, str]:
    name = r"[^\W\d]\w*"
    if not re.fullmatch(rf"{name}(\.{name})*:{name}(\.{name})*", text):
        raise argparse.ArgumentTypeError(f"must be package.module:factory, got '{text}'")
    module, _, factory = text.partition(":")
    return module, factory


def _sizes(text: str) -> list[int]:
    if not re.fullmatch("[1-9][0-9]{0,9}(x[1-9][0-9]{0,9})*", text):
        raise argparse.ArgumentTypeError(f"must be sizes such as 64x784, got '{text}'")
    return [int(size) for size in text.split("x")]
