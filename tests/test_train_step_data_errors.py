"""Data and states that a step does not take: an error before anything changes."""

import re
from collections.abc import Callable

import pytest
import torch
from steps import Training, training
from torch import nn

from mlp_ext import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")


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
