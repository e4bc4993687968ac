"""The operator mlp_sgd_step_: a good citizen of torch, and its errors before anything changes."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import SMALL_LOSSES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.usefixtures("one_thread")

OP = torch.ops.mlp_ext.mlp_sgd_step_.default
PLAIN = [0.1, 0.0, 0.0, 0.0, 0.0, 0.0]  # lr, momentum, dampening, weight_decay, nesterov, maximize
MOMENTUM = [0.1, 0.9, 0.1, 0.01, 0.0, 0.0]

Arguments = dict[str, Any]


def arguments(loss: str = "mse", reduction: str = "mean", requires_grad: bool = True) -> Arguments:
    """Of a 4-3-2 net at 6 rows; the last bias does not learn, the first weight has momentum."""
    activation, target, weight = SMALL_LOSSES[loss]
    shapes = ((3, 4), (3,), (2, 3), (2,))
    parameters = [torch.randn(shape).requires_grad_(requires_grad) for shape in shapes]
    return {
        "input": torch.randn(6, 4),
        "target": target(6, 2, torch.float32),
        "parameters": parameters,
        "momentum_buffers": [torch.ones(3, 4)],
        "activations": ["relu", activation],
        "loss": loss.split("-")[0],
        "reduction": reduction,
        "loss_weight": weight,
        "ignore_index": -100,
        "label_smoothing": 0.1 if loss.startswith("cross") else 0.0,
        "learning": [0, 1, 2],
        "hyperparameters": [*MOMENTUM, *PLAIN, *PLAIN],
    }


@pytest.mark.parametrize("requires_grad", [False, True], ids=["constants", "parameters"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", SMALL_LOSSES)
def test_opcheck(loss: str, reduction: str, requires_grad: bool) -> None:
    with torch.no_grad():
        torch.library.opcheck(OP, (), arguments(loss, reduction, requires_grad))


def test_step_is_the_formula() -> None:
    given = arguments()
    w, b, v, c = (p.detach().clone().requires_grad_() for p in given["parameters"])
    y = torch.sigmoid(torch.relu(given["input"] @ w.T + b) @ v.T + c)
    expected = nn.functional.mse_loss(y, given["target"])
    dw, db, dv, _ = torch.autograd.grad(expected, [w, b, v, c])
    buffer = 0.9 * torch.ones(3, 4) + 0.9 * (dw + 0.01 * w)
    loss = OP(**given)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(given["momentum_buffers"], [buffer.detach()])
    after = [w - 0.1 * buffer, b - 0.1 * db, v - 0.1 * dv, c]
    torch.testing.assert_close(
        [p.detach() for p in given["parameters"]], [p.detach() for p in after]
    )


def test_versions_of_what_learns_change_by_one() -> None:
    given = arguments()
    versions = [p._version for p in (*given["parameters"], *given["momentum_buffers"])]
    OP(**given)
    after = [p._version for p in (*given["parameters"], *given["momentum_buffers"])]
    assert [b - a for a, b in zip(versions, after, strict=True)] == [1, 1, 1, 0, 1]


@pytest.mark.parametrize("make", [lambda t: t.to("meta"), None], ids=["meta", "fake"])
def test_shapes_are_inferred(make: Callable[[Tensor], Tensor] | None) -> None:
    with FakeTensorMode() as mode:
        mode.allow_non_fake_inputs = True
        convert = make or mode.from_tensor
        given = {
            name: convert(value)
            if isinstance(value, Tensor)
            else [convert(t) for t in value]
            if name in ("parameters", "momentum_buffers")
            else value
            for name, value in arguments().items()
        }
        loss = OP(**given)
    assert (loss.shape, loss.dtype) == ((), torch.float32)


# A change to good arguments, and what is said. `a` are the arguments; a 4-3-2 net at 6 rows.
BAD: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "loss": (
        lambda a: {"loss": "l1"},
        "loss must be one of mse, bce, bce_with_logits, cross_entropy, got 'l1'",
    ),
    "reduction": (
        lambda a: {"reduction": "none"},
        "reduction must be mean or sum, got 'none'",
    ),
    "activation": (
        lambda a: {"activations": ["relu", "silu"]},
        "activations must be among identity, relu, sigmoid, tanh, got 'silu'",
    ),
    "too few activations": (
        lambda a: {"activations": ["relu"]},
        "activations must be one for each of 2 layers, got 1",
    ),
    "no parameters": (
        lambda a: {"parameters": [], "activations": [], "learning": [], "hyperparameters": []},
        "parameters must hold at least one weight [N, K]",
    ),
    "two biases": (
        lambda a: {"parameters": [*a["parameters"], torch.ones(2)]},
        "parameters must be of each layer weight [N, K] and, if it has one, bias [N]; "
        "parameters[4] is [2]",
    ),
    "bias first": (
        lambda a: {"parameters": a["parameters"][1:]},
        "parameters must be of each layer weight [N, K] and, if it has one, bias [N]; "
        "parameters[0] is [3]",
    ),
    "input of one dimension": (
        lambda a: {"input": a["input"][0]},
        "input must be [M, K], got [4]",
    ),
    "input of integers": (
        lambda a: {"input": a["input"].int()},
        "input must be float32, float64, bfloat16 or float16, got int32",
    ),
    "input of another width": (
        lambda a: {"input": torch.ones(6, 5)},
        "the weight of layer 0 must be [N, K=5] to match input, got [3, 4]",
    ),
    "weight of another width": (
        lambda a: {"parameters": [*a["parameters"][:2], torch.ones(2, 4), a["parameters"][3]]},
        "the weight of layer 1 must be [N, K=3] to match the layer before, got [2, 4]",
    ),
    "bias of another width": (
        lambda a: {"parameters": [a["parameters"][0], torch.ones(2), *a["parameters"][2:]]},
        "the bias of layer 0 must be [N=3] to match its weight, got [2]",
    ),
    "weight of another dtype": (
        lambda a: {"parameters": [a["parameters"][0].detach().double(), *a["parameters"][1:]]},
        "a weight must be float32 to match input, got float64",
    ),
    "weight on another device": (
        lambda a: {"parameters": [a["parameters"][0].detach().to("meta"), *a["parameters"][1:]]},
        "a weight must be on cpu to match input, got meta",
    ),
    "target of another shape": (
        lambda a: {"target": torch.ones(6, 1)},
        "target must be [M=6, N=2] to match the output, got [6, 1]",
    ),
    "target of another dtype": (
        lambda a: {"target": torch.ones(6, 2).double()},
        "target must be float32 to match input, got float64",
    ),
    "classes of another shape": (
        lambda a: {"loss": "cross_entropy", "target": torch.ones(6, 1).long()},
        "target must be [M=6] of classes to match input [6, 4], got [6, 1]",
    ),
    "class that does not exist": (
        lambda a: {"loss": "cross_entropy", "target": torch.tensor([0, 1, 0, 2, 1, 0])},
        "target must be classes from 0 to 1 or ignore_index -100, got 2",
    ),
    "weight of an element loss": (
        lambda a: {"loss_weight": torch.ones(2)},
        "mse takes neither loss_weight nor label_smoothing",
    ),
    "loss_weight of another shape": (
        lambda a: {"loss": "cross_entropy", "loss_weight": torch.ones(3)},
        "loss_weight must be [N=2], one for each class, got [3]",
    ),
    "smoothing": (
        lambda a: {"loss": "cross_entropy", "label_smoothing": 1.5},
        "label_smoothing must be from 0 to 1, got 1.5",
    ),
    "hyperparameters": (
        lambda a: {"hyperparameters": PLAIN},
        "hyperparameters must be 6 for each of 3 parameters that learn, got 6",
    ),
    "place that does not exist": (
        lambda a: {"learning": [0, 1, 4]},
        "learning must be rising places among 4 parameters, got [0, 1, 4]",
    ),
    "places in disorder": (
        lambda a: {"learning": [0, 2, 1]},
        "learning must be rising places among 4 parameters, got [0, 2, 1]",
    ),
    "no buffer": (
        lambda a: {"momentum_buffers": []},
        "momentum_buffers must be one for each parameter that learns with momentum, got 0",
    ),
    "a buffer too many": (
        lambda a: {"momentum_buffers": [torch.ones(3, 4)] * 2},
        "momentum_buffers must be one for each parameter that learns with momentum, 1, got 2",
    ),
    "buffer of another shape": (
        lambda a: {"momentum_buffers": [torch.ones(3)]},
        "a momentum buffer must be [3, 4] like its parameter, got [3]",
    ),
    "buffer of another dtype": (
        lambda a: {"momentum_buffers": [torch.ones(3, 4).double()]},
        "a momentum buffer must be float32 to match input, got float64",
    ),
}


# What shares memory: a change to a 4-4-4 net's arguments, of which all learn with momentum.
ALIASES: dict[str, tuple[Callable[[Arguments], None], str]] = {
    "a parameter twice": (
        lambda a: a["parameters"].__setitem__(2, a["parameters"][0]),
        "a parameter that learns must not share memory with a parameter that learns",
    ),
    "a view of a parameter": (
        lambda a: a["parameters"].__setitem__(3, a["parameters"][0][1]),
        "a parameter that learns must not share memory with a parameter that learns",
    ),
    "a parameter's last element": (
        lambda a: a["parameters"].__setitem__(
            3, a["parameters"][0].as_strided((4,), (0,), 15).as_strided((4,), (1,), 12)
        ),
        "a parameter that learns must not share memory with a parameter that learns",
    ),
    "a frozen parameter that learns": (
        lambda a: a.update(
            parameters=[a["parameters"][0], a["parameters"][1], a["parameters"][0]],
            learning=[0, 1],
            momentum_buffers=a["momentum_buffers"][:2],
            hyperparameters=MOMENTUM * 2,
        ),
        "a parameter must not share memory with a parameter that learns",
    ),
    "a buffer twice": (
        lambda a: a["momentum_buffers"].__setitem__(2, a["momentum_buffers"][0]),
        "a momentum buffer must not share memory with a momentum buffer",
    ),
    "a buffer that is its parameter": (
        lambda a: a["momentum_buffers"].__setitem__(0, a["parameters"][0]),
        "(a parameter that learns|a momentum buffer) must not share memory with a ",
    ),
    "a buffer that is another's parameter": (
        lambda a: a["momentum_buffers"].__setitem__(0, a["parameters"][2]),
        "(a parameter that learns|a momentum buffer) must not share memory with a ",
    ),
    "a buffer in the input": (
        lambda a: a["momentum_buffers"].__setitem__(0, a["input"][1:5]),
        "input must not share memory with a momentum buffer",
    ),
    "the input": (
        lambda a: a.update(input=a["parameters"][0].detach()[1:], target=torch.rand(3, 4)),
        "input must not share memory with a parameter that learns",
    ),
    "the target": (
        lambda a: a.update(input=torch.rand(4, 4), target=a["parameters"][2].detach().t()),
        "target must not share memory with a parameter that learns",
    ),
}


@pytest.mark.parametrize("name", ALIASES)
def test_shared_memory_is_an_error_before_anything_changes(name: str) -> None:
    parameters = [torch.randn(shape) for shape in ((4, 4), (4,), (4, 4), (4,))]
    given: Arguments = {
        **arguments(),
        "input": torch.randn(6, 4),
        "target": torch.rand(6, 4),
        "parameters": parameters,
        "momentum_buffers": [torch.ones_like(p) for p in parameters],
        "learning": [0, 1, 2, 3],
        "hyperparameters": MOMENTUM * 4,
    }
    change, message = ALIASES[name]
    change(given)
    tensors = [given["input"], given["target"], *given["parameters"], *given["momentum_buffers"]]
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError, match=f"^mlp_sgd_step_: {message}.*; pass a clone"):
        OP(**given)
    steps = torch.ops.mlp_ext._mlp_sgd_steps_.default
    with pytest.raises(RuntimeError, match=message):
        steps(**given, order=None, batch_size=2)
    assert all(map(torch.equal, tensors, before))


def test_neighbours_in_memory_are_no_aliases() -> None:
    """As in a flat buffer that holds all parameters, all momentum, and the data."""
    given, expected = arguments(requires_grad=False), arguments(requires_grad=False)
    names = ("input", "target")
    tensors = [*expected["parameters"], *expected["momentum_buffers"]]
    tensors += [expected[name] for name in names]
    flat = torch.cat([t.flatten() for t in tensors])
    parts = flat.split([t.numel() for t in tensors])
    views = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
    given["parameters"], given["momentum_buffers"] = views[:4], views[4:5]
    given["input"], given["target"] = views[5:]
    torch.testing.assert_close(OP(**given), OP(**expected))
    torch.testing.assert_close(given["parameters"], expected["parameters"])
    torch.testing.assert_close(given["momentum_buffers"], expected["momentum_buffers"])


def test_what_is_only_read_may_share_memory() -> None:
    given = arguments(requires_grad=False)
    x = torch.rand(6, 4)
    frozen = torch.randn(4, 4)
    given |= {
        "input": x,
        "target": x,
        "parameters": [frozen, torch.zeros(4), frozen, torch.zeros(4)],
        "momentum_buffers": [],
        "learning": [1, 3],
        "hyperparameters": PLAIN * 2,
    }
    assert OP(**given).isfinite()


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_an_error_before_anything_changes(name: str) -> None:
    given = arguments()
    before = [p.clone() for p in given["parameters"]]
    change, message = BAD[name]
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as caught:
        OP(**{**given, **change(given)})
    assert re.match(re.escape(f"mlp_sgd_step_: {message}"), str(caught.value)), caught.value
    torch.testing.assert_close(given["parameters"], before, rtol=0, atol=0)
