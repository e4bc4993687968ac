"""Training steps to compare with eager: networks, losses with targets, optimizers with options."""

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from references import Results, assert_as_accurate_as_native
from torch import Tensor, nn

from mlp_ext import TrainStep
from mlp_ext.bench.training import Step, sgd_step

NETS = {  # widths, and rows of a batch
    "10-5-1@10": ([10, 5, 1], 10),
    "1-1@1": ([1, 1], 1),
    "3-17-5@100": ([3, 17, 5], 100),
    "33-64-20-7@1000": ([33, 64, 20, 7], 1000),
    "70-600-3@50": ([70, 600, 3], 50),
    "64-64-64@5000": ([64, 64, 64], 5000),
    "130-9@2": ([130, 9], 2),
    "70-600-515-3@80": ([70, 600, 515, 3], 80),
    "530-300-5@112": ([530, 300, 5], 112),
    "3-700-400-1@32": ([3, 700, 400, 1], 32),
    "700-700-300@4": ([700, 700, 300], 4),
}
HIDDEN = (nn.ReLU, nn.Tanh, nn.Sigmoid)  # in this order, from the input on


def _uniform(rows: int, N: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(rows, N, dtype=dtype)


def _out_of_reach(rows: int, N: int, dtype: torch.dtype) -> Tensor:
    """So that rounding decides no sign of y - target."""
    return 100 + torch.rand(rows, N, dtype=dtype)


def _classes(rows: int, N: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(N, (rows,))


def _probabilities(rows: int, N: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, N, dtype=torch.float64).softmax(1).to(dtype)


def _weights(N: int, dtype: torch.dtype) -> Tensor:
    return torch.linspace(0.5, 1.5, N, dtype=dtype)


def _weighted(N: int, dtype: torch.dtype, **options: Any) -> nn.Module:
    return nn.CrossEntropyLoss(_weights(N, dtype), label_smoothing=0.1, **options)


class Loss(NamedTuple):
    criterion: Callable[..., nn.Module]  # called with N, the dtype and the reduction
    target: Callable[[int, int, torch.dtype], Tensor]  # of rows, N and the dtype
    last: type[nn.Module] = nn.Identity  # the activation before it


LOSSES = {
    "mse": Loss(lambda N, dtype, **r: nn.MSELoss(**r), _uniform, nn.Sigmoid),
    "mse-linear": Loss(lambda N, dtype, **r: nn.MSELoss(**r), _uniform),
    "bce": Loss(lambda N, dtype, **r: nn.BCELoss(**r), _uniform, nn.Sigmoid),
    "bce-logits": Loss(lambda N, dtype, **r: nn.BCEWithLogitsLoss(**r), _uniform),
    "classes": Loss(lambda N, dtype, **r: nn.CrossEntropyLoss(**r), _classes),
    "classes-weight-smoothing": Loss(
        lambda N, dtype, **r: _weighted(N, dtype, ignore_index=0, **r), _classes
    ),
    "probabilities": Loss(lambda N, dtype, **r: nn.CrossEntropyLoss(**r), _probabilities),
    "probabilities-weight-smoothing": Loss(_weighted, _probabilities),
    "bce-logits-weight": Loss(
        lambda N, dtype, **r: nn.BCEWithLogitsLoss(pos_weight=_weights(N, dtype), **r), _uniform
    ),
    "l1": Loss(lambda N, dtype, **r: nn.L1Loss(**r), _out_of_reach),
    "smooth-l1": Loss(lambda N, dtype, **r: nn.SmoothL1Loss(beta=0.3, **r), _uniform),
    "huber": Loss(lambda N, dtype, **r: nn.HuberLoss(delta=0.2, **r), _uniform, nn.Sigmoid),
    "nll": Loss(lambda N, dtype, **r: nn.NLLLoss(**r), _classes, nn.Sigmoid),
    "nll-weight": Loss(
        lambda N, dtype, **r: nn.NLLLoss(_weights(N, dtype), ignore_index=0, **r), _classes, nn.Tanh
    ),
}
SGD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "maximize": {
        "lr": 0.1,
        "momentum": 0.5,
        "dampening": 0.1,
        "maximize": True,
        "weight_decay": 0.01,
    },
    "tensor-lr": {"lr": torch.tensor(0.5), "momentum": 0.9},
    "foreach": {"foreach": True, "momentum": 0.9},
    "fused": {"fused": True, "nesterov": True, "momentum": 0.9},
}
# In float32 eager Adam would round what it computes from it, in any dtype.
LR = torch.tensor(0.01, dtype=torch.float64)
# The lr of SGD is for gradients of size 1; the others do not depend on their size.
OPTIONS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    **{name: (torch.optim.SGD, options) for name, options in SGD_OPTIONS.items()},
    "adam": (torch.optim.Adam, {}),
    "adam-betas": (torch.optim.Adam, {"betas": (0.7, 0.9), "eps": 1e-3, "lr": LR}),
    "adam-decay": (torch.optim.Adam, {"weight_decay": 0.1, "maximize": True}),
    "adam-decoupled": (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam-amsgrad": (torch.optim.Adam, {"amsgrad": True, "betas": (0.5, 0.6)}),
    "adam-foreach": (torch.optim.Adam, {"foreach": True}),
    "adam-fused": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"amsgrad": True}),
    "adamw-maximize": (torch.optim.AdamW, {"weight_decay": 0.3, "maximize": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "rmsprop-momentum": (torch.optim.RMSprop, {"momentum": 0.5, "alpha": 0.8, "eps": 1e-3}),
    "rmsprop-centered": (
        torch.optim.RMSprop,
        {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "eps": 1e-3},
    ),
    "rmsprop-maximize": (torch.optim.RMSprop, {"centered": True, "maximize": True, "eps": 1e-3}),
    "adagrad": (torch.optim.Adagrad, {}),
    "adagrad-decay": (
        torch.optim.Adagrad,
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 1e-5},
    ),
    "adagrad-maximize": (torch.optim.Adagrad, {"maximize": True, "lr": LR}),
    "adagrad-fused": (torch.optim.Adagrad, {"fused": True}),
}


def make_net(widths: list[int], last: type[nn.Module] = nn.Identity) -> nn.Sequential:
    modules: list[nn.Module] = []
    for i, (k, n) in enumerate(pairwise(widths)):
        modules += [nn.Linear(k, n), HIDDEN[i % len(HIDDEN)]()]
    return nn.Sequential(*modules[:-1], last())


Make = Callable[[nn.Module, nn.Module, torch.optim.Optimizer], Step]


class Training(NamedTuple):
    """A model, what trains it, and its data."""

    model: nn.Sequential
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    input: Tensor
    target: Tensor

    def to(self, dtype: torch.dtype) -> "Training":
        """A copy in which all that is real is of `dtype`."""
        model, criterion, optimizer, x, y = deepcopy(self)
        y = y.to(dtype) if y.is_floating_point() else y
        model.to(dtype)
        optimizer.load_state_dict(optimizer.state_dict())  # also of `dtype`
        return Training(model, criterion.to(dtype), optimizer, x.to(dtype), y)

    def run(self, make: Make, steps: int) -> Results:
        """Losses of each step, and what state() has after them, by name."""
        step = make(self.model, self.criterion, self.optimizer)
        losses = [step(self.input, self.target) for _ in range(steps)]
        return {"losses": torch.stack(losses), **self.state()}

    def state(self) -> Results:
        """The parameters, and what the optimizer keeps for each."""
        found = {name: p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            for kind, state in self.optimizer.state.get(p, {}).items():
                found[f"{kind} of {name}"] = state
        return {name: t.clone() for name, t in found.items()}


def training(
    net: str, loss: str, options: str, dtype: torch.dtype, reduction: str = "mean"
) -> Training:
    widths, rows = NETS[net]
    criterion, target, last = LOSSES[loss]
    model = make_net(widths, last).to(dtype)
    N = widths[-1]
    kind, chosen = OPTIONS[options]
    if kind is torch.optim.SGD:
        scale = 1 / (10 + widths[0])  # so that no training is chaotic
        if reduction == "sum":
            scale /= rows * N
        chosen = {**chosen, "lr": chosen.get("lr", 1.0) * scale}
    optimizer = kind(model.parameters(), **{"lr": 0.01, **chosen})
    input = torch.randn(rows, widths[0], dtype=dtype)
    return Training(
        model, criterion(N, dtype, reduction=reduction), optimizer, input, target(rows, N, dtype)
    )


def assert_steps_match_eager(training: Training, steps: int, make: Make = TrainStep) -> Results:
    """As accurate as eager: see references.py. What is added up: all changes of the steps."""
    dtype = training.input.dtype
    reference = training.to(torch.float64).run(sgd_step, steps)
    native = training.to(dtype).run(sgd_step, steps)
    found = training.to(dtype).run(make, steps)
    cancels = isinstance(training.criterion, nn.NLLLoss)  # a mean of outputs of either sign
    assert_runs_match(found, native, reference, steps, dtype, least=float(cancels))
    return found


def assert_runs_match(
    found: Results,
    native: Results,
    reference: Results,
    steps: int,
    dtype: torch.dtype,
    least: float = 0.0,
) -> None:
    """least: of the sizes of what is added up to the losses."""
    assert found.keys() == native.keys()
    if dtype.itemsize == 2:  # each of the intermediate results is rounded, too
        unit = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 4
    else:
        unit = steps
    losses = reference["losses"].nan_to_num().abs()
    size = max(least, float(losses.max())) if losses.numel() else 0.0
    for name, expected in native.items():
        exact = reference[name]
        terms = unit * (exact.abs() + min(size, 1))
        assert_as_accurate_as_native(found[name], expected, exact, terms, name)


# As the operator takes them: the last activation, the target, loss_weight, loss_parameters.
SmallLoss = tuple[str, Callable[..., Tensor], Tensor | None, list[float]]
SMALL_LOSSES: dict[str, SmallLoss] = {
    "mse": ("sigmoid", _uniform, None, []),
    "bce": ("sigmoid", _uniform, None, []),
    "bce_with_logits": ("identity", _uniform, torch.tensor([0.5, 2.0]), []),
    "l1": ("tanh", _uniform, None, []),
    "smooth_l1": ("gelu", _uniform, None, [0.5]),
    "huber": ("identity", _uniform, None, [0.5]),
    "cross_entropy-classes": ("identity", _classes, torch.tensor([0.5, 2.0]), [-100, 0.1]),
    "cross_entropy-probabilities": ("tanh", _probabilities, torch.tensor([0.5, 2.0]), [-100, 0.1]),
    "nll": ("silu", _classes, torch.tensor([0.5, 2.0]), [-100]),
}
