"""Training steps of the kernel in the CUDA model, or of an operator, against those of torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from cuda_kernels import ORDERS, Buffer, buffer, fault
from references import assert_as_accurate_as_native
from shapes import DTYPES
from torch import Tensor, nn

import mlp_ext

MODULES = {"identity": nn.Identity, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
LOSSES = ("mse", "bce", "bce_with_logits", "cross_entropy")  # csrc/losses.h
HYPERPARAMETERS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
PLAIN = {"lr": 0.1}
RICH = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
OPTIONS = {
    "plain": PLAIN,
    "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "nesterov": RICH,
    "maximize": {"lr": 0.01, "momentum": 0.5, "maximize": True, "weight_decay": 0.1},
}


class Training(NamedTuple):
    """Of a net with these widths; the momentum buffers are there already, as after a first step."""

    widths: tuple[int, ...]
    rows: int
    batch: int
    loss: str = "mse"  # or cross_entropy of probabilities: "cross_entropy-soft"
    reduction: str = "mean"
    options: dict[str, Any] = RICH
    dtype: torch.dtype = torch.float32
    shuffled: bool = True
    weighted: bool = False
    smoothing: float = 0.0
    frozen: tuple[int, ...] = ()  # places among the parameters
    bias: bool = True
    hidden: str = "relu"
    special: float = 0.0  # somewhere in the input

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.widths))}@{self.rows}by{self.batch}"


class Data(NamedTuple):
    input: Tensor
    target: Tensor
    order: Tensor | None
    weight: Tensor | None


def data_of(t: Training) -> Data:
    drawn = torch.Generator().manual_seed(1)
    more = t.rows + 3  # rows that no step may touch
    N = t.widths[-1]
    order = torch.randperm(more, generator=drawn)[: t.rows] if t.shuffled else None
    x = torch.randn(more, t.widths[0], generator=drawn).to(t.dtype)
    if t.special:
        x[6, 1] = t.special
    target = torch.rand(more, N, generator=drawn).to(t.dtype)
    if t.loss == "cross_entropy-soft":
        target /= target.sum(1, keepdim=True)
    if t.loss == "cross_entropy":
        target = torch.randint(N, (more,), generator=drawn)
        target[::5] = -100
    weight = (0.5 + torch.rand(N, generator=drawn)).to(t.dtype) if t.weighted else None
    return Data(x, target, order, weight)


def model_of(t: Training) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        layers: list[nn.Module] = []
        for k, n in pairwise(t.widths):
            layers += [nn.Linear(k, n, bias=t.bias), MODULES[t.hidden]()]
    layers[-1] = nn.Sigmoid() if t.loss == "bce" else nn.Identity()
    model = nn.Sequential(*layers).to(t.dtype)
    for place, p in enumerate(model.parameters()):
        p.requires_grad_(place not in t.frozen)
    return model


def buffers_of(t: Training) -> list[Tensor]:
    """Of each parameter, whether it learns or not."""
    drawn = torch.Generator().manual_seed(3)
    return [
        (0.1 * torch.randn(p.shape, generator=drawn)).to(t.dtype) for p in model_of(t).parameters()
    ]


def batches(t: Training, data: Data) -> list[tuple[Tensor, Tensor]]:
    order = torch.arange(t.rows) if data.order is None else data.order
    return [(data.input[rows], data.target[rows]) for rows in order.split(t.batch)]


Results = dict[str, Tensor]


def eager(t: Training, dtype: torch.dtype) -> Results:
    """Losses, parameters and momentum buffers after the steps of torch, computed in that dtype."""
    data, model = data_of(t), model_of(t).to(dtype)
    criterion = {
        "mse": lambda: nn.MSELoss(reduction=t.reduction),
        "bce": lambda: nn.BCELoss(reduction=t.reduction),
        "bce_with_logits": lambda: nn.BCEWithLogitsLoss(reduction=t.reduction),
        "cross_entropy": lambda: nn.CrossEntropyLoss(
            None if data.weight is None else data.weight.to(dtype),
            reduction=t.reduction,
            label_smoothing=t.smoothing,
        ),
    }[t.loss.partition("-")[0]]()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning or [torch.zeros(1)], **t.options)
    if t.options.get("momentum"):
        for p, b in zip(model.parameters(), buffers_of(t), strict=True):
            if p.requires_grad:
                optimizer.state[p]["momentum_buffer"] = b.to(dtype)
    losses = []
    for x, y in batches(t, data):
        loss = criterion(model(x.to(dtype)), y if y.dtype == torch.int64 else y.to(dtype))
        losses.append(loss.detach())
        optimizer.zero_grad()
        if learning:
            loss.backward()
        optimizer.step()
    found = {"losses": torch.stack(losses)}
    found |= {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if p in optimizer.state:
            found[f"{name}'s momentum buffer"] = optimizer.state[p]["momentum_buffer"]
    return found


def hyperparameters(t: Training) -> list[float]:
    return [float(t.options.get(name, 0)) for name in HYPERPARAMETERS]


Run = Callable[[Training, Data, list[Tensor], list[Tensor | None]], Tensor]


def found_by(run: Run, t: Training) -> Results:
    """The same by `run`, which is given the parameters and, of those that learn, their buffers."""
    data, model = data_of(t), model_of(t)
    names = [name for name, _ in model.named_parameters()]
    parameters = [p.detach().clone() for p in model.parameters()]
    momentum = t.options.get("momentum")
    buffers = [
        b if momentum and place not in t.frozen else None for place, b in enumerate(buffers_of(t))
    ]
    found = {"losses": run(t, data, parameters, buffers)}
    found |= dict(zip(names, parameters, strict=True))
    for name, b in zip(names, buffers, strict=True):
        if b is not None:
            found[f"{name}'s momentum buffer"] = b
    return found


def assert_trains_as_torch(run: Run, t: Training) -> None:
    found = found_by(run, t)
    native, reference = eager(t, t.dtype), eager(t, torch.float64)
    assert found.keys() == native.keys()
    for name in native:
        terms = reference[name].abs() + 4  # of sums over a batch, of values near one
        assert_as_accurate_as_native(found[name], native[name], reference[name], terms, name)


# ---- the kernel in the CUDA model ----


class Parameter(ctypes.Structure):
    _fields_ = [
        ("value", Buffer),
        ("momentum_buffer", Buffer),
        ("hyperparameters", ctypes.c_double * len(HYPERPARAMETERS)),
        ("learns", ctypes.c_int64),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("K", "N", "activation")),
        ("weight", Parameter),
        ("bias", Parameter),
    ]


SIZES = ("dtype", "rows", "batch", "input_rows", "loss", "mean", "ignore_index", "layers")
TENSORS = ("order", "x", "target", "classes", "loss_weight", "losses")


class Steps(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (*SIZES, "lowest_learning")),
        ("label_smoothing", ctypes.c_double),
        *((name, Buffer) for name in TENSORS),
        ("layer", ctypes.POINTER(Layer)),
        ("order_of_threads", ctypes.c_int64),
    ]


def layers_of(
    t: Training, parameters: list[Tensor], buffers: list[Tensor | None]
) -> ctypes.Array[Layer]:
    settings = (ctypes.c_double * len(HYPERPARAMETERS))(*hyperparameters(t))

    def parameter(place: int) -> Parameter:
        learns = place not in t.frozen
        return Parameter(buffer(parameters[place]), buffer(buffers[place]), settings, learns)

    each = 2 if t.bias else 1
    found = []
    for layer, (k, n) in enumerate(pairwise(t.widths)):
        last = "sigmoid" if t.loss == "bce" else "identity"
        activation = t.hidden if layer < len(t.widths) - 2 else last
        bias = parameter(each * layer + 1) if t.bias else Parameter()
        place = mlp_ext.ACTIVATIONS.index(activation)
        found.append(Layer(k, n, place, parameter(each * layer), bias))
    return (Layer * len(found))(*found)


def model_of_cuda(library: ctypes.CDLL) -> Run:
    """In each order of the threads with the same bits."""

    def run(
        t: Training, data: Data, parameters: list[Tensor], buffers: list[Tensor | None]
    ) -> Tensor:
        steps = -(-t.rows // t.batch)
        kept = [p.clone() for p in parameters], [b if b is None else b.clone() for b in buffers]
        found = []
        for order in ORDERS.values():
            for now, before in zip([*parameters, *buffers], [*kept[0], *kept[1]], strict=True):
                if now is not None and before is not None:
                    now.copy_(before)
            losses = parameters[0].new_full((steps,), torch.nan)
            classes = data.target if data.target.dtype == torch.int64 else None
            target = data.target if classes is None else None
            layers = layers_of(t, parameters, buffers)
            each = 2 if t.bias else 1
            learning = [p // each for p in range(len(parameters)) if p not in t.frozen]
            problem = Steps(
                DTYPES.index(t.dtype),
                t.rows,
                t.batch,
                len(data.input),
                LOSSES.index(t.loss.partition("-")[0]),
                t.reduction == "mean",
                -100,
                len(layers),
                min(learning, default=len(layers)),
                t.smoothing,
                *map(buffer, (data.order, data.input, target, classes, data.weight, losses)),
                layers,
                order,
            )
            if classes is not None:
                problem.classes.stride = 1
            wrong = fault(library, "sgd_steps", problem)
            assert not wrong, f"{t}: {wrong}"
            found.append([losses, *(x.clone() for x in [*parameters, *buffers] if x is not None)])
        bits = [[x.view(torch.uint8) for x in each] for each in found]
        for other in bits[1:]:
            assert all(map(torch.equal, bits[0], other)), f"{t}: varies"
        return found[0][0]

    return run
