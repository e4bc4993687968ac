"""Reads model, criterion and optimizer into a Trainer, and checks that TrainStep supports them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.optim import optimizer as optim_optimizer

from mlp_ext import _C
from mlp_ext.calls import called_in_turn
from mlp_ext.errors import as_float, kind
from mlp_ext.fuse import chains
from mlp_ext.nn import (
    DTYPES,
    MODULE_CODE,
    Activation,
    LinearAct,
    activation_of,
    option_items,
    type_name,
)


class Loss(NamedTuple):
    name: str  # in csrc/math/losses.h
    weight: str | None  # the buffer that is its loss_weight
    promotes: bool  # as torch: a float64 target makes the loss of a float32 model float64
    function: Callable[..., Tensor]


LOSSES: dict[type[nn.Module], Loss] = {
    nn.MSELoss: Loss("mse", None, True, F.mse_loss),
    nn.BCELoss: Loss("bce", None, False, F.binary_cross_entropy),
    nn.BCEWithLogitsLoss: Loss(
        "bce_with_logits", "pos_weight", True, F.binary_cross_entropy_with_logits
    ),
    nn.L1Loss: Loss("l1", None, True, F.l1_loss),
    nn.SmoothL1Loss: Loss("smooth_l1", None, True, F.smooth_l1_loss),
    nn.HuberLoss: Loss("huber", None, False, F.huber_loss),
    nn.CrossEntropyLoss: Loss("cross_entropy", "weight", True, F.cross_entropy),
    nn.NLLLoss: Loss("nll", "weight", False, F.nll_loss),
}
# Each optimizer's name in csrc/math/optimizers.h, and values for settings that older versions of
# torch lack, if they differ from the defaults there.
OPTIMIZERS: dict[type[torch.optim.Optimizer], tuple[str, dict[str, float]]] = {
    torch.optim.SGD: ("sgd", {}),
    torch.optim.Adam: ("adam", {}),
    torch.optim.AdamW: ("adam", {"decoupled_weight_decay": 1.0}),
    torch.optim.RMSprop: ("rmsprop", {}),
    torch.optim.Adagrad: ("adagrad", {}),
}
LINEARS: list[type[nn.Module]] = [nn.Linear, *LinearAct.by_module.values()]
INSTEAD = "use the eager loop, with mlp_ext.fuse(model)"


def _refuse(error: type[Exception], what: str, instead: str = INSTEAD) -> NoReturn:
    raise error(f"TrainStep: {what}; {instead}")


@contextmanager
def _read_as(part: str) -> Iterator[None]:
    """Says which part is broken, as one whose attributes were deleted."""
    try:
        yield
    except Exception as error:
        if str(error).startswith("TrainStep: "):
            raise
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        known = TypeError if isinstance(error, TypeError) else ValueError
        raise known(f"TrainStep: {part} cannot be read: {what}") from error


@dataclass
class _Layer:
    path: str
    module: nn.Module
    parameters: list[nn.Parameter]  # weight, and bias if it has one
    activation: Activation | None


@dataclass
class Reading:
    """The layers read so far, and the guards on everything read."""

    layers: list[_Layer] = field(default_factory=list)
    flattened: list[tuple[int, int]] = field(default_factory=list)  # dimensions, of the input
    dropout: dict[int, float] = field(default_factory=dict)  # of the input of the layer of an index
    average: Callable[[Tensor], None] | None = None  # over a process group
    items: list[tuple[Any, Any, object]] = field(default_factory=list)
    sizes: list[tuple[Any, int]] = field(default_factory=list)
    types: list[tuple[object, type]] = field(default_factory=list)
    forwards: list[tuple[object, str, object]] = field(default_factory=list)  # of users' classes

    def guard(self, container: dict[Any, Any] | list[Any], keys: Iterable[Any]) -> None:
        self.items += [(container, key, container[key]) for key in keys]

    def guard_size(self, container: dict[Any, Any] | list[Any]) -> None:
        self.sizes.append((container, len(container)))


class Read(NamedTuple):
    trainer: _C.Trainer
    widths: list[int] | None  # the model's, input first, if its steps can be captured as graphs
    reading: Reading


def read(
    model: nn.Module, criterion: Any, optimizer: torch.optim.Optimizer, gradients: Any = None
) -> Read:
    reading = read_model(model)
    with _read_as("criterion"):
        loss = _read_criterion(criterion, reading)
    parameters = [p for layer in reading.layers for p in layer.parameters]
    with _read_as("optimizer"):
        groups = _read_optimizer(optimizer, parameters, reading)
    activations = [layer.activation or Activation("identity") for layer in reading.layers]
    dropout = [reading.dropout.get(index, 0.0) for index in range(len(reading.layers) + 1)]
    trainer = _C.Trainer(
        parameters,
        groups,
        [activation.name for activation in activations],
        [number for activation in activations for number in activation.parameters],
        dropout if any(dropout) else [],
        reading.flattened,
        *loss,
        optimizer,
        *OPTIMIZERS[type(optimizer)],
        _C.Guards(reading.items, reading.sizes, reading.types, [], reading.forwards),
        gradients or _C.Gradients(None, 1),
        reading.average,
    )
    weights = [layer.parameters[0] for layer in reading.layers]
    widths = [weights[0].shape[-1], *(weight.shape[0] for weight in weights)]
    return Read(trainer, None if any(dropout) or trainer.by_gradients() else widths, reading)


def read_model(model: nn.Module) -> Reading:
    reading = Reading()
    with _read_as("model"):
        if type(model) is DistributedDataParallel:
            _read_data_parallel(model, reading)
            _read_module("model.module", model.module, reading)
        else:
            _read_module("model", model, reading)
    if not reading.layers:
        _refuse(TypeError, "model has no Linear")
    return reading


# Attributes with hooks of a module or an optimizer, and torch's global hooks.
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


def _check_own_code(path: str, thing: object) -> None:
    for name in MODULE_CODE if isinstance(thing, nn.Module) else ("step",):
        own: Any = vars(thing).get(name)
        # LR schedulers wrap the class's step only to see whether it is called.
        is_wrapper = getattr(own, "__globals__", None) is vars(lr_scheduler)
        is_unchanged = is_wrapper and own.__wrapped__ is getattr(type(thing), name)
        if own is not None and not is_unchanged:
            _refuse(ValueError, f"{path} has a {name} of its own")


def _check_code(path: str, thing: object, hooks: Iterable[str], reading: Reading) -> None:
    """Refuses hooks and instance attributes that change what the class does; guards the rest."""
    own = vars(thing)
    reading.types.append((thing, type(thing)))
    for name in hooks:
        if own[name]:
            _refuse(ValueError, f"{path} has {name.strip('_').replace('_', ' ')}")
        reading.guard_size(own[name])
    _check_own_code(path, thing)
    reading.guard_size(own)
    # The dicts of children, Parameters or hooks may be replaced, as by del model[0].
    reading.guard(own, [name for name, value in own.items() if isinstance(value, dict)])


def _children(module: nn.Module) -> list[str] | None:
    """The children that a module calls one after another; None if it may do something else."""
    if not isinstance(module, nn.Module):
        return None
    return list(module._modules) if chains(module) else called_in_turn(module)


def _read_module(path: str, module: nn.Module, reading: Reading) -> None:
    kind, layers = type(module), reading.layers
    if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in kind.__mro__):
        what = f"{path} is sharded by FSDP, and a step needs whole parameters"
        _refuse(TypeError, what, "use DistributedDataParallel, or " + INSTEAD[4:])
    is_activation = kind in LinearAct.by_module
    is_known = is_activation or kind in LINEARS or kind in _OTHERS
    children = None if is_known else _children(module)
    if not is_known and children is None:
        _refuse_module(path, module)
    _check_code(path, module, _MODULE_HOOKS, reading)
    reading.items += [(vars(module), name, value) for name, value in option_items(module)]
    if children is not None:
        if not chains(module):
            reading.forwards.append((module, "forward", kind.forward))
        reading.guard(module._modules, module._modules)
        reading.guard_size(module._modules)
        for key in children:
            _read_module(f"{path}.{key}", module._modules[key], reading)  # type: ignore[arg-type]
    elif kind is nn.Flatten:
        _read_flatten(path, module, reading)
    elif kind is nn.Dropout:
        _read_dropout(path, module, reading)
    elif kind in LINEARS:
        activation = module.read() if isinstance(module, LinearAct) else None
        layers.append(_Layer(path, module, _read_parameters(path, module, reading), activation))
    elif is_activation and not layers:
        _refuse(ValueError, f"{path}, a {kind.__name__}, comes before any Linear")
    elif is_activation and len(layers) in reading.dropout:
        what = f"{path}, a {kind.__name__}, follows a Dropout"
        _refuse(ValueError, what, "put the activation before it, or " + INSTEAD)
    elif is_activation and layers[-1].activation:
        what = f"{path}, a {kind.__name__}, follows another activation"
        _refuse(ValueError, what, "put an nn.Linear between them, or " + INSTEAD)
    elif is_activation:
        layers[-1].activation = activation_of(module)
        if not layers[-1].activation:
            _refuse(ValueError, f"{path}, {module}, has an option that is not supported")


_OTHERS = (nn.Identity, nn.Flatten, nn.Dropout)


def _read_flatten(path: str, module: Any, reading: Reading) -> None:
    if reading.layers or reading.dropout:
        _refuse(
            ValueError,
            f"{path}, a Flatten, comes after other layers",
            "put it first, or " + INSTEAD,
        )
    if not all(isinstance(d, int) and -64 < d < 64 for d in (module.start_dim, module.end_dim)):
        _refuse(ValueError, f"{path}, {module}, has dimensions that no tensor has")
    if module.start_dim < 1:
        _refuse(ValueError, f"{path}, {module}, flattens the batch", INSTEAD)
    reading.guard(vars(module), ["start_dim", "end_dim"])
    reading.flattened.append((module.start_dim, module.end_dim))


def _read_dropout(path: str, module: Any, reading: Reading) -> None:
    index = len(reading.layers)
    reading.guard(vars(module), ["training", "p", "inplace"])
    if not module.training or module.p == 0:
        return
    if index in reading.dropout:
        _refuse(
            ValueError, f"{path}, a Dropout, follows another Dropout", "keep one, or " + INSTEAD
        )
    if module.inplace and index == 0:
        _refuse(ValueError, f"{path}, a Dropout, changes the input in place")
    reading.dropout[index] = float(module.p)


def _read_data_parallel(model: DistributedDataParallel, reading: Reading) -> None:
    """A step averages gradients as DDP does; refuses DDP's other features, such as no_sync()."""
    _check_code("model", model, _MODULE_HOOKS, reading)
    own = vars(model)
    settings = {
        "is in no_sync()": not model.require_backward_grad_sync,
        "is in join()": model._join_config.enable,
        "has communication hooks": bool(model._comm_hooks),
        "has mixed_precision": model.mixed_precision is not None,
        "has parameters to ignore": bool(model.parameters_to_ignore),
    }
    for what, is_set in settings.items():
        if is_set:
            instead = f"use TrainStep(..., accumulate=n), or {INSTEAD[4:]}"
            _refuse(ValueError, f"model {what}", instead if "no_sync" in what else INSTEAD)
    names = ("require_backward_grad_sync", "_join_config", "mixed_precision", "process_group")
    reading.guard(own, names)
    reading.guard(model._modules, ["module"])
    reading.guard_size(model._comm_hooks)
    reading.average = partial(average, model.process_group)


def average(group: Any, gradients: Tensor) -> None:
    """What DDP does with its buckets, for all gradients at once."""
    gradients.div_(group.size())
    torch.distributed.all_reduce(gradients, group=group)


def _refuse_class(path: str, part: object, arguments: str = "") -> None:
    if isinstance(part, type):
        what = f"{path} is the class {part.__name__}, not an instance of it"
        _refuse(TypeError, what, f"pass {part.__name__}({arguments})")


def _refuse_module(path: str, module: nn.Module) -> NoReturn:
    _refuse_class(path, module)
    what = f"{path} is a {type_name(module)}, which a step does not support"
    if isinstance(module, nn.Module):
        for inner in ("_orig_mod", "module"):  # of torch.compile; of DataParallel and others
            if inner in dict(module.named_children()):
                _refuse(TypeError, what, f"pass its .{inner}, or {INSTEAD}")
        _check_own_code(path, module)
    _refuse(TypeError, what)


def _read_parameters(path: str, layer: nn.Module, reading: Reading) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for name in ("weight", "bias"):
        where = f"{path}.{name}"
        if name not in layer._parameters:
            _refuse(TypeError, f"{where} is not a parameter")
        p = layer._parameters[name]
        if p is None and name == "bias":
            continue
        if type(p) is not nn.Parameter:
            _refuse(TypeError, f"{where} is a {type_name(p)}, not exactly an nn.Parameter")
        if p.layout is not torch.strided or p.dtype not in DTYPES:
            allowed = ", ".join(str(dtype) for dtype in DTYPES)
            what = f"{where} is {p.dtype}, {p.layout}, not torch.strided of {allowed}"
            _refuse(ValueError, what)
        if p.dim() != (2 if name == "weight" else 1):
            shape = "[N, K]" if name == "weight" else "[N]"
            _refuse(ValueError, f"{where} is {list(p.shape)}, not {shape}")
        for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks):
            if hooks:
                _refuse(ValueError, f"{where} has hooks")
            if hooks is not None:
                reading.guard_size(hooks)
        first = next((q for other in reading.layers for q in other.parameters), p)
        if (p.dtype, p.device) != (first.dtype, first.device):
            what = f"{where} is {p.dtype} on {p.device}, others {first.dtype} on {first.device}"
            _refuse(ValueError, what, "move them with model.to()")
        for other in reading.layers:
            if any(p is q or p.data_ptr() == q.data_ptr() != 0 for q in other.parameters):
                _refuse(ValueError, f"{where} is shared with {other.path}")
        found.append(p)
    reading.guard(layer._parameters, layer._parameters)
    reading.guard_size(layer._parameters)
    return found


def criterion_module(criterion: Any, reading: Reading) -> Any:
    """The criterion, or the module like a function of torch.nn.functional or a partial of one."""
    function, keywords = criterion, {}
    if type(criterion) is partial and not criterion.args:
        function, keywords = criterion.func, criterion.keywords
    for module, loss in LOSSES.items():
        if function is not loss.function:
            continue
        known = ["reduction", *_C.losses()[loss.name], *([loss.weight] if loss.weight else [])]
        for name in keywords:
            if name not in known:
                what = f"criterion has the keyword {name}, which is not supported for"
                instead = f"leave out {name}, or use the eager loop"
                _refuse(ValueError, f"{what} {function.__name__}", instead)
        reading.guard(keywords, keywords)
        reading.guard_size(keywords)
        return module(**keywords)
    return criterion


def _read_criterion(
    criterion: Any, reading: Reading
) -> tuple[str, str, Tensor | None, list[float], bool]:
    """Trainer's arguments from loss to promotes."""
    _refuse_class("criterion", criterion)
    criterion = criterion_module(criterion, reading)
    if type(criterion) not in LOSSES:
        names = ", ".join(f"nn.{kind.__name__}" for kind in LOSSES)
        what = f"criterion is a {type_name(criterion)}, not exactly one of {names}"
        _refuse(TypeError, what, "use one of these or its function, or the eager loop")
    _check_code("criterion", criterion, _MODULE_HOOKS, reading)
    if criterion.reduction not in ("mean", "sum"):
        what = f"criterion has the reduction {kind(criterion.reduction)}"
        _refuse(ValueError, what, "use mean or sum, or the eager loop")
    loss, weight, promotes, _ = LOSSES[type(criterion)]
    for name, value in criterion._buffers.items():
        if value is not None and name != weight:
            what = f"criterion has a {name}, which is not supported for {type(criterion).__name__}"
            _refuse(ValueError, what, f"leave out {name}, or use the eager loop")
    own, parameters = vars(criterion), list(_C.losses()[loss])
    reading.guard(own, ["reduction", *parameters])
    reading.guard(criterion._buffers, criterion._buffers)
    numbers = [as_float(own[name]) for name in parameters]
    for name, number in zip(parameters, numbers, strict=True):
        value, is_index = own[name], name == "ignore_index"
        # The operators take a double, which has each int to 2^53.
        if number is None or (is_index and (type(value) is not int or int(number) != value)):
            instead = f"make it {'an int to 2**53' if is_index else 'a number'}"
            _refuse(TypeError, f"criterion has the {name} {kind(value)}", instead)
    buffer = criterion._buffers[weight] if weight else None
    return loss, own["reduction"], buffer, numbers, promotes  # type: ignore[return-value]


def _read_optimizer(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], reading: Reading
) -> list[int]:
    """The index of each parameter's group, or -1."""
    _refuse_class("optimizer", optimizer, "model.parameters(), lr=...")
    if type(optimizer) not in OPTIMIZERS:
        names = ", ".join(f"torch.optim.{kind.__name__}" for kind in OPTIMIZERS)
        what = f"optimizer is a {type_name(optimizer)}, not exactly one of {names}"
        inner = getattr(optimizer, "optimizer", None)  # of Lightning's and accelerate's wrappers
        if type(inner) in OPTIMIZERS:
            _refuse(TypeError, what, f"pass its .optimizer, or {INSTEAD}")
        _refuse(TypeError, what, f"use one of these, or {INSTEAD[4:]}")
    _check_code("optimizer", optimizer, _OPTIMIZER_HOOKS, reading)
    for name, hooks in _GLOBAL_HOOKS.items():
        if hooks:
            what = f"there are global {name} hooks, as FlopCounterMode sets them"
            _refuse(ValueError, what, f"remove them, or {INSTEAD}")
        reading.guard_size(hooks)
    indices: dict[int, int] = {}
    groups = optimizer.param_groups
    if not isinstance(groups, list):
        what = f"optimizer.param_groups is a {type_name(groups)}"
        _refuse(TypeError, what, "make it a list, as torch.optim does")
    own = vars(optimizer)
    reading.guard(own, ["param_groups", *({"step"} & own.keys())])
    reading.guard(groups, range(len(groups)))
    reading.guard_size(groups)
    for index, group in enumerate(groups):
        if not isinstance(group, dict):
            what = f"optimizer.param_groups[{index}] is a {type_name(group)}"
            _refuse(TypeError, what, "make it a dict, as torch.optim does")
        if not isinstance(group["params"], list):
            what = f"optimizer.param_groups[{index}]['params'] is a {type_name(group['params'])}"
            _refuse(TypeError, what, "make it a list, as torch.optim does")
        for option in ("differentiable", "capturable"):
            if group.get(option):
                _refuse(ValueError, f"optimizer.param_groups[{index}] is {option}")
        reading.guard(group, ["params", *({"differentiable", "capturable"} & group.keys())])
        reading.guard(group["params"], range(len(group["params"])))
        reading.guard_size(group["params"])
        for p in group["params"]:
            if id(p) in indices and any(p is known for known in parameters):
                what = f"optimizer.param_groups[{index}]['params'] has a parameter again"
                _refuse(ValueError, what, "make the optimizer with each parameter once")
            indices[id(p)] = index
    found = [indices.get(id(p), -1) for p in parameters]
    if max(found) < 0:
        what = "optimizer has none of the model's parameters"
        _refuse(ValueError, what, "make it with model.parameters()")
    return found
