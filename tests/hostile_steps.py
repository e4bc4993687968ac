"""Hostile calls of TrainStep: data, criteria, optimizers, models, settings."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hostile import Change, Row, Table, classes, net, step, x, y
from hostile_layers import NAN, negated, nested, parameter, put
from torch import nn
from torch.nn.utils import parametrizations

ROWS: Table = {}
LOOP = "use the eager loop, with mlp_ext.fuse(model)"


def add(name: str, call: Any, error: type[Exception] | None = None, message: str = "") -> None:
    assert name not in ROWS
    ROWS[name] = Row(call, error, f"TrainStep: {message}" if error else "")


# --- Data ---

COMPUTED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "flipped": lambda: (x().flip(0, 1), y().flip(1)),
    "expanded": lambda: (x()[:1].expand(6, 4), y()[:1].expand(6, 3)),
    "overlapping": lambda: (x().as_strided((5, 4), (1, 1)), y()[:5]),
    "no rows": lambda: (x()[:0], y()[:0]),
    "one dimension": lambda: (x()[0], y()[0]),
    "three dimensions": lambda: (x().view(2, 3, 4), y().view(2, 3, 3)),
    "negated": lambda: (negated(x()), negated(y())),
    "NaN": lambda: (x() * NAN, y()),
    "infinite target": lambda: (x(), y() * float("inf")),
    "float64 target": lambda: (x(), y().double()),
}
for name, data in COMPUTED.items():
    add(name, step(data=data))

DENSE = "must be dense, got "
REFUSED: dict[str, tuple[Callable[[], tuple[Any, Any]], type[Exception], str]] = {
    "list": (
        lambda: (x().tolist(), y()),
        TypeError,
        "input must be a tensor, got list; pass torch.",
    ),
    "None": (lambda: (x(), None), TypeError, "target must be a tensor, got None"),
    "text": (lambda: ("x", y()), TypeError, "input must be a tensor, got 'x'"),
    "array": (
        lambda: (x(), y().numpy()),
        TypeError,
        "target must be a tensor, got numpy.ndarray; pass",
    ),
    "no dimension": (lambda: (x()[0, 0], y()[0]), RuntimeError, "input must be [*, K=4], got []"),
    "target of a row": (
        lambda: (x(), y()[0]),
        RuntimeError,
        "target must be [M=6, N=3] as the output, ",
    ),
    "target of a column": (
        lambda: (x(), y()[:, :1]),
        RuntimeError,
        "target must be [M=6, N=3] as the ",
    ),
    "target of classes": (
        lambda: (x(), classes()),
        RuntimeError,
        "target must be [M=6, N=3] as the out",
    ),
    "bool target": (
        lambda: (x(), y() > 0.5),
        RuntimeError,
        "target is bool, the model float32; pass ta",
    ),
    "complex": (
        lambda: (x().cfloat(), y()),
        RuntimeError,
        "input is complex64, the model float32; pass",
    ),
    "quantized": (
        lambda: (torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8), y()),
        RuntimeError,
        "input is qint8, the model float32; pass input.float()",
    ),
    "meta": (
        lambda: (x().to("meta"), y()),
        RuntimeError,
        "input is on meta, the model on cpu; pass in",
    ),
    "meta target": (
        lambda: (x(), y().to("meta")),
        RuntimeError,
        "target is on meta, the model on cpu; ",
    ),
    "sparse": (
        lambda: (x().to_sparse(), y()),
        RuntimeError,
        f"input {DENSE}Sparse; call its to_dense()",
    ),
    "sparse target": (
        lambda: (x(), y().to_sparse()),
        RuntimeError,
        f"target {DENSE}Sparse; call its to",
    ),
    "nested": (
        lambda: (nested(x()), y()),
        RuntimeError,
        f"input {DENSE}a nested tensor; pad it by",
    ),
    "requires a gradient": (
        lambda: (x().requires_grad_(), y()),
        ValueError,
        "input requires a gradient, which a step does not compute; detach it, or use the eager",
    ),
}
for name, (data, error, message) in REFUSED.items():
    add(name, step(data=data), error, message)


def with_own(make: Callable[[Any], tuple[Any, Any]]) -> Any:
    """A step on data that are the model's or the optimizer's."""
    return step(call=lambda p: p.step(*make(p)))


SHARED = "must not share memory with "
add(
    "input is the weight",
    with_own(lambda p: (p.model[0].weight.detach(), y()[:5])),
    RuntimeError,
    f"input {SHARED}a parameter that learns; pass a clone()",
)
add(
    "target is the weight",
    with_own(lambda p: (x()[:3], p.model[2].weight.detach()[:, :3])),
    RuntimeError,
    f"target {SHARED}a parameter that learns; pass a clone()",
)
add(
    "input is a momentum buffer",
    with_own(lambda p: (p.optimizer.state[p.model[0].weight]["momentum_buffer"], y()[:5])),
    RuntimeError,
    f"input {SHARED}an optimizer state; pass a clone()",
)
add("no target", step(call=lambda p: p.step(x())), TypeError)
ROWS["no target"] = ROWS["no target"]._replace(message="TrainStep.__call__() missing 1 required")

# --- Criteria ---

CE = nn.CrossEntropyLoss


def of_classes(*values: int, **options: Any) -> Any:
    return step(data=lambda: (x(), classes(*values)), criterion=lambda: CE(**options), first=False)


for name, values in {"ignored classes": [-100] * 6, "classes": [0, 1, 2, 2, 1, 0]}.items():
    add(name, of_classes(*values))
for name, options in {
    "negative weights": {"weight": torch.tensor([-1.0, 1.0, -1.0])},
    "weights of 0": {"weight": torch.zeros(3)},
    "NaN weights": {"weight": torch.full((3,), NAN)},
    "flipped weights": {"weight": torch.arange(3.0).flip(0)},
    "smoothing of True": {"label_smoothing": True},
}.items():
    add(name, of_classes(**options))  # type: ignore[arg-type]
WEIGHT = "the criterion's weight "
for name, options, error, message in (
    (
        "two weights",
        {"weight": torch.ones(2)},
        RuntimeError,
        f"{WEIGHT}must be [N=3], one for each",
    ),
    (
        "float64 weights",
        {"weight": torch.ones(3).double()},
        RuntimeError,
        f"{WEIGHT}must be float32 to",
    ),
    (
        "meta weights",
        {"weight": torch.ones(3, device="meta")},
        RuntimeError,
        f"{WEIGHT}must be on cpu",
    ),
    (
        "sparse weights",
        {"weight": torch.ones(3).to_sparse()},
        RuntimeError,
        f"{WEIGHT}must be dense",
    ),
    (
        "weights that learn",
        {"weight": torch.ones(3, requires_grad=True)},
        ValueError,
        f"{WEIGHT}requires a gradient, which a step does not compute; detach it, or use the eager",
    ),
    (
        "index of 0.5",
        {"ignore_index": 0.5},
        TypeError,
        "criterion has the ignore_index 0.5; make it an",
    ),
    (
        "NaN index",
        {"ignore_index": NAN},
        TypeError,
        "criterion has the ignore_index nan; make it an int",
    ),
    (
        "index of True",
        {"ignore_index": True},
        TypeError,
        "criterion has the ignore_index True; make it",
    ),
    (
        "huge index",
        {"ignore_index": 2**62 + 1},
        TypeError,
        "criterion has the ignore_index 46116860184",
    ),
    (
        "smoothing of a tensor",
        {"label_smoothing": torch.tensor(0.8675309)},
        TypeError,
        "criterion has the label_smoothing torch.Tensor; make it a number",
    ),
    (
        "smoothing of 2",
        {"label_smoothing": 2.0},
        ValueError,
        "label_smoothing must be from 0 to 1, got 2",
    ),
    (
        "list as reduction",
        {"reduction": ["mean"]},
        ValueError,
        "criterion has the reduction list; use",
    ),
):
    add(name, of_classes(**options), error, message)  # type: ignore[arg-type]
for name, values in {
    "class of 3": [3] * 6,
    "class of -1": [-1] * 6,
    "huge class": [2**62] * 6,
}.items():
    range_of = f"target must be classes from 0 to 2 or ignore_index -100, got {values[0]}"
    add(name, of_classes(*values), IndexError, range_of)


def criterion(make: Callable[[], Any], change: Change | None = None) -> Any:
    return step(change, criterion=make, first=change is not None)


add(
    "partial of a partial",
    criterion(lambda: functools.partial(functools.partial(F.l1_loss), reduction="sum")),
)
add("infinite delta", criterion(lambda: nn.HuberLoss(delta=float("inf"))))
add(
    "delta of 0",
    criterion(lambda: nn.HuberLoss(delta=0)),
    RuntimeError,
    "delta must be greater than 0",
)
add(
    "NaN as beta",
    criterion(lambda: nn.SmoothL1Loss(beta=NAN)),
    RuntimeError,
    "beta must be from 0 on",
)
add(
    "None as criterion",
    criterion(lambda: None),
    TypeError,
    "criterion is a builtins.NoneType, not exac",
)
add(
    "smoothing deleted",
    criterion(CE, lambda p: delattr(p.criterion, "label_smoothing")),
    ValueError,
    "criterion cannot be read: it has no 'label_smoothing'",
)
add(
    "weights deleted",
    criterion(CE, lambda p: delattr(p.criterion, "weight")),
    ValueError,
    "criterion cannot be read: it has no 'weight'",
)
add(
    "no probability",
    criterion(nn.BCELoss),
    RuntimeError,
    "bce needs outputs and targets between 0 and 1; end the model with a Sigmoid, or use BCE",
)

# --- Models ---


def model(change: Callable[[Any], object]) -> Change:
    return lambda p: change(p.model)


def data_of(index: int, make: Callable[[Any], Any], name: str = "weight") -> Change:
    return lambda p: setattr(getattr(p.model[index], name), "data", make(p.model))


add("bias of None", step(model(lambda m: setattr(m[0], "bias", None))))
add("frozen layer", step(model(lambda m: m[0].requires_grad_(False))))
add("flipped weight", step(data_of(0, lambda m: torch.arange(20.0).view(5, 4).flip(0))))
add("transposed weight", step(data_of(0, lambda m: torch.arange(20.0).view(4, 5).t())))
add(
    "expanded weight",
    step(data_of(0, lambda m: torch.ones(1, 4).expand(5, 4)), first=False),
    RuntimeError,
)
ROWS["expanded weight"] = ROWS["expanded weight"]._replace(
    message="unsupported operation: more than one"
)
for name, change, error, message in (
    (
        "all frozen",
        model(lambda m: m.requires_grad_(False)),
        RuntimeError,
        "nothing learns: no parameter",
    ),
    (
        "weight of None",
        model(parameter(None)),
        TypeError,
        "model.0.weight is a builtins.NoneType, not exac",
    ),
    (
        "weight deleted",
        model(lambda m: delattr(m[0], "weight")),
        TypeError,
        "model.0.weight is not a param",
    ),
    (
        "bias deleted",
        model(lambda m: delattr(m[0], "bias")),
        TypeError,
        "model.0.bias is not a parameter",
    ),
    (
        "text as weight",
        model(parameter("w")),
        TypeError,
        "model.0.weight is a builtins.str, not exactly an",
    ),
    (
        "tensor as weight",
        model(parameter(torch.ones(5, 4))),
        TypeError,
        "model.0.weight is a torch.Tensor",
    ),
    (
        "bias of a matrix",
        model(parameter(nn.Parameter(torch.ones(1, 5)), "bias")),
        ValueError,
        "model.0.bias is",
    ),
    (
        "weight of a vector",
        model(parameter(nn.Parameter(torch.ones(4)))),
        ValueError,
        "model.0.weight is [4]",
    ),
    (
        "hook",
        model(lambda m: m[0].register_forward_hook(print)),
        ValueError,
        "model.0 has forward hooks; ",
    ),
    (
        "hook of a weight",
        model(lambda m: m[0].weight.register_hook(print)),
        ValueError,
        "model.0.weight has",
    ),
    (
        "hooks deleted",
        model(lambda m: delattr(m[0], "_forward_hooks")),
        ValueError,
        "model cannot be read: it",
    ),
    (
        "modules deleted",
        model(lambda m: delattr(m, "_modules")),
        ValueError,
        "model cannot be read: 'Sequent",
    ),
    (
        "number as child",
        model(put(3)),
        TypeError,
        "model.1 is a builtins.int, which a step does not support",
    ),
    (
        "children deleted",
        model(lambda m: m._modules.clear()),
        TypeError,
        f"model has no Linear; {LOOP}",
    ),
    (
        "itself as child",
        model(lambda m: m.add_module("3", m)),
        ValueError,
        "model.3.0.weight is shared with",
    ),
    (
        "weight_norm",
        model(lambda m: parametrizations.weight_norm(m[0])),
        TypeError,
        "model.0 is a torch.nn.u",
    ),
    (
        "other widths",
        model(put(nn.Linear(9, 3), 2)),
        RuntimeError,
        "the weight of layer 1 must be [N, K=5] to",
    ),
    (
        "weight of 7 rows",
        data_of(0, lambda m: torch.ones(7, 4)),
        RuntimeError,
        "the bias of layer 0 must be [N",
    ),
    (
        "weight is the input",
        data_of(0, lambda m: DATA[:5]),
        RuntimeError,
        f"input {SHARED}a parameter that",
    ),
    (
        "shared memory",
        data_of(2, lambda m: m[0].bias.data[:3], "bias"),
        ValueError,
        "model.2.bias is shared wi",
    ),
    (
        "overlapping memory",
        data_of(2, lambda m: m[0].weight.data.view(-1)[4:7], "bias"),
        RuntimeError,
        f"a parameter that learns {SHARED}a parameter that learns; pass a clone()",
    ),
):
    data = (lambda: (DATA, y())) if name == "weight is the input" else None
    add(name, step(change, data), error, message)
DATA = x()


def made(make: Callable[[], nn.Module], data: Any = None) -> Any:
    return step(data=data, model=make, first=False)


def dropout(**changed: Any) -> Any:
    def make() -> nn.Module:
        found = net(nn.ReLU(), nn.Dropout(0.0))
        vars(found[2]).update(changed)
        return found

    return made(make)


def flatten(*dimensions: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Flatten(*dimensions), nn.Linear(4, 3))


add("no features", made(lambda: nn.Sequential(nn.Linear(0, 3)), lambda: (x()[:, :0], y())))
add("no hidden units", made(lambda: nn.Sequential(nn.Linear(4, 0), nn.ReLU(), nn.Linear(0, 3))))
add("NaN as slope", made(lambda: net(nn.LeakyReLU(NAN))))
for name, call, error, message in (
    (
        "tensor as slope",
        made(lambda: net(nn.LeakyReLU(torch.tensor(0.3)))),
        ValueError,
        "model.1, LeakyReLU(n",
    ),
    (
        "parameters of inference",
        made(torch.inference_mode()(net)),
        RuntimeError,
        "a parameter is an inference t",
    ),
    (
        "lazy",
        step(model=lambda: nn.Sequential(nn.LazyLinear(3)), first=False),
        TypeError,
        "model.0 is a torch.nn",
    ),
    ("dropout of NaN", dropout(p=NAN), ValueError, "dropout must be from 0 to 1, got nan"),
    (
        "dropout of text",
        dropout(p="a"),
        ValueError,
        "model cannot be read: could not convert string to float",
    ),
    (
        "dropout of None",
        dropout(p=None),
        TypeError,
        "model cannot be read: float() argument must be a string",
    ),
    (
        "Flatten of text",
        made(flatten("a")),
        ValueError,
        "model.0, Flatten(start_dim=a, end_dim=-1), has dimen",
    ),
    (
        "Flatten of much",
        made(flatten(2**70)),
        ValueError,
        "model.0, Flatten(start_dim=11805916207174113034",
    ),
    (
        "Flatten of a vector",
        made(flatten(), lambda: (x()[0], y()[0])),
        IndexError,
        "input [4] does not fit the model's Flatten(1, -1): Dimension out of range",
    ),
):
    add(name, call, error, message)

# --- Settings and copies ---

for name, settings, error, message in (
    (
        "max_norm of text",
        {"max_norm": "1"},
        TypeError,
        "max_norm must be a number or None, got '1'",
    ),
    (
        "max_norm of True",
        {"max_norm": True},
        TypeError,
        "max_norm must be a number or None, got True",
    ),
    ("max_norm of NaN", {"max_norm": NAN}, ValueError, "max_norm must be from 0 on, got nan"),
    (
        "huge max_norm",
        {"max_norm": 10**400},
        TypeError,
        "max_norm must be a number or None, got an int of",
    ),
    ("accumulate of 0", {"accumulate": 0}, ValueError, "accumulate must be at least 1, got 0"),
    ("accumulate of 1.5", {"accumulate": 1.5}, TypeError, "accumulate must be an int, got 1.5"),
    (
        "huge accumulate",
        {"accumulate": 10**400},
        ValueError,
        "accumulate must be below 2**63, got an int",
    ),
):
    add(name, step(first=False, **settings), error, message)
add("max_norm of 0", step(max_norm=0))
add("NumPy's accumulate", step(accumulate=np.int32(2), first=False))
add("copied", step(lambda p: copy.deepcopy(p.step)(x(), y())))
add(
    "pickle cut short",
    step(lambda p: pickle.loads(pickle.dumps(p.step)[:-9])),
    pickle.UnpicklingError,
)
ROWS["pickle cut short"] = ROWS["pickle cut short"]._replace(message="pickle data was truncated")
add(
    "what learns changed in a group",
    step(lambda p: p.model[0].requires_grad_(False), accumulate=2),
    RuntimeError,
    "other parameters learn than in the steps before, whose gradients are not yet applied; ",
)
