"""The arguments of `mlp-ext train`."""

from __future__ import annotations

from argparse import SUPPRESS
from typing import Any

from mlp_ext_cli.arguments import (
    add_command,
    add_shared,
    count,
    decay,
    file,
    number,
    rate,
    seed,
)

LAYERS = ("native", "fused", "stack", "step", "fit")
WRAPPERS = ("ddp", "fsdp")

DESCRIPTION = """\
Train a multi-layer perceptron with torch.nn and with mlp_ext, side by side.

The network is Linear, activation, ..., Linear, and a Sigmoid unless the loss
takes logits or the target is a number. Every kind starts from the same weights
and trains on the same batches. The kinds are
  native  torch.nn and the usual training loop
  fused   fuse(model): each Linear and its activation are one operator
  stack   fuse(model, level="stack"): all layers are one operator
  step    TrainStep: forward, loss, backward and update in one call
  fit     TrainStep.fit: whole epochs in one call
"""
EPILOG = """\
time per epoch: the median time to shuffle the rows, split them into batches and
run all steps. The kinds take turns; short epochs are timed in groups, so that
caches are warm. speed: native's time divided by this kind's, the median over
the epochs, and its 20% and 80% quantiles; above 1 is faster. max loss diff: the
largest difference from native's loss in any epoch; up to 0.01% counts as the
same. test acc, test loss: on the 20% of the rows held out for testing.

--validation: after each epoch, the loss on rows held out from training; its
time counts. val loss, val acc: those of the best epoch, whose weights are kept.

--data FILE.csv: its first line names the columns; all except the target must be
numbers. A target of text, or of whole numbers with at most 20 distinct values,
is a class; any other is a number, and so is every target with --regression.
Numbers take the losses mse, l1, smooth_l1 and huber. Features and numeric
targets are standardized with the mean and standard deviation of the training
rows.

--save: the state_dict of an nn.Sequential; native's if several kinds train. The
scaling is folded into the weights, so the model takes and predicts values in
the units of the data set. 16-bit weights are saved as float32.

--distributed: the processes started by torchrun share each batch. The losses
match those of a single process; the times are those of the first process. ddp
has no fit, and fsdp has neither step nor fit.

examples:
  mlp-ext train
  mlp-ext train --data digits --hidden 64 --lr 2 --epochs 20 --plot loss.png
  mlp-ext train --data mnist5k --optimizer adamw --activation gelu \\
      --loss cross_entropy --lr 0.001
  mlp-ext train --data digits --validation 0.2 --patience 10 --epochs 500 \\
      --optimizer adam
  mlp-ext train --data own.csv --target price --hidden 32,16 --save model.pt
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
        help=f"{', '.join(LAYERS)} or all (default: all)",
    )
    add(
        "--hidden",
        type=_widths,
        default="5",
        metavar="N,...",
        help="widths of the hidden layers (default: 5)",
    )
    add_shared(add, activation="relu")
    add("--loss", default="mse", metavar="NAME", help="(default: mse)")
    add_shared(add, optimizer="sgd")
    add("--lr", type=rate, default=0.01, metavar="X", help="learning rate (default: 0.01)")
    add("--weight-decay", type=decay, metavar="X", help="(default: the optimizer's)")
    add_shared(add, epochs=50)
    add(
        "--validation",
        type=_fraction,
        metavar="X",
        help="part of the training rows to validate on, such as 0.2",
    )
    add(
        "--patience",
        type=count,
        metavar="N",
        help="stop after N epochs without a lower validation loss",
    )
    add("--batch-size", type=count, default=10, metavar="N", help="rows per step (default: 10)")
    add("--seed", type=seed, default=0, metavar="N", help="random seed (default: 0)")
    add_shared(add, dtype="float32", device="cpu")
    add(
        "--distributed",
        choices=WRAPPERS,
        help="share each batch among the processes of torchrun",
    )

    add = parser.add_argument_group("data").add_argument
    add_shared(add, data="tutorial", target=None, regression=False)
    add("--csv", dest="data", default=SUPPRESS, help=SUPPRESS)  # until version 0.3, for a file

    add = parser.add_argument_group("output").add_argument
    add(
        "--log-every",
        type=count,
        metavar="N",
        help="print the losses every N epochs (default: about ten lines)",
    )
    add("--quiet", action="store_true", help="print only the final table and sentence")
    add("--plot", type=file, metavar="FILE.png", help="plot the losses over epochs and time")
    add("--save", type=file, metavar="FILE.pt", help="write the trained weights")
    add("--json", type=file, metavar="FILE", help="write the settings, versions and results")


_fraction = number(float, lambda x: 0 < x < 1, "a number between 0 and 1")


def _widths(text: str) -> list[int]:
    return [count(width) for width in text.split(",")]
