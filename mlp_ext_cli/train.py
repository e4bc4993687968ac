"""The arguments of `mlp-ext train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlp_ext_cli.arguments import DEVICES, FLOATS, add_command, count, file, number

LAYERS = ("native", "fused", "stack", "step")
WRAPPERS = ("ddp", "fsdp")

DESCRIPTION = """\
Train a multi-layer perceptron with torch.nn and with mlp_ext, side by side.

The network is Linear, activation, ..., Linear, and a Sigmoid unless the loss
takes logits or the target is a number. Every kind of layer starts from the
same weights and trains on the same batches. The kinds are
  native  torch.nn and the usual training loop
  fused   fuse(model): each Linear and its activation are one operator
  stack   fuse(model, level="stack"): all layers are one operator
  step    TrainStep: forward, loss, backward and update in one call
"""
EPILOG = """\
The table: the median time of an epoch's training steps; how many times as fast
as native, the median over the epochs; the largest difference of an epoch's loss
from native's. Losses that differ by less than 0.01 % are called the same. With
accuracy, the test rows are 20 % that are not trained on.

--csv: the first line has the names of the columns, and all but the target are
numbers. The target may be text or whole numbers of at most 20 values: these are
classes. Other numbers are learnt as such, with the losses mse, l1, smooth_l1
and huber. Features and numeric targets are standardised by the training rows.

--save: the state_dict of the network as an nn.Sequential, of native if several
kinds are trained. The scaling is part of its weights: it takes features, and
predicts numbers, as they are in the data set. 16-bit weights become float32.

--distributed: the processes of torchrun share each batch. The losses are those
of one process, the times those of the first. fsdp has no step.

examples:
  mlp-ext train
  mlp-ext train --data digits --hidden 64 --lr 2 --epochs 20 --plot loss.png
  mlp-ext train --data mnist5k --optimizer adamw --activation gelu \\
      --loss cross_entropy --lr 0.001
  mlp-ext train --csv own.csv --target price --hidden 32,16 --save model.pt
  torchrun --nproc_per_node 2 -m mlp_ext train --distributed ddp --data digits \\
      --batch-size 64
"""


def add_train(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = add_command(
        commands,
        "train",
        "mlp_ext.commands.train:run",
        help="train a network with torch.nn and with mlp_ext, side by side",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    network = parser.add_argument_group("network and training (mlp-ext info lists the names)")
    add = network.add_argument
    add(
        "--layers",
        choices=[*LAYERS, "all"],
        default="all",
        metavar="KIND",
        help=f"{', '.join(LAYERS)}, or all in turn (default: all)",
    )
    add("--hidden", type=_widths, default="5", metavar="N,...", help="hidden widths (default: 5)")
    add("--activation", default="relu", metavar="NAME", help="between the layers (default: relu)")
    add("--loss", default="mse", metavar="NAME", help="(default: mse)")
    add("--optimizer", default="sgd", metavar="NAME", help="(default: sgd)")
    add("--lr", type=_rate, default=0.01, metavar="X", help="learning rate (default: 0.01)")
    add("--epochs", type=count, default=50, metavar="N", help="passes over the rows (default: 50)")
    add("--batch-size", type=count, default=10, metavar="N", help="rows of a step (default: 10)")
    add("--seed", type=_seed, default=0, metavar="N", help="of weights and order (default: 0)")
    add(
        "--dtype",
        choices=FLOATS,
        default="float32",
        metavar="TYPE",
        help=f"{', '.join(FLOATS)} (default: float32)",
    )
    add("--device", choices=DEVICES, default="cpu", help="(default: cpu)")
    add("--distributed", choices=WRAPPERS, help="share each batch, under torchrun")

    rows = parser.add_argument_group("data")
    source = rows.add_mutually_exclusive_group()
    source.add_argument(
        "--data", metavar="NAME", help="a data set of mlp-ext info (default: tutorial)"
    )
    source.add_argument("--csv", type=Path, metavar="FILE", help="your own data, with --target")
    rows.add_argument("--target", metavar="COLUMN", help="the column of --csv to predict")

    add = parser.add_argument_group("output").add_argument
    add(
        "--log-every",
        type=count,
        metavar="N",
        help="print the losses of every N-th epoch (default: about ten lines in all)",
    )
    add("--quiet", action="store_true", help="print only the table and the last sentence")
    add("--plot", type=file, metavar="FILE.png", help="draw the losses over epochs and time")
    add("--save", type=file, metavar="FILE.pt", help="write the trained weights")
    add("--json", type=file, metavar="FILE", help="write settings, versions and results")


_seed = number(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 4294967295")
_rate = number(float, lambda x: 0 < x < float("inf"), "a positive number")


def _widths(text: str) -> list[int]:
    return [count(width) for width in text.split(",")]
