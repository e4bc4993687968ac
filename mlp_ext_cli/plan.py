"""The arguments of `mlp-ext plan`."""

from __future__ import annotations

from typing import Any

from mlp_ext_cli.arguments import DEVICES, add_command, count
from mlp_ext_cli.bench import DTYPES

DESCRIPTION = """\
Show which kernel path a layer or a training step takes, how its work is split
among threads, and the nearest sizes at which the path changes.
"""
EPILOG = """\
A case is a layer, MxKxN: M rows, K input features, N outputs; or the training
step of a network, WIDTHS@BATCH. The ranges are found by changing one size at a
time. Nothing is computed, and no GPU is needed for --arch. More about the
paths: docs/design-cpu.md and docs/design-cuda.md.

examples:
  mlp-ext plan 64x784x256
  mlp-ext plan 64x784x256 --dtype bfloat16 --threads 1
  mlp-ext plan 784-256-10@64
  mlp-ext plan 4096x64x64 --device cuda --arch 90 --activation gelu
"""


def add_plan(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = add_command(
        commands,
        "plan",
        "mlp_ext.commands.plan:run",
        help="show which kernel path a layer or a training step takes, and why",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("case", help="MxKxN, e.g. 64x784x256, or WIDTHS@BATCH, e.g. 784-256-10@64")
    add("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    add("--activation", default="relu", metavar="NAME", help="of a layer, for GPUs (default: relu)")
    add("--device", choices=DEVICES, default="cpu", help="(default: cpu)")
    add("--threads", type=count, metavar="N", help="CPU threads (default: torch's)")
    add("--machine", metavar="NAME", help="another processor's limits, e.g. zen4 (default: yours)")
    add(
        "--arch",
        type=count,
        metavar="90",
        help="compute capability (default: of your GPU)",
    )
