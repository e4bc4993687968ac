"""What TrainStep does not take: each an error that names it and what to use instead."""

import functools
import re
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from steps import Training, training
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

import mlp_ext
from mlp_ext import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")

LOOP = "use the eager loop, with mlp_ext.fuse(model)"
TAKEN = f"which a step does not support; {LOOP}"
OWN = __name__


class MyLinear(nn.Linear):
    pass


class MySequential(nn.Sequential):
    def forward(self, input):
        return super().forward(input)


class MyLoss(nn.MSELoss):
    pass


class MySGD(torch.optim.SGD):
    pass


def hook(*_: object) -> None:
    pass


def sequential(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), *modules)


def hooked(method: str, place: str = "0") -> nn.Sequential:
    model = sequential(nn.ReLU())
    getattr(model.get_submodule(place), method)(hook)
    return model


def tied() -> nn.Sequential:
    model = sequential(nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def one_memory() -> nn.Sequential:
    model = sequential(nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    return model


def used_twice() -> nn.Sequential:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


def hooked_parameter(method: str) -> nn.Sequential:
    model = sequential()
    getattr(model[0].weight, method)(hook)
    return model


def special_parameter() -> nn.Sequential:
    class Special(nn.Parameter):
        pass

    model = sequential()
    model[0].weight = Special(torch.zeros(4, 4))
    return model


def with_code_of_its_own(place: str) -> nn.Sequential:
    model = sequential(nn.ReLU())
    module = model.get_submodule(place)
    module.forward = type(module).forward
    return model


def compiled_inside() -> nn.Sequential:
    model = sequential()
    model.compile()
    return model


MODELS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "dropout": (
        lambda: sequential(nn.AlphaDropout()),
        TypeError,
        f"model.1 is a torch.nn.modules.dropout.AlphaDropout, {TAKEN}",
    ),
    "batch norm": (
        lambda: sequential(nn.Sequential(nn.BatchNorm1d(4))),
        TypeError,
        f"model.1.0 is a torch.nn.modules.batchnorm.BatchNorm1d, {TAKEN}",
    ),
    "unflatten": (
        lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(4, 4)),
        TypeError,
        f"model.0 is a torch.nn.modules.flatten.Unflatten, {TAKEN}",
    ),
    "other activation": (
        lambda: sequential(nn.Softsign()),
        TypeError,
        f"model.1 is a torch.nn.modules.activation.Softsign, {TAKEN}",
    ),
    "option of an activation": (
        lambda: sequential(nn.ELU(alpha="1")),
        ValueError,
        f"model.1, ELU(alpha=1), has an option that is not supported; {LOOP}",
    ),
    "own linear": (lambda: MyLinear(4, 4), TypeError, f"model is a {OWN}.MyLinear, {TAKEN}"),
    "own sequential": (
        lambda: MySequential(nn.Linear(4, 4)),
        TypeError,
        f"model is a {OWN}.MySequential, {TAKEN}",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(4)),
        TypeError,
        f"model.0 is a torch.nn.modules.linear.LazyLinear, {TAKEN}",
    ),
    "class": (
        lambda: nn.Linear,
        TypeError,
        "model is the class Linear, not an instance of it; pass Linear()",
    ),
    "no module": (lambda: torch.relu, TypeError, "model is a builtins.builtin_function_or_method"),
    "compiled": (
        lambda: torch.compile(sequential()),
        TypeError,
        f"{TAKEN.replace(LOOP, '')}pass its ._orig_mod, or {LOOP}",
    ),
    "data parallel": (
        lambda: nn.DataParallel(sequential()),
        TypeError,
        f"{TAKEN.replace(LOOP, '')}pass its .module, or {LOOP}",
    ),
    "compiled inside": (
        compiled_inside,
        ValueError,
        f"model has a _compiled_call_impl of its own; {LOOP}",
    ),
    "activation first": (
        lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 4)),
        ValueError,
        f"model.0, a ReLU, comes before any Linear; {LOOP}",
    ),
    "two activations": (
        lambda: sequential(nn.Tanh(), nn.Identity(), nn.ReLU()),
        ValueError,
        "model.3, a ReLU, follows another activation; put an nn.Linear between them, or " + LOOP,
    ),
    "two activations, one in a layer": (
        lambda: nn.Sequential(mlp_ext.LinearReLU(4, 4), nn.ReLU()),
        ValueError,
        "model.1, a ReLU, follows another activation; ",
    ),
    "no linear": (lambda: nn.Sequential(nn.Identity()), TypeError, f"model has no Linear; {LOOP}"),
    "empty": (lambda: nn.Sequential(), TypeError, f"model has no Linear; {LOOP}"),
    "tied": (tied, ValueError, f"model.1.weight is shared with model.0; {LOOP}"),
    "one memory": (one_memory, ValueError, f"model.1.weight is shared with model.0; {LOOP}"),
    "used twice": (used_twice, ValueError, f"model.2.weight is shared with model.0; {LOOP}"),
    "dtypes": (
        lambda: sequential(nn.Linear(4, 4).double()),
        ValueError,
        "model.1.weight is torch.float64 on cpu, others torch.float32 on cpu; move them with ",
    ),
    "devices": (
        lambda: sequential(nn.Linear(4, 4, device="meta")),
        ValueError,
        "model.1.weight is torch.float32 on meta, others torch.float32 on cpu; move them with ",
    ),
    "complex": (
        lambda: sequential().to(torch.complex64),
        ValueError,
        "model.0.weight is torch.complex64, torch.strided, not torch.strided of torch.float32, ",
    ),
    "special parameter": (
        special_parameter,
        TypeError,
        "Special, not exactly an nn.Parameter; " + LOOP,
    ),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4))),
        TypeError,
        f"model.0 is a torch.nn.utils.parametrize.ParametrizedLinear, {TAKEN}",
    ),
    "pruned": (
        lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)),
        ValueError,
        f"model.0 has forward pre hooks; {LOOP}",
    ),
    "hook of an activation": (
        lambda: hooked("register_forward_hook", "1"),
        ValueError,
        f"model.1 has forward hooks; {LOOP}",
    ),
    "hook of a sequential": (
        lambda: hooked("register_forward_pre_hook", ""),
        ValueError,
        f"model has forward pre hooks; {LOOP}",
    ),
    "backward hook": (
        lambda: hooked("register_full_backward_hook"),
        ValueError,
        f"model.0 has backward hooks; {LOOP}",
    ),
    "backward pre hook": (
        lambda: hooked("register_full_backward_pre_hook"),
        ValueError,
        f"model.0 has backward pre hooks; {LOOP}",
    ),
    "hook of a parameter": (
        lambda: hooked_parameter("register_hook"),
        ValueError,
        f"model.0.weight has hooks; {LOOP}",
    ),
    "hook of a gradient": (
        lambda: hooked_parameter("register_post_accumulate_grad_hook"),
        ValueError,
        f"model.0.weight has hooks; {LOOP}",
    ),
    "own forward": (
        lambda: with_code_of_its_own("1"),
        ValueError,
        f"model.1 has a forward of its own; {LOOP}",
    ),
}


def fails(error: type[Exception], message: str, *parts: object) -> None:
    with pytest.raises(error, match="^TrainStep: .*" + re.escape(message)):
        TrainStep(*parts)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("name", MODELS)
def test_model_is_refused(name: str) -> None:
    make, error, message = MODELS[name]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    fails(error, message, make(), nn.MSELoss(), optimizer)


LOSSES = (
    "not exactly one of nn.MSELoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.L1Loss, nn.SmoothL1Loss, "
    "nn.HuberLoss, nn.CrossEntropyLoss, nn.NLLLoss; use one of these or its function, or the eager "
    "loop"
)
CRITERIA: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "other": (
        nn.KLDivLoss,
        TypeError,
        f"criterion is a torch.nn.modules.loss.KLDivLoss, {LOSSES}",
    ),
    "own": (MyLoss, TypeError, f"criterion is a {OWN}.MyLoss, {LOSSES}"),
    "function": (
        lambda: nn.functional.kl_div,
        TypeError,
        f"criterion is a builtins.function, {LOSSES}",
    ),
    "none": (
        lambda: nn.MSELoss(reduction="none"),
        ValueError,
        "criterion has the reduction 'none'; use mean or sum, or the eager loop",
    ),
    "bce weight": (
        lambda: nn.BCELoss(torch.ones(4)),
        ValueError,
        "criterion has a weight, which is not supported for BCELoss; leave out weight, or use",
    ),
    "logits weight": (
        lambda: nn.BCEWithLogitsLoss(torch.ones(4)),
        ValueError,
        "criterion has a weight, which is not supported for BCEWithLogitsLoss; leave out weight",
    ),
    "smoothing": (
        lambda: nn.CrossEntropyLoss(label_smoothing="1"),
        TypeError,
        "criterion has the label_smoothing '1'; make it a number",
    ),
    "class": (
        lambda: nn.MSELoss,
        TypeError,
        "criterion is the class MSELoss, not an instance of it; pass MSELoss()",
    ),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_criterion_is_refused(name: str) -> None:
    make, error, message = CRITERIA[name]
    model = sequential()
    fails(error, message, model, make(), torch.optim.SGD(model.parameters()))


def test_criterion_with_a_hook_is_refused() -> None:
    model, criterion = sequential(), nn.MSELoss()
    criterion.register_forward_hook(hook)
    optimizer = torch.optim.SGD(model.parameters())
    fails(ValueError, f"criterion has forward hooks; {LOOP}", model, criterion, optimizer)


def hooked_optimizer(method: str) -> Callable[..., torch.optim.SGD]:
    def make(parameters) -> torch.optim.SGD:
        optimizer = torch.optim.SGD(parameters)
        getattr(optimizer, method)(hook)
        return optimizer

    return make


def replaced_step(parameters) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(parameters)
    optimizer.step = hook
    return optimizer


def replaced_then_scheduled(parameters) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(parameters)
    optimizer.step = MethodType(hook, optimizer)
    lr_scheduler.StepLR(optimizer, 100)
    return optimizer


def scheduled_then_replaced(parameters) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(parameters)
    lr_scheduler.StepLR(optimizer, 100)
    optimizer.step = functools.wraps(optimizer.step)(lambda: None)  # has the wrapper's attributes
    return optimizer


class Wrapped(torch.optim.Optimizer):
    """As Lightning and accelerate wrap one."""

    def __init__(self, parameters, kind=torch.optim.SGD) -> None:
        self.optimizer = kind(parameters)


TAKEN_OPTIMIZERS = (
    "not exactly one of torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, "
    "torch.optim.Adagrad"
)
OPTIMIZERS = {
    "wrapped": (
        Wrapped,
        TypeError,
        f"optimizer is a {OWN}.Wrapped, {TAKEN_OPTIMIZERS}; pass its .optimizer, or {LOOP}",
    ),
    "wrapped other": (
        lambda parameters: Wrapped(parameters, torch.optim.Adadelta),
        TypeError,
        f"optimizer is a {OWN}.Wrapped, {TAKEN_OPTIMIZERS}; use one of these, or {LOOP[4:]}",
    ),
    "class": (
        lambda parameters: torch.optim.SGD,
        TypeError,
        "optimizer is the class SGD, not an instance of it; pass SGD(model.parameters(), lr=...)",
    ),
    "other": (
        torch.optim.Adadelta,
        TypeError,
        f"optimizer is a torch.optim.adadelta.Adadelta, {TAKEN_OPTIMIZERS}; use one of these, or",
    ),
    "own": (MySGD, TypeError, f"optimizer is a {OWN}.MySGD, {TAKEN_OPTIMIZERS}; use"),
    "pre hook": (
        hooked_optimizer("register_step_pre_hook"),
        ValueError,
        f"optimizer has optimizer step pre hooks; {LOOP}",
    ),
    "post hook": (
        hooked_optimizer("register_step_post_hook"),
        ValueError,
        f"optimizer has optimizer step post hooks; {LOOP}",
    ),
    "own step": (replaced_step, ValueError, f"optimizer has a step of its own; {LOOP}"),
    "own, then a scheduler": (replaced_then_scheduled, ValueError, "optimizer has a step of its"),
    "own after a scheduler": (scheduled_then_replaced, ValueError, "optimizer has a step of its"),
    "differentiable": (
        lambda parameters: torch.optim.SGD(parameters, differentiable=True),
        ValueError,
        f"optimizer.param_groups[0] is differentiable; {LOOP}",
    ),
    "differentiable adam": (
        lambda parameters: torch.optim.AdamW(parameters, differentiable=True),
        ValueError,
        f"optimizer.param_groups[0] is differentiable; {LOOP}",
    ),
    "capturable": (
        lambda parameters: torch.optim.RMSprop(parameters, capturable=True),
        ValueError,
        f"optimizer.param_groups[0] is capturable; {LOOP}",
    ),
    "of another model": (
        lambda parameters: torch.optim.SGD(sequential().parameters()),
        ValueError,
        "optimizer has none of the model's parameters; make it with model.parameters()",
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_is_refused(name: str) -> None:
    make, error, message = OPTIMIZERS[name]
    model = sequential()
    fails(error, message, model, nn.MSELoss(), make(model.parameters()))


def test_global_hooks_are_refused() -> None:
    parts = training("10-5-1@10", "mse", "plain", torch.float32)[:3]
    register = {
        "forward": nn.modules.module.register_module_forward_hook,
        "forward pre": nn.modules.module.register_module_forward_pre_hook,
        "optimizer post": register_optimizer_step_post_hook,
    }
    for name, add in register.items():
        handle = add(hook)
        try:
            what = f"there are global {name} hooks, as FlopCounterMode sets them"
            fails(ValueError, f"{what}; remove them, or {LOOP}", *parts)
        finally:
            handle.remove()
    TrainStep(*parts)


# --- Between steps ---


def parametrize(part: Training) -> None:
    parametrizations.weight_norm(part.model[0])


CHANGES: dict[str, tuple[Callable[[Training], object], str]] = {
    "hook": (
        lambda part: part.model[0].register_forward_hook(hook),
        "model.0 has forward hooks",
    ),
    "hook of the criterion": (
        lambda part: part.criterion.register_forward_hook(hook),
        "criterion has forward hooks",
    ),
    "hook of the optimizer": (
        lambda part: part.optimizer.register_step_post_hook(hook),
        "optimizer has optimizer step post hooks",
    ),
    "hook of a parameter": (
        lambda part: part.model[0].weight.register_hook(hook),
        "model.0.weight has hooks",
    ),
    "layer": (
        lambda part: part.model.__setitem__(1, nn.LayerNorm(5)),
        "model.1 is a torch.nn.modules.normalization.LayerNorm",
    ),
    "appended": (
        lambda part: part.model.append(nn.LayerNorm(1)),
        "model.4 is a torch.nn.modules.norm",
    ),
    "parametrized": (parametrize, "model.0 is a torch.nn.utils.parametrize.ParametrizedLinear"),
    "reduction": (
        lambda part: setattr(part.criterion, "reduction", "none"),
        "criterion has the reduction 'none'",
    ),
    "own forward": (
        lambda part: setattr(part.model[1], "forward", torch.relu),
        "model.1 has a forward of its own",
    ),
    "own step": (
        lambda part: setattr(part.optimizer, "step", hook),
        "optimizer has a step of its own",
    ),
    "differentiable": (
        lambda part: part.optimizer.param_groups[0].update(differentiable=True),
        "optimizer.param_groups[0] is differentiable",
    ),
}


@pytest.mark.parametrize("fit", [False, True], ids=["step", "fit"])
@pytest.mark.parametrize("change", CHANGES)
def test_change_to_what_is_refused_is_seen(change: str, fit: bool) -> None:
    part = training("10-5-1@10", "mse", "momentum", torch.float32)
    step = TrainStep(*part[:3])
    call = step.fit if fit else step
    call(*part[3:])
    weight = part.model[0].weight
    before = weight.clone()
    make, message = CHANGES[change]
    make(part)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match="^TrainStep: " + re.escape(message)):
            call(*part[3:])
    assert torch.equal(weight, before)


def test_own_step_after_a_scheduler_is_seen() -> None:
    """The optimizer has as many attributes as before."""
    part = training("10-5-1@10", "mse", "momentum", torch.float32)
    for scheduler in (lr_scheduler.ConstantLR, lr_scheduler.LinearLR):
        scheduler(part.optimizer)
    step = TrainStep(*part[:3])
    step(*part[3:])
    part.optimizer.step = functools.wraps(part.optimizer.step)(lambda: None)
    with pytest.raises(ValueError, match="optimizer has a step of its own"):
        step(*part[3:])


def test_hooks_may_come_and_go() -> None:
    part = training("10-5-1@10", "mse", "momentum", torch.float32)
    step = TrainStep(*part[:3])
    weight = part.model[0].weight
    registrations = (
        part.model[0].register_forward_hook,
        weight.register_hook,
        weight.register_post_accumulate_grad_hook,
    )
    for register in registrations:
        handle = register(hook)
        with pytest.raises(ValueError, match="hooks"):
            step(*part[3:])
        handle.remove()
        step(*part[3:])
