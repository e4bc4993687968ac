"""What TrainStep does not take: each an error that names it and what to use instead."""

import re
from collections.abc import Callable

import pytest
import torch
from steps import Training, training
from torch import nn
from torch.nn.utils import parametrizations, prune
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


# --- At a step ---


AT_A_STEP: dict[str, tuple[Callable[[Training], tuple], type[Exception], str]] = {
    "list": (
        lambda p: ([1.0], p.target),
        TypeError,
        "TrainStep: input must be a tensor, got list",
    ),
    "no target": (
        lambda p: (p.input, None),
        TypeError,
        "TrainStep: target must be a tensor, got None",
    ),
    "input learns": (
        lambda p: (p.input.clone().requires_grad_(), p.target),
        ValueError,
        "TrainStep: input requires a gradient, which a step does not compute; detach it, or use ",
    ),
    "target learns": (
        lambda p: (p.input, p.target.clone().requires_grad_()),
        ValueError,
        "TrainStep: target requires a gradient, which",
    ),
    "width": (
        lambda p: (p.input[:, 1:], p.target),
        RuntimeError,
        "TrainStep: input must be [*, K=10], got [10, 9]",
    ),
    "target of another form": (
        lambda p: (p.input[0], p.target),
        RuntimeError,
        "TrainStep: target must be [N=1] as the output, got [10, 1]",
    ),
    "images": (
        lambda p: (p.input.view(10, 2, 5), p.target),
        RuntimeError,
        "TrainStep: input must be [*, K=10], got [10, 2, 5]; pass input.flatten(1)",
    ),
    "sequences": (
        lambda p: (p.input.view(2, 5, 10), p.target.view(5, 2, 1)),
        RuntimeError,
        "TrainStep: target must be [2, 5, N=1] as the output, got [5, 2, 1]",
    ),
    "dtype": (
        lambda p: (p.input.double(), p.target.double()),
        RuntimeError,
        "TrainStep: input is float64, the model float32; pass input.float()",
    ),
    "dtype of the target": (
        lambda p: (p.input, p.target.half()),
        RuntimeError,
        "TrainStep: target is float16, the model float32; pass target.float()",
    ),
    "integer target": (
        lambda p: (p.input, p.target.long()),
        RuntimeError,
        "TrainStep: target is int64, the model float32; pass target.float()",
    ),
    "device": (
        lambda p: (p.input.to("meta"), p.target),
        RuntimeError,
        "TrainStep: input is on meta, the model on cpu; pass input.to('cpu')",
    ),
    "device of the target": (
        lambda p: (p.input, p.target.to("meta")),
        RuntimeError,
        "TrainStep: target is on meta, the model on cpu; pass target.to('cpu')",
    ),
    "rows": (
        lambda p: (p.input, p.target[1:]),
        RuntimeError,
        "TrainStep: target must be [M=10, N=1] as the output, got [9, 1]",
    ),
    "target that would broadcast": (
        lambda p: (p.input, p.target[:, 0]),
        RuntimeError,
        "TrainStep: target must be [M=10, N=1] as the output, got [10]; pass target.unsqueeze(1)",
    ),
}


@pytest.mark.parametrize("name", AT_A_STEP)
def test_data_are_refused_before_anything_changes(name: str, part: Training) -> None:
    make, error, message = AT_A_STEP[name]
    with pytest.raises(error, match="^" + re.escape(message)):
        TrainStep(*part[:3])(*make(part))


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("name", AT_A_STEP)
def test_fit_refuses_the_same_data(name: str, batch_size: int | None, part: Training) -> None:
    make, error, message = AT_A_STEP[name]
    input, target = make(part)
    if name in ("rows", "target of another form", "sequences", "list", "no target"):
        error, message = (TypeError, ValueError), "TrainStep.fit: "  # type: ignore[assignment]
    with pytest.raises(error, match="^" + re.escape(message)):
        TrainStep(*part[:3]).fit(input, target, batch_size=batch_size)


CLASSES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], type[Exception], str]] = {
    "floats": (
        lambda y: y.float(),
        TypeError,
        "target must be classes [M=100] of int64, or probabilities [M=100, N=5], "
        "got [100] of float32; pass target.long()",
    ),
    "int32": (
        lambda y: y.int(),
        TypeError,
        "target must be classes [M=100] of int64, or probabilities [M=100, N=5], "
        "got [100] of int32; pass target.long()",
    ),
    "float column": (
        lambda y: y.float().unsqueeze(1),
        TypeError,
        "target must be classes [M=100] of int64, or probabilities [M=100, N=5], "
        "got [100, 1] of float32; pass target.long().squeeze(1)",
    ),
    "column": (
        lambda y: y.unsqueeze(1),
        RuntimeError,
        "target must be classes [M=100], got [100, 1]; pass target.squeeze(1)",
    ),
    "rows": (lambda y: y[1:], RuntimeError, "target must be classes [M=100], got [99]"),
    "one-hot integers": (
        lambda y: nn.functional.one_hot(y, 5),
        RuntimeError,
        "target must be classes [M=100], got [100, 5]; pass target.argmax(1), or as "
        "probabilities target.float()",
    ),
    "rows of probabilities": (
        lambda y: torch.rand(99, 5),
        RuntimeError,
        "target must be [M=100, N=5] as the output, got [99, 5]",
    ),
    "probabilities of another dtype": (
        lambda y: torch.rand(100, 5).half(),
        RuntimeError,
        "target is float16, the model float32; pass target.float()",
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_told_what_they_are(name: str) -> None:
    part = training("3-17-5@100", "classes", "momentum", torch.float32)
    make, error, message = CLASSES[name]
    before = part.state()
    with pytest.raises(error, match="^" + re.escape(f"TrainStep: {message}") + "$"):
        TrainStep(*part[:3])(part.input, make(part.target))
    torch.testing.assert_close(part.state(), before, rtol=0, atol=0)


@pytest.mark.parametrize("call", ["step", "fit"])
def test_no_data_in_a_message(call: str, part: Training) -> None:
    rows = [[0.125] * 10] * 2000
    step = TrainStep(*part[:3])
    for input, target in ((rows, part.target), (part.input, rows)):
        with pytest.raises(TypeError, match="must be a tensor, got list") as caught:
            (step if call == "step" else step.fit)(input, target)
        assert len(str(caught.value)) < 100


@pytest.mark.parametrize("options", ["momentum", "adam"])
@pytest.mark.parametrize("fit", [False, True], ids=["step", "fit"])
def test_state_of_another_dtype_says_how_to_move_it(fit: bool, options: str) -> None:
    part = training("10-5-1@10", "mse", options, torch.float32)
    TrainStep(*part[:3])(*part[3:])
    part.model.double()
    data = part.input.double(), part.target.double()
    step = TrainStep(*part[:3])
    call = step.fit if fit else step
    message = (
        "TrainStep: an optimizer state must be float64 to match input, got float32; "
        "call optimizer.load_state_dict(optimizer.state_dict())"
    )
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        call(*data)
    part.optimizer.load_state_dict(part.optimizer.state_dict())
    call(*data)


def test_option_that_needs_a_new_state_is_an_error() -> None:
    """Where eager raises KeyError."""
    part = training("10-5-1@10", "mse", "adam", torch.float32)
    step = TrainStep(*part[:3])
    step(*part[3:])
    part.optimizer.param_groups[0]["amsgrad"] = True
    before = part.state()
    with pytest.raises(ValueError, match=r"^TrainStep: optimizer.state has no max_exp_avg_sq"):
        step(*part[3:])
    torch.testing.assert_close(part.state(), before, rtol=0, atol=0)


def test_nothing_that_learns_is_an_error(part: Training) -> None:
    step = TrainStep(*part[:3])
    part.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="TrainStep: nothing learns: no parameter of"):
        step(*part[3:])


@pytest.mark.parametrize("which", ["output", "target"])
def test_what_is_no_probability_is_an_error_of_bce(which: str) -> None:
    part = training("10-5-1@10", "bce", "momentum", torch.float32)
    if which == "output":
        part.model[3] = nn.Identity()
    else:
        part.target[3] = 1.5
    before = part.state()
    with pytest.raises(RuntimeError, match="bce needs outputs and targets between 0 and 1"):
        TrainStep(*part[:3])(*part[3:])
    torch.testing.assert_close(part.state(), before, rtol=0, atol=0)


def test_failed_first_step_leaves_no_state() -> None:
    part = training("3-17-5@100", "nll", "adam", torch.float32)
    part.target[99] = 5
    for call in (TrainStep(*part[:3]), TrainStep(*part[:3]).fit):
        with pytest.raises(IndexError, match="target must be classes from 0 to 4"):
            call(*part[3:])
    assert not part.optimizer.state


@pytest.mark.parametrize("wrong", [-1, 5, -100 + 1])
def test_class_that_does_not_exist_is_an_error(wrong: int) -> None:
    part = training("3-17-5@100", "classes", "momentum", torch.float32)
    part.target[99] = wrong
    before = part.state()
    message = f"target must be classes from 0 to 4 or ignore_index -100, got {wrong}"
    with pytest.raises(IndexError, match=message):
        TrainStep(*part[:3])(*part[3:])
    torch.testing.assert_close(part.state(), before, rtol=0, atol=0)
