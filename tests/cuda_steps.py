"""Training steps of the kernel in the CUDA model, or of an operator, against those of torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from cuda_kernels import ORDERS, Buffer, buffer, fault
from references import activated, assert_as_accurate_as_native
from shapes import DTYPES
from torch import Tensor, nn

import mlp_ext
from mlp_ext import _C
from mlp_ext.nn import Activation
from mlp_ext.ops import PARAMETERS

RELU, SIGMOID, IDENTITY = (Activation(name) for name in ("relu", "sigmoid", "identity"))
CRITERIA: dict[str, Any] = {
    "mse": nn.MSELoss,
    "bce": nn.BCELoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
    "l1": nn.L1Loss,
    "smooth_l1": nn.SmoothL1Loss,
    "huber": nn.HuberLoss,
    "cross_entropy": nn.CrossEntropyLoss,
    "nll": nn.NLLLoss,
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
STATES = {  # in the order of csrc/math/optimizers.h
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "rmsprop": ("square_avg", "momentum_buffer", "grad_avg"),
    "adagrad": ("sum",),
}
PLAIN = {"lr": 0.1}
RICH = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
# Each option of each optimizer.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", PLAIN),
    "sgd-momentum": ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "sgd-nesterov": ("sgd", RICH),
    "sgd-maximize": (
        "sgd",
        {"lr": 0.01, "momentum": 0.5, "maximize": True, "weight_decay": 0.1},
    ),
    "adam": ("adam", {"lr": 0.02}),
    "adam-decay": ("adam", {"lr": 0.02, "betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.1}),
    "adam-amsgrad": ("adam", {"lr": 0.02, "betas": (0.5, 0.6), "amsgrad": True}),
    "adam-decoupled": (
        "adam",
        {"lr": 0.02, "weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
    ),
    "rmsprop": ("rmsprop", {"lr": 0.02, "alpha": 0.8}),
    "rmsprop-centered": (
        "rmsprop",
        {"lr": 0.02, "centered": True, "momentum": 0.5, "weight_decay": 0.1, "eps": 0.1},
    ),
    "rmsprop-maximize": ("rmsprop", {"lr": 0.02, "momentum": 0.5, "maximize": True}),
    "adagrad": ("adagrad", {"lr": 0.05, "lr_decay": 0.2}),
    "adagrad-maximize": ("adagrad", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
}


NONE: dict[str, float] = {}


class Training(NamedTuple):
    """Of a net with these widths, whose optimizer did some steps before and has its states."""

    widths: tuple[int, ...]
    rows: int
    batch: int
    loss: str = "mse"  # or cross_entropy of probabilities: "cross_entropy-soft"
    reduction: str = "mean"
    optimizer: str = "sgd"
    options: dict[str, Any] = RICH
    dtype: torch.dtype = torch.float32
    shuffled: bool = True
    weighted: bool = False
    loss_options: dict[str, float] = NONE
    frozen: tuple[int, ...] = ()  # indices among the parameters
    bias: bool = True
    hidden: Activation = RELU
    last: Activation | None = None  # none: what the loss expects
    special: float = 0.0  # somewhere in the input
    device_count: torch.dtype | None = (
        None  # of the counts of steps, on the device; none: on the CPU
    )

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.widths))}@{self.rows}by{self.batch}"

    @property
    def loss_name(self) -> str:
        return self.loss.partition("-")[0]

    @property
    def activations(self) -> list[Activation]:
        last = self.last or (SIGMOID if self.loss == "bce" else IDENTITY)
        return [*[self.hidden] * (len(self.widths) - 2), last]

    @property
    def loss_parameters(self) -> list[float]:
        defaults = _C.losses()[self.loss_name]
        return [self.loss_options.get(name, value) for name, value in defaults.items()]


class Data(NamedTuple):
    input: Tensor
    target: Tensor
    order: Tensor | None
    weight: Tensor | None


State = dict[str, Tensor]  # of a parameter, as optimizer.state[parameter]


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
    if t.loss in ("cross_entropy", "nll"):
        target = torch.randint(N, (more,), generator=drawn)
        target[::5] = int(t.loss_options.get("ignore_index", -100))
    weight = (0.5 + torch.rand(N, generator=drawn)).to(t.dtype) if t.weighted else None
    return Data(x, target, order, weight)


class Activated(nn.Module):
    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, z: Tensor) -> Tensor:
        return activated(z, *self.activation)


def model_of(t: Training) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(2)
        layers: list[nn.Module] = []
        for (k, n), activation in zip(pairwise(t.widths), t.activations, strict=True):
            layers += [nn.Linear(k, n, bias=t.bias), Activated(activation)]
    model = nn.Sequential(*layers).to(t.dtype)
    for index, p in enumerate(model.parameters()):
        p.requires_grad_(index not in t.frozen)
    return model


def states_of(t: Training) -> list[State]:
    """Of each parameter, as after three steps; without any if it does not learn."""
    drawn = torch.Generator().manual_seed(3)
    needs = {"momentum_buffer": "momentum", "max_exp_avg_sq": "amsgrad", "grad_avg": "centered"}

    def state_of(p: Tensor) -> State:
        state = {}
        for kind in STATES[t.optimizer]:
            if kind in needs and not t.options.get(needs[kind]):
                continue
            if "sq" in kind or kind == "sum":
                value = 0.5 + torch.rand(p.shape, generator=drawn)
            else:
                value = 0.1 * torch.randn(p.shape, generator=drawn)
            state[kind] = value.to(t.dtype)
        if t.optimizer != "sgd":
            state["step"] = torch.tensor(3.0, dtype=t.device_count or torch.float32)
        return state

    return [state_of(p) if p.requires_grad else {} for p in model_of(t).parameters()]


def batches(t: Training, data: Data) -> list[tuple[Tensor, Tensor]]:
    order = torch.arange(t.rows) if data.order is None else data.order
    return [(data.input[rows], data.target[rows]) for rows in order.split(t.batch)]


def learning_rate(t: Training, index: int) -> float:
    """Each parameter's own."""
    return float(t.options["lr"]) * (1 + index / 8)


def optimizer_of(t: Training, model: nn.Module) -> torch.optim.Optimizer:
    """With a group for each parameter that learns."""
    groups: list[Any] = [
        {"params": [p], "lr": learning_rate(t, index)}
        for index, p in enumerate(model.parameters())
        if p.requires_grad
    ]
    made: torch.optim.Optimizer = OPTIMIZERS[t.optimizer](groups or [torch.zeros(1)], **t.options)
    return made


Results = dict[str, Tensor]


def eager(t: Training, dtype: torch.dtype) -> Results:
    """Losses, parameters and states after the steps of torch, computed in that dtype."""
    data, model = data_of(t), model_of(t).to(dtype)
    options: dict[str, Any] = {"reduction": t.reduction, **t.loss_options}
    if data.weight is not None:
        name = "pos_weight" if t.loss == "bce_with_logits" else "weight"
        options[name] = data.weight.to(dtype)
    criterion = CRITERIA[t.loss_name](**options)
    optimizer = optimizer_of(t, model)
    states = dict(zip(model.parameters(), states_of(t), strict=True))
    for p, state in states.items():
        if state:
            steps = {"step": state["step"]} if "step" in state else {}
            optimizer.state[p] = {kind: v.to(dtype) for kind, v in state.items()} | steps
    losses = []
    for x, y in batches(t, data):
        loss = criterion(model(x.to(dtype)), y if y.dtype == torch.int64 else y.to(dtype))
        losses.append(loss.detach())
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
    found = {"losses": torch.stack(losses)}
    for name, p in model.named_parameters():
        found[name] = p.detach()
        found |= {f"{name}'s {kind}": optimizer.state[p][kind] for kind in states[p]}
    return found


def hyperparameters(t: Training, index: int) -> list[float]:
    """Of the parameter with that index, as the operator takes them."""
    has = optimizer_of(t, model_of(t)).defaults | {"lr": learning_rate(t, index)}

    def number(name: str, default: float) -> float:
        key, _, element = name.partition("[")
        value = has.get(key, default)
        return float(value[int(element[0])] if element else value)

    return [number(*item) for item in _C.optimizers()[t.optimizer].items()]


Run = Callable[[Training, Data, list[Tensor], list[State]], Tensor]


def found_by(run: Run, t: Training) -> Results:
    """The same by `run`, which is given the parameters and their states, and updates them."""
    data, model, states = data_of(t), model_of(t), states_of(t)
    parameters = [p.detach().clone() for p in model.parameters()]
    found = {"losses": run(t, data, parameters, states)}
    for (name, _), p, state in zip(model.named_parameters(), parameters, states, strict=True):
        found[name] = p
        found |= {f"{name}'s {kind}": value for kind, value in state.items()}
    return found


def assert_trains_as_torch(run: Run, t: Training) -> None:
    found = found_by(run, t)
    native, reference = eager(t, t.dtype), eager(t, torch.float64)
    assert found.keys() == native.keys()
    for name in native:
        terms = reference[name].abs() + 4  # of sums over a batch, of values near one
        assert_as_accurate_as_native(found[name], native[name], reference[name], terms, name)


def arguments(t: Training, data: Data, parameters: list[Tensor], states: list[State]) -> Any:
    """Those of the operator mlp_train_step_, by name."""
    learning = [index for index in range(len(parameters)) if index not in t.frozen]
    names = STATES[t.optimizer]
    return {
        "input": data.input if data.order is not None else data.input[: t.rows],
        "target": data.target if data.order is not None else data.target[: t.rows],
        "parameters": parameters,
        "states": [state[name] for state in states for name in names if name in state],
        "steps": [state["step"] for state in states if "step" in state],
        "activations": [activation.name for activation in t.activations],
        "activation_parameters": [
            number
            for name, numbers in t.activations
            for number in numbers or PARAMETERS[name].values()
        ],
        "loss": t.loss_name,
        "reduction": t.reduction,
        "loss_weight": data.weight,
        "loss_parameters": t.loss_parameters,
        "optimizer": t.optimizer,
        "learning": learning,
        "hyperparameters": [n for index in learning for n in hyperparameters(t, index)],
        "order": data.order,
        "batch_size": t.batch,
    }


# ---- the kernel in the CUDA model ----


def most_parameters(functors: dict[str, dict[str, float]]) -> int:
    return max(map(len, functors.values()))


class Parameter(ctypes.Structure):
    _fields_ = [
        ("value", Buffer),
        ("states", Buffer * 3),
        ("float_count", Buffer),
        ("double_count", Buffer),
        ("count", ctypes.c_double),
        ("hyperparameters", ctypes.c_double * most_parameters(_C.optimizers())),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("K", "N", "activation")),
        ("parameters", ctypes.c_double * most_parameters(_C.activations())),
        *((name, ctypes.c_int64) for name in ("has_bias", "weight_learns", "bias_learns")),
    ]


class NetworkBuffers(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        *((name, Buffer) for name in ("order", "x", "target", "classes", "losses")),
        ("parameters", ctypes.POINTER(Parameter)),
    ]


SIZES = ("dtype", "epochs", "batch", "batches", "input_rows", "loss", "mean", "optimizer", "layers")


class Steps(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (*SIZES, "lowest_learning")),
        ("loss_parameters", ctypes.c_double * most_parameters(_C.losses())),
        ("loss_weight", Buffer),
        ("layer", ctypes.POINTER(Layer)),
        *((name, ctypes.c_int64) for name in ("networks", "in_table")),
        ("network", ctypes.POINTER(NetworkBuffers)),
        ("order_of_threads", ctypes.c_int64),
    ]


class Network(NamedTuple):
    """With its parameters and states, which a launch changes."""

    training: Training
    data: Data
    parameters: list[Tensor]
    states: list[State]

    @property
    def changing(self) -> list[Tensor]:
        return [*self.parameters, *(value for state in self.states for value in state.values())]


def index_among(functors: dict[str, Any], name: str) -> int:
    return [*functors].index(name)


def layers_of(t: Training) -> ctypes.Array[Layer]:
    each = 2 if t.bias else 1
    found = []
    layers = zip(pairwise(t.widths), t.activations, strict=True)
    for index, ((k, n), (name, numbers)) in enumerate(layers):
        numbers = numbers or (*PARAMETERS[name].values(),)
        learns = [t.bias and each * index + 1 not in t.frozen, each * index not in t.frozen]
        found.append(Layer(k, n, mlp_ext.ACTIVATIONS.index(name), numbers, t.bias, *learns[::-1]))
    return (Layer * len(found))(*found)


def buffers_of(network: Network, losses: Tensor) -> NetworkBuffers:
    t, data, parameters, states = network

    def parameter(index: int) -> Parameter:
        state, p = states[index], Parameter(buffer(parameters[index]))
        if index in t.frozen:
            return p
        p.states = (Buffer * 3)(*(buffer(state.get(name)) for name in STATES[t.optimizer]))
        p.hyperparameters = (*hyperparameters(t, index),)
        if "step" in state and t.device_count is None:
            p.count = state["step"].item()
        elif "step" in state:
            name = "float_count" if t.device_count == torch.float32 else "double_count"
            setattr(p, name, buffer(state["step"]))
        return p

    all_parameters = [parameter(index) for index in range(len(parameters))]
    if not t.bias:
        all_parameters = [p for weight in all_parameters for p in (weight, Parameter())]
    classes = data.target if data.target.dtype == torch.int64 else None
    target = data.target if classes is None else None
    found = NetworkBuffers(
        t.rows,
        *map(buffer, (data.order, data.input, target, classes, losses)),
        (Parameter * len(all_parameters))(*all_parameters),
    )
    found.classes.stride = 1
    return found


def launch(
    library: ctypes.CDLL, networks: list[Network], epochs: int, in_table: bool, order: int
) -> list[Tensor]:
    """Trains networks alike in all but numbers and rows; returns the losses of each, NaN at the end
    of each epoch where it has fewer batches than others."""
    t, data, parameters, _ = networks[0]
    batches = max(-(-n.training.rows // t.batch) for n in networks)
    losses = [parameters[0].new_full((epochs * batches,), torch.nan) for _ in networks]
    layers = layers_of(t)
    each = 2 if t.bias else 1
    learning = [p // each for p in range(len(parameters)) if p not in t.frozen]
    problem = Steps(
        DTYPES.index(t.dtype),
        epochs,
        t.batch,
        batches,
        len(data.input),
        index_among(_C.losses(), t.loss_name),
        t.reduction == "mean",
        index_among(_C.optimizers(), t.optimizer),
        len(layers),
        min(learning, default=len(layers)),
        (*t.loss_parameters,),
        buffer(data.weight),
        layers,
        len(networks),
        in_table,
        (NetworkBuffers * len(networks))(*map(buffers_of, networks, losses)),
        order,
    )
    wrong = fault(library, "train_steps", problem)
    assert not wrong, f"{t}: {wrong}"
    for n in networks:
        for state in n.states:
            if "step" in state:  # as the caller of the kernel does
                state["step"] += epochs * -(-n.training.rows // t.batch)
    return losses


def launch_in_each_order(
    library: ctypes.CDLL, networks: list[Network], epochs: int = 1, in_table: bool = False
) -> list[Tensor]:
    """With the threads in each order, with the same bits."""
    changed = [tensor for network in networks for tensor in network.changing]
    before = [tensor.clone() for tensor in changed]
    found = []
    for order in ORDERS.values():
        for now, kept in zip(changed, before, strict=True):
            now.copy_(kept)
        losses = launch(library, networks, epochs, in_table, order)
        found.append([*losses, *(tensor.clone() for tensor in changed)])
    bits = [[x.reshape(-1).view(torch.uint8) for x in each] for each in found]
    for other in bits[1:]:
        assert all(map(torch.equal, bits[0], other)), f"{networks[0].training}: varies"
    return found[0][: len(networks)]


def model_of_cuda(library: ctypes.CDLL, in_table: bool = False) -> Run:
    def run(t: Training, data: Data, parameters: list[Tensor], states: list[State]) -> Tensor:
        network = Network(t, data, parameters, states)
        return launch_in_each_order(library, [network], in_table=in_table)[0]

    return run
