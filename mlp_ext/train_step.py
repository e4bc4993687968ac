"""TrainStep: forward, loss, backward and the update of SGD in one call; fit: epochs of them.

A model, a criterion and an optimizer are read once into a Trainer, the C++ that does the steps,
together with what must stay as it was read: children, Parameters, hooks, settings, groups. Each
step asks it whether all still does, and if not they are read anew, with the same checks.
"""

from __future__ import annotations

import operator
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.optim import optimizer as optim_optimizer

from mlp_ext import _C
from mlp_ext.errors import CAUGHT, check_input, check_target, check_tensor, kind, rename
from mlp_ext.fuse import chains
from mlp_ext.nn import DTYPES, MODULE_CODE, FusedActivation, LinearAct, type_name
from mlp_ext.sequential import Sequential
from mlp_ext.step_graph import graphed

LOSSES: dict[type[nn.Module], str] = {  # and what csrc/losses.h calls them
    nn.MSELoss: "mse",
    nn.BCELoss: "bce",
    nn.BCEWithLogitsLoss: "bce_with_logits",
    nn.CrossEntropyLoss: "cross_entropy",
}
LINEARS: dict[type[nn.Module], str | None] = {  # and the activation that they compute
    nn.Linear: None,
    **{layer: layer.activation for layer in LinearAct.by_module.values()},
}
INSTEAD = "use the eager loop, with mlp_ext.fuse(model)"


class TrainStep:
    """step(input, target) equals a training step of torch, in one call:

        loss = criterion(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with the model's own Parameters, which change in place, and the optimizer's own settings and
    momentum. LR schedulers, checkpoints and ordinary eager steps keep working. One thing differs:
    .grad is not written. After model.to(dtype) the
    optimizer's momentum must follow: optimizer.load_state_dict(optimizer.state_dict()).

    Stochastic gradient descent (Robbins and Monro, 1951), for each parameter p with gradient g and
    momentum buffer v (Polyak, 1964; Nesterov, 1983, in the form of Sutskever et al., ICML 2013):

        g = -g if maximize;  g += weight_decay p;  v = momentum v + (1 - dampening) g, at first g
        p -= lr (g + momentum v if nesterov, else v)

    model: an nn.Sequential, also nested or fused, or a single layer, of nn.Linear, the layers of
        mlp_ext and the activations ReLU, Sigmoid, Tanh and Identity, each after a Linear; with
        parameters of float32, float64, bfloat16 or float16, all alike.
    criterion: nn.MSELoss, nn.BCELoss, nn.BCEWithLogitsLoss, or nn.CrossEntropyLoss with its weight,
        ignore_index and label_smoothing; reduction mean or sum.
    optimizer: torch.optim.SGD with any options but differentiable, read at each call. What it does
        not have, or what does not require a gradient, does not learn.

    Raises TypeError or ValueError for anything else, naming it: at construction, or at the next
    call where model, criterion or optimizer have been changed since. A copy, also a pickled one,
    is a TrainStep of copies of the three, which are read at its first call. So a model may hold the
    TrainStep that trains it.
    """

    def __init__(
        self, model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self._parts = (model, criterion, optimizer)
        self._read()

    def _read(self) -> None:
        trainer, widths = _read(*self._parts)
        if not trainer.is_current():
            raise RuntimeError("TrainStep: model, criterion or optimizer changed while being read")
        self._trainer: Any = graphed(trainer, widths)
        self._step = self._trainer.step

    def __getstate__(self) -> dict[str, Any]:
        return {"_parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The parts may be half made yet: a model may hold its own TrainStep.
        self.__dict__.update(state)
        self._trainer = _Unread()
        self._step = self._trainer.step

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        """One step; returns the loss [] of before the update, detached, finite or not.

        input [M, K], of the parameters' dtype and device; target as the output [M, N], in which
        nn.CrossEntropyLoss takes probabilities, or its classes [M] of int64.

        Raises, with nothing changed, TypeError, ValueError, IndexError or RuntimeError for another
        shape, dtype or device, for a class that does not exist, for outputs or targets of
        nn.BCELoss that are no probabilities, and where input or target requires a gradient or has a
        tangent, nothing learns, or torch's global state asks for what a step does not do: no_grad,
        inference_mode, autocast, anomaly detection, saved-tensor hooks, a torch.func transform, a
        torch function mode (docs/train-step.md has them all).
        """
        try:
            while (loss := self._step(input, target)) is None:
                self._read()
        except CAUGHT as error:
            self._explain(error, input, target)
            raise
        return loss

    def fit(
        self,
        input: Tensor,
        target: Tensor,
        epochs: int = 50,
        batch_size: int | None = None,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Train for `epochs` passes over the rows of input [n, K] and target [n, ...].

        The same steps, in the same order, as

            order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
            for rows in order.split(batch_size or n):
                step(input[rows], target[rows])

        in each epoch; the last batch may be short. No rows, no steps. The settings of the optimizer
        are read once, at the start. progress shows a bar, or plain text without tqdm, where stderr
        is a terminal.

        Returns the losses [epochs] on the CPU, of the input's dtype, float32 at least: of each
        epoch the mean over its rows of their batch's loss, or with the reduction "sum" the sum.

        Raises as a step does. Ctrl-C raises KeyboardInterrupt within 50 ms or a step; then, as
        after any other error on the way, all is as the last finished step left it.
        """
        _check_fit(input, target, shuffle, generator)
        rows = max(1, len(input))
        epochs = _count("epochs", epochs)
        batch_size = rows if batch_size is None else min(_count("batch_size", batch_size), rows)
        with _progress(epochs) if progress else nullcontext() as after_epoch:
            options = (epochs, batch_size, shuffle, generator, after_epoch)
            try:
                while (losses := self._trainer.fit(input, target, *options)) is None:
                    self._read()
            except CAUGHT as error:
                self._explain(error, input, target)
                raise
        dtype = torch.promote_types(input.dtype, torch.float32)
        return torch.tensor(losses, dtype=dtype, device="cpu")

    def _explain(self, error: Exception, input: Any, target: Any) -> None:
        """Raises `error` in words of TrainStep; returns if it speaks for itself."""
        check_tensor("TrainStep", "input", input)
        check_tensor("TrainStep", "target", target)
        if str(error).startswith("TrainStep"):
            return
        model, criterion, _ = self._parts
        reading = _Reading()
        _read_module("model", model, reading)
        first, last = (reading.layers[place].parameters[0] for place in (0, -1))
        check_input("TrainStep", input, first, rows="M")
        check_target("TrainStep", LOSSES[type(criterion)], input, target, last)
        message = str(error)
        if "a momentum buffer must be" in message and "to match" in message:  # after model.to()
            advice = "call optimizer.load_state_dict(optimizer.state_dict())"
            error = type(error)(f"{message}; {advice}")
        rename(error, "TrainStep")


class _Unread:
    """Stands for a Trainer until the first call of a copy: not current, so the parts are read."""

    def step(self, input: Tensor, target: Tensor) -> None:
        return None

    def fit(self, *arguments: Any) -> None:
        return None


def _refuse(error: type[Exception], what: str, instead: str = INSTEAD) -> NoReturn:
    raise error(f"TrainStep: {what}; {instead}")


@dataclass
class _Layer:
    path: str
    parameters: list[nn.Parameter]  # weight, and bias if it has one
    activation: str | None


@dataclass
class _Reading:
    """What was read so far, and what must stay so."""

    layers: list[_Layer] = field(default_factory=list)
    watched: list[tuple[Any, Any, object]] = field(default_factory=list)
    sizes: list[tuple[Any, int]] = field(default_factory=list)
    types: list[tuple[object, type]] = field(default_factory=list)

    def watch(self, container: dict[Any, Any] | list[Any], keys: Iterable[Any]) -> None:
        self.watched += [(container, key, container[key]) for key in keys]

    def watch_size(self, container: dict[Any, Any] | list[Any]) -> None:
        self.sizes.append((container, len(container)))


def _read(
    model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[_C.Trainer, list[int]]:
    """The Trainer, and the widths of the model, input first."""
    reading = _Reading()
    _read_module("model", model, reading)
    if not reading.layers:
        _refuse(TypeError, "model has no Linear")
    loss = _read_criterion(criterion, reading)
    parameters = [p for layer in reading.layers for p in layer.parameters]
    groups = _read_optimizer(optimizer, parameters, reading)
    activations = [layer.activation or "identity" for layer in reading.layers]
    watch = _C.Guards(reading.watched, reading.sizes, reading.types)
    weights = [layer.parameters[0] for layer in reading.layers]
    widths = [weights[0].shape[-1], *(weight.shape[0] for weight in weights)]
    return _C.Trainer(parameters, groups, activations, *loss, optimizer, watch), widths


# Of a module or an optimizer: what is called beside its own code, and what replaces that code.
_MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_GLOBAL_HOOKS: dict[str, Any] = {
    "forward pre": nn_module._global_forward_pre_hooks,
    "forward": nn_module._global_forward_hooks,
    "backward pre": nn_module._global_backward_pre_hooks,
    "backward": nn_module._global_backward_hooks,
    "optimizer pre": optim_optimizer._global_optimizer_pre_hooks,
    "optimizer post": optim_optimizer._global_optimizer_post_hooks,
}


def _check_code(path: str, thing: object, hooks: Iterable[str], reading: _Reading) -> None:
    """That `thing` runs as its class says."""
    own = vars(thing)
    reading.types.append((thing, type(thing)))
    for name in hooks:
        if own[name]:
            _refuse(ValueError, f"{path} has {name.strip('_').replace('_', ' ')}")
        reading.watch_size(own[name])
    for name in MODULE_CODE if isinstance(thing, nn.Module) else ("step",):
        # A scheduler wraps optimizer.step, only to see whether it is called.
        if name in own and not hasattr(own[name], "_wrapped_by_lr_sched"):
            _refuse(ValueError, f"{path} has a {name} of its own")
    reading.watch_size(own)
    # A dict of children, Parameters or hooks may be replaced by another, as del model[0] does.
    reading.watch(own, [name for name, value in own.items() if isinstance(value, dict)])


def _is_chain(module: nn.Module) -> bool:
    """Whether it calls its children one after the other."""
    return chains(module) or chains(module, Sequential)


def _read_module(path: str, module: nn.Module, reading: _Reading) -> None:
    kind, layers = type(module), reading.layers
    activation = LinearAct.by_module.get(kind)
    holds_place = kind in (nn.Identity, FusedActivation)
    chain = isinstance(module, nn.Module) and _is_chain(module)
    if not (chain or kind in LINEARS or activation or holds_place):
        _refuse_module(path, module)
    _check_code(path, module, _MODULE_HOOKS, reading)
    if chain:
        reading.watch(module._modules, module._modules)
        reading.watch_size(module._modules)
        for key, child in module._modules.items():
            _read_module(f"{path}.{key}", child, reading)  # type: ignore[arg-type]
    elif kind in LINEARS:
        layers.append(_Layer(path, _read_parameters(path, module, reading), LINEARS[kind]))
    elif activation and not layers:
        _refuse(ValueError, f"{path}, a {kind.__name__}, comes before any Linear")
    elif activation and layers[-1].activation:
        what = f"{path}, a {kind.__name__}, follows another activation"
        _refuse(ValueError, what, "put an nn.Linear between them, or " + INSTEAD)
    elif activation:
        layers[-1].activation = activation.activation


def _refuse_class(path: str, part: object, arguments: str = "") -> None:
    if isinstance(part, type):
        what = f"{path} is the class {part.__name__}, not an instance of it"
        _refuse(TypeError, what, f"pass {part.__name__}({arguments})")


def _refuse_module(path: str, module: nn.Module) -> NoReturn:
    taken = [nn.Sequential, *LINEARS, *LinearAct.by_module, nn.Identity]
    names = ", ".join(kind.__name__ for kind in taken)
    _refuse_class(path, module)
    what = f"{path} is a {type_name(module)}, not exactly one of {names}"
    if isinstance(module, nn.Module):
        for inner in ("_orig_mod", "module"):  # of torch.compile; of DataParallel and others
            if inner in dict(module.named_children()):
                _refuse(TypeError, what, f"pass its .{inner}, or {INSTEAD}")
    _refuse(TypeError, what)


def _read_parameters(path: str, layer: nn.Module, reading: _Reading) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for name in ("weight", "bias"):
        p = layer._parameters.get(name)
        if p is None and name == "bias":
            continue
        where = f"{path}.{name}"
        if type(p) is not nn.Parameter:
            _refuse(TypeError, f"{where} is a {type_name(p)}, not exactly an nn.Parameter")
        if p.layout is not torch.strided or p.dtype not in DTYPES:
            allowed = ", ".join(str(dtype) for dtype in DTYPES)
            what = f"{where} is {p.dtype}, {p.layout}, not torch.strided of {allowed}"
            _refuse(ValueError, what)
        for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks):
            if hooks:
                _refuse(ValueError, f"{where} has hooks")
            if hooks is not None:
                reading.watch_size(hooks)
        first = next((q for other in reading.layers for q in other.parameters), p)
        if (p.dtype, p.device) != (first.dtype, first.device):
            what = f"{where} is {p.dtype} on {p.device}, others {first.dtype} on {first.device}"
            _refuse(ValueError, what, "move them with model.to()")
        for other in reading.layers:
            if any(p is q or p.data_ptr() == q.data_ptr() != 0 for q in other.parameters):
                _refuse(ValueError, f"{where} is shared with {other.path}")
        found.append(p)
    reading.watch(layer._parameters, layer._parameters)
    reading.watch_size(layer._parameters)
    return found


def _read_criterion(
    criterion: nn.Module, reading: _Reading
) -> tuple[str, str, Tensor | None, int, float]:
    """The arguments of Trainer from loss to label_smoothing."""
    _refuse_class("criterion", criterion)
    if type(criterion) not in LOSSES:
        names = ", ".join(f"nn.{kind.__name__}" for kind in LOSSES)
        what = f"criterion is a {type_name(criterion)}, not exactly one of {names}"
        _refuse(TypeError, what, "use one of these, or the eager loop")
    _check_code("criterion", criterion, _MODULE_HOOKS, reading)
    if criterion.reduction not in ("mean", "sum"):
        what = f"criterion has the reduction {criterion.reduction!r}"
        _refuse(ValueError, what, "use mean or sum, or the eager loop")
    loss = LOSSES[type(criterion)]
    own = vars(criterion)
    reading.watch(own, {"reduction", "ignore_index", "label_smoothing"} & own.keys())
    reading.watch(criterion._buffers, criterion._buffers)
    for name, value in criterion._buffers.items():  # weight, pos_weight
        if value is not None and loss != "cross_entropy":
            what = f"criterion has a {name}, which is supported for nn.CrossEntropyLoss alone"
            _refuse(ValueError, what, f"leave out {name}, or use the eager loop")
    weight = criterion._buffers.get("weight")
    ignore_index, label_smoothing = own.get("ignore_index", -100), own.get("label_smoothing", 0.0)
    return loss, own["reduction"], weight, ignore_index, label_smoothing


def _read_optimizer(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], reading: _Reading
) -> list[int]:
    """Of each parameter the place of its group, or -1."""
    _refuse_class("optimizer", optimizer, "model.parameters(), lr=...")
    if type(optimizer) is not torch.optim.SGD:
        what = f"optimizer is a {type_name(optimizer)}, not exactly a torch.optim.SGD"
        inner = getattr(optimizer, "optimizer", None)  # as Lightning's and accelerate's have it
        if type(inner) is torch.optim.SGD:
            _refuse(TypeError, what, f"pass its .optimizer, or {INSTEAD}")
        _refuse(TypeError, what, f"use torch.optim.SGD, or {INSTEAD[4:]}")
    _check_code("optimizer", optimizer, _OPTIMIZER_HOOKS, reading)
    for name, hooks in _GLOBAL_HOOKS.items():
        if hooks:
            what = f"there are global {name} hooks, as FlopCounterMode sets them"
            _refuse(ValueError, what, f"remove them, or {INSTEAD}")
        reading.watch_size(hooks)
    places: dict[int, int] = {}
    groups = optimizer.param_groups
    if not isinstance(groups, list):
        what = f"optimizer.param_groups is a {type_name(groups)}"
        _refuse(TypeError, what, "make it a list, as torch.optim.SGD does")
    reading.watch(vars(optimizer), ["param_groups"])
    reading.watch(groups, range(len(groups)))
    reading.watch_size(groups)
    for place, group in enumerate(groups):
        if not isinstance(group["params"], list):
            what = f"optimizer.param_groups[{place}]['params'] is a {type_name(group['params'])}"
            _refuse(TypeError, what, "make it a list, as torch.optim.SGD does")
        if group["differentiable"]:
            _refuse(ValueError, f"optimizer.param_groups[{place}] is differentiable")
        reading.watch(group, ["params", "differentiable"])
        reading.watch(group["params"], range(len(group["params"])))
        reading.watch_size(group["params"])
        places.update((id(p), place) for p in group["params"])
    found = [places.get(id(p), -1) for p in parameters]
    if max(found) < 0:
        what = "optimizer has none of the model's parameters"
        _refuse(ValueError, what, "make it with model.parameters()")
    return found


def _check_fit(
    input: Tensor, target: Tensor, shuffle: bool, generator: torch.Generator | None
) -> None:
    def check(name: str, value: object, fits: bool, what: str) -> None:
        if not fits:
            raise TypeError(f"TrainStep.fit: {name} must be {what}, got {kind(value)}")

    for name, tensor in (("input", input), ("target", target)):
        check_tensor("TrainStep.fit", name, tensor)
        if tensor.dim() == 0:
            raise ValueError(f"TrainStep.fit: {name} must have rows, got a tensor of no dimension")
    if len(input) != len(target):
        rows = f"input has {len(input)} rows, target {len(target)}"
        raise ValueError(f"TrainStep.fit: {rows}")
    check("shuffle", shuffle, isinstance(shuffle, bool), "True or False")
    if generator is not None:
        fits = isinstance(generator, torch.Generator)
        check("generator", generator, fits, "a torch.Generator or None")
        if generator.device.type != "cpu":
            what = f"generator must be on the cpu, as for torch.randperm, got {generator.device}"
            raise ValueError(f"TrainStep.fit: {what}")


def _count(name: str, value: Any) -> int:
    """An int from 1 on, also one of numpy."""
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        what = f"{name} must be an int, got {kind(value)}"
        raise TypeError(f"TrainStep.fit: {what}")
    if not 1 <= count < 2**63:
        raise ValueError(f"TrainStep.fit: {name} must be from 1 to {2**63 - 1}, got {count}")
    return count


AfterEpoch = Callable[[int, float], None]


@contextmanager
def _progress(epochs: int) -> Iterator[AfterEpoch | None]:
    """What is told each epoch and its loss, to show them; None where nobody would see it."""
    if not sys.stderr.isatty():
        yield None
    elif find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(total=epochs, unit="epoch") as bar:

            def show(epoch: int, loss: float) -> None:
                bar.set_postfix_str(f"loss: {loss:.4f}", refresh=False)
                bar.update()

            yield show
    else:
        shown = 0.0

        def write(epoch: int, loss: float) -> None:
            nonlocal shown
            if epoch + 1 == epochs or time.monotonic() - shown > 0.1:
                shown = time.monotonic()
                print(f"\repoch: {epoch} loss: {loss:.4f}", end="", file=sys.stderr, flush=True)

        try:
            yield write
        finally:
            print(file=sys.stderr)
