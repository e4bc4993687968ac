"""The arguments of `mlp-ext bench`."""

from __future__ import annotations

from typing import Any

from mlp_ext_cli.arguments import DEVICES, FLOATS, add_command, code, count, counts, file, listed

SUITES = {  # their modes
    "layers": ("full", "forward", "backward"),
    "train": ("step",),
    "many": ("step",),
}
SKLEARN = "sklearn"  # has options of its own: see mlp_ext/commands/bench_sklearn.py
DTYPES = (*FLOATS, "tf32")

DESCRIPTION = """\
Measure layers, training steps, and steps of many networks at once, against
native torch and its peers.
"""
EPILOG = """\
The results of each provider are first checked against native's. Then, in each
round, the providers take turns on the same inputs. time: the median time of a
call. speed: native's time divided by the provider's in the same round, the
median over the rounds, and its 20% and 80% quantiles; above 1 is faster. of
bound, with --peak: the shortest time that the machine's arithmetic, memory or
latency allows, divided by the time. path: of our kernels; see `mlp-ext plan`.

full is forward and backward, including the input's gradient; forward computes
no gradients; backward is backward alone; step is forward, MSELoss, zero_grad,
backward and update. In the suite many, times are per network and step.

The suite sklearn times fits of scikit-learn's MLPClassifier, native, and of
mlp_ext.sklearn's, per epoch, and prints the accuracy of each.

Your own provider is a function. In the suite layers, it takes a setting and
returns function(input, weight, bias); in train, it takes model, criterion and
optimizer and returns step(input, target), which updates the model and returns
the loss; in many, it takes models, criterion and optimizers, and its step
returns the losses:

  def mine(setting):
      return lambda x, w, b: torch.addmm(b, x, w.t()).relu_()

examples:
  mlp-ext bench --list
  mlp-ext bench --cases 64x784x256,4096x64x64 --providers native,compile,fused
  mlp-ext bench --cases 64x784x256 --provider own.py:mine
  mlp-ext bench --suite train --cases 784-256-10@64 --threads 1 --csv rows.csv
  mlp-ext bench --suite train --optimizer adam --plot speed.png
  mlp-ext bench --suite many --cases 1000x10-5-1@10 --peak
  mlp-ext bench --suite sklearn --cases digits,search --csv rows.csv
  mlp-ext bench --peak
"""


def add_bench(commands: Any) -> None:
    """Adds the command to the subparsers of `mlp-ext`."""
    parser = add_command(
        commands,
        "bench",
        "mlp_ext.commands.bench:run",
        help="measure layers and training steps against native torch and its peers",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    modes = [*dict.fromkeys(mode for suite in SUITES.values() for mode in suite)]
    add("--suite", choices=[*SUITES, SKLEARN], help="what to measure (default: layers)")
    add("--mode", choices=modes, help="pass to measure (default: full, or step)")
    add(
        "--cases",
        type=listed,
        metavar="C,...",
        help="layers: MxKxN, e.g. 64x784x256, or sweep; train: WIDTHS@BATCH, e.g. 784-256-10@64; "
        "many: NETWORKSxWIDTHS@BATCH, e.g. 1000x10-5-1@10 (default: the published cases)",
    )
    add("--providers", type=listed, metavar="P,...", help="what to compare; see --list")
    add(
        "--provider",
        type=code,
        action="append",
        default=[],
        metavar="FILE.py:FUNCTION",
        help="your own provider, also module:function; repeatable",
    )
    add("--list", action="store_true", help="list suites, modes and providers; measure nothing")
    add(
        "--activation",
        default="relu",
        metavar="NAME",
        help="of the layer, or of hidden layers (default: relu)",
    )
    add("--optimizer", metavar="NAME", help="for train and many (default: sgd)")
    add("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    add("--device", choices=DEVICES, default="cpu", help="(default: cpu)")
    add(
        "--threads",
        type=counts,
        metavar="N,...",
        help="CPU threads (default: torch's); 1,2 measures 2 and, in turn, 1, e.g. as step@1",
    )
    add("--beside-load", action="store_true", help="keep one core busy meanwhile")
    add("--rounds", type=count, default=20, metavar="R", help="samples per provider (default: 20)")
    add(
        "--peak",
        action="store_true",
        help="measure the machine's limits; with no other option, only these",
    )
    add("--csv", type=file, metavar="FILE", help="write the results as CSV")
    add("--json", type=file, metavar="FILE", help="write the results as JSON")
    add("--plot", type=file, metavar="FILE.png", help="plot the speeds")
