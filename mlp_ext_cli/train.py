"""The arguments of `mlp-ext train`."""

from __future__ import annotations

from typing import Any

from mlp_ext_cli.arguments import DEVICES, FLOATS, add_command, count, file, number

LAYERS = ("native", "fused", "stack", "step")
WRAPPERS = ("ddp", "fsdp")

DESCRIPTION = """\
Train Linear, activation, ..., Linear, and a Sigmoid unless the loss takes
logits.
"""
EPILOG = """\
--layers all trains the same initial weights on the same batches with every kind
of layer in turn. ms per epoch: in the training steps alone; speed up: native's
time over this one's; both the median over the epochs. largest difference: of a
loss from native's.

--distributed trains in the processes of torchrun, which share each batch: the
losses are those of one process. The times are those of the first. fsdp has no
step, so that all leaves it out.

examples:
  mlp-ext train
  mlp-ext train --data digits --hidden 64 --lr 2 --epochs 20 --plot loss.png
  mlp-ext train --data mnist5k --optimizer adamw --activation gelu \\
      --loss cross_entropy --lr 0.001
  torchrun --nproc_per_node 2 -m mlp_ext train --distributed ddp --data digits \\
      --batch-size 64
"""


def add_train(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = add_command(
        commands,
        "train",
        "mlp_ext.commands.train:run",
        help="train a multi-layer perceptron",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    default = "(default: %(default)s)"
    named = f"{default}; mlp-ext info lists them"
    add("--layers", choices=[*LAYERS, "all"], default="native", help=default)
    add("--data", default="seed", metavar="NAME", help=f"the data set {named}")
    add("--hidden", type=_widths, default="5", metavar="N,...", help=f"hidden widths {default}")
    add("--activation", default="relu", metavar="NAME", help=f"between the layers {named}")
    add("--loss", default="mse", metavar="NAME", help=named)
    add("--optimizer", default="sgd", metavar="NAME", help=named)
    add("--epochs", type=count, default=50, metavar="N", help=f"passes over the data {default}")
    add("--lr", type=_rate, default=0.01, metavar="X", help=f"learning rate {default}")
    add("--batch-size", type=count, default=10, metavar="N", help=f"rows of one step {default}")
    add("--seed", type=_seed, default=0, metavar="N", help=f"of weights and shuffling {default}")
    add("--device", choices=DEVICES, default="cpu", help=default)
    add("--dtype", choices=FLOATS, default="float32", help=f"of weights and data {default}")
    add("--distributed", choices=WRAPPERS, help="share each batch, under torchrun")
    add("--plot", type=file, metavar="FILE.png", help="draw the losses")
    add("--json", type=file, metavar="FILE", help="write settings, versions and results")


_seed = number(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 4294967295")
_rate = number(float, lambda x: 0 < x < float("inf"), "a positive number")


def _widths(text: str) -> list[int]:
    return [count(width) for width in text.split(",")]
