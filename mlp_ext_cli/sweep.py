"""The arguments of `mlp-ext sweep`."""

from __future__ import annotations

from argparse import SUPPRESS
from typing import Any

from mlp_ext_cli.arguments import (
    add_command,
    add_shared,
    count,
    decay,
    each,
    file,
    number,
    rate,
    seed,
)

DESCRIPTION = """\
Train every combination of learning rates, hidden layers, weight decays and
batch sizes, with several seeds and folds, and compare them on held-out rows.

Networks of the same widths and batch size train together (mlp_ext.TrainSteps),
each with the numbers that it would have alone.
"""
EPILOG = """\
--hidden 64,32-16 is two networks: one hidden layer of 64, and two of 32 and 16.

--folds 5: five-fold cross-validation on the 80% of the rows that mlp-ext train
trains on; the other 20% take no part, so that train can test the winner on
them. Without --folds, networks train on the 80% and are compared on the 20%.
Classes have nearly the same shares in all folds. Seeds draw the initial weights
and the batches; the first one, --seed, also draws the rows and the folds.

The table has means over seeds and folds, and the standard deviation (std) of
the column before it. held-out acc, held-out loss: on the rows that a network
did not train on, after the last epoch. train loss: in the last epoch. The best
setting has the highest accuracy, or the lowest loss where the targets are not
classes.

--plot: the accuracy (or loss) over epochs, a curve for each value, if only one
option has several values; else a heat map, whose rows are those of the first
such option.

Under torchrun, each process trains its share of the networks. The table is that
of a single process.

examples:
  mlp-ext sweep
  mlp-ext sweep --data digits --lr 0.01,0.03,0.1,0.3 --hidden 64,32-16 \\
      --seeds 8 --epochs 20 --folds 5 --plot sweep.png
  mlp-ext sweep --data own.csv --target price --optimizer adamw \\
      --lr 0.001,0.003,0.01 --weight-decay 0,0.01,0.1 --results networks.csv
  torchrun --nproc_per_node 2 -m mlp_ext sweep --seeds 50
"""


def add_sweep(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = add_command(
        commands,
        "sweep",
        "mlp_ext.commands.sweep:run",
        help="train many networks at once: settings, seeds and folds",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument_group("settings (every combination is trained)").add_argument
    add(
        "--lr",
        type=each(rate),
        default="0.01,0.03,0.1,0.3",
        metavar="X,...",
        help="learning rates (default: 0.01,0.03,0.1,0.3)",
    )
    add(
        "--hidden",
        type=each(_widths),
        default="32",
        metavar="N-N,...",
        help="hidden layers: widths joined by - (default: 32)",
    )
    add(
        "--weight-decay",
        type=each(decay),
        default=[None],
        metavar="X,...",
        help="(default: the optimizer's)",
    )
    add(
        "--batch-size",
        type=each(count),
        default="32",
        metavar="N,...",
        help="rows per step (default: 32)",
    )
    add("--seeds", type=count, default=5, metavar="N", help="seeds per setting (default: 5)")
    add("--folds", type=_folds, metavar="N", help="folds of a cross-validation")

    add = parser.add_argument_group(
        "network and training (mlp-ext info lists the names)"
    ).add_argument
    add_shared(add, activation="relu", optimizer="sgd")
    add(
        "--loss",
        metavar="NAME",
        help="(default: cross_entropy; bce_with_logits for two classes; mse for numbers)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="the first seed (default: 0)")
    add_shared(add, epochs=20, dtype="float32", device="cpu")

    add = parser.add_argument_group("data").add_argument
    add_shared(add, data="digits", target=None, regression=False)

    add = parser.add_argument_group("output").add_argument
    add("--quiet", action="store_true", help="print only the table and what follows it")
    add("--plot", type=file, metavar="FILE.png", help="plot the curves or the heat map")
    add(
        "--results",
        type=file,
        metavar="FILE.csv",
        help="write a line for each network",
    )
    add("--csv", type=file, dest="results", default=SUPPRESS, help=SUPPRESS)  # its first name


_folds = number(int, lambda n: 2 <= n < 2**31, "a whole number from 2 to 2147483647")


def _widths(text: str) -> tuple[int, ...]:
    return tuple(count(width) for width in text.split("-"))
