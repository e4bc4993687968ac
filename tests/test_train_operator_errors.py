"""The errors of mlp_train_step_, before anything changes, and what may share memory."""

import re
from collections.abc import Callable

import pytest
import torch
from test_train_operator import (
    MANY,
    MOMENTUM,
    OP,
    PLAIN,
    UPDATE,
    Arguments,
    arguments,
    arguments_of,
    tensors,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# A change to good arguments, and what is said. `a` are the arguments; a 4-3-2 net at 6 rows.
BAD: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "loss": (
        lambda a: {"loss": "mae"},
        "loss must be one of mse, bce, bce_with_logits, l1, smooth_l1, huber, cross_entropy, nll, "
        "got 'mae'",
    ),
    "reduction": (
        lambda a: {"reduction": "none"},
        "reduction must be mean or sum, got 'none'",
    ),
    "activation": (
        lambda a: {"activations": ["relu", "swish"]},
        "activations[1] must be one of identity, relu, sigmoid, tanh, ",
    ),
    "too few activations": (
        lambda a: {"activations": ["relu"]},
        "activations must be one for each of 2 layers, got 1",
    ),
    "parameters of activations": (
        lambda a: {"activations": ["relu", "elu"], "activation_parameters": [1.0, 2.0]},
        "parameters must be those of all activations, and 1 are left over",
    ),
    "too few parameters of an activation": (
        lambda a: {"activations": ["softplus", "relu"], "activation_parameters": [1.0]},
        "parameters must be those of all activations, in order; softplus takes 2, and 1 are left",
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
        "mse takes no loss_weight",
    ),
    "loss_weight of another shape": (
        lambda a: {"loss": "cross_entropy", "loss_weight": torch.ones(3)},
        "loss_weight must be [N=2], one for each class, got [3]",
    ),
    "weight of positives of another shape": (
        lambda a: {"loss": "bce_with_logits", "loss_weight": torch.ones(6, 2)},
        "loss_weight must broadcast to [N=2], got [6, 2]",
    ),
    "smoothing": (
        lambda a: {"loss": "cross_entropy", "loss_parameters": [-100, 1.5]},
        "label_smoothing must be from 0 to 1, got 1.5",
    ),
    "beta": (
        lambda a: {"loss": "smooth_l1", "loss_parameters": [-1]},
        "beta must be from 0 on, got -1",
    ),
    "delta": (
        lambda a: {"loss": "huber", "loss_parameters": [0]},
        "delta must be greater than 0, got 0",
    ),
    "parameters of the loss": (
        lambda a: {"loss": "huber", "loss_parameters": [1, 2]},
        "huber takes 1 parameters, got 2",
    ),
    "probabilities for nll": (
        lambda a: {"loss": "nll"},
        "target must be [M=6] of classes of int64, got float32",
    ),
    "optimizer": (
        lambda a: {"optimizer": "adamw"},
        "optimizer must be one of sgd, adam, rmsprop, adagrad, accumulate, got 'adamw'",
    ),
    "batch_size": (lambda a: {"batch_size": 0}, "batch_size must be from 1 on, got 0"),
    "order alone": (lambda a: {"order": torch.arange(6)}, "order needs a batch_size"),
    "order of floats": (
        lambda a: {"order": torch.zeros(3), "batch_size": 2},
        "order must be int64, got float32",
    ),
    "order of two dimensions": (
        lambda a: {"order": torch.zeros(3, 1, dtype=torch.int64), "batch_size": 2},
        "order must be indices [rows] among those of input, got [3, 1]",
    ),
    "no steps": (
        lambda a: arguments_of("adam") | {"steps": []},
        "steps must be one for each parameter that learns with adam, 3, got 0",
    ),
    "steps of integers": (
        lambda a: arguments_of("adam") | {"steps": [torch.tensor(1)] * 3},
        "a count of steps must be float32 or float64, got int64",
    ),
    "steps of another shape": (
        lambda a: arguments_of("adam") | {"steps": [torch.ones(1)] * 3},
        "a count of steps must be [], got [1]",
    ),
    "hyperparameters": (
        lambda a: {"hyperparameters": PLAIN},
        "hyperparameters must be 6 for each of 3 parameters that learn, got 6",
    ),
    "index that does not exist": (
        lambda a: {"learning": [0, 1, 4]},
        "learning must be rising indices among 4 parameters, got [0, 1, 4]",
    ),
    "indices in disorder": (
        lambda a: {"learning": [0, 2, 1]},
        "learning must be rising indices among 4 parameters, got [0, 2, 1]",
    ),
    "no buffer": (
        lambda a: {"states": []},
        "states must be those of each parameter that learns with sgd, 1, got 0",
    ),
    "a buffer too many": (
        lambda a: {"states": [torch.ones(3, 4)] * 2},
        "states must be those of each parameter that learns with sgd, 1, got 2",
    ),
    "buffer of another shape": (
        lambda a: {"states": [torch.ones(3)]},
        "an optimizer state must be [3, 4] like its parameter, got [3]",
    ),
    "buffer of another dtype": (
        lambda a: {"states": [torch.ones(3, 4).double()]},
        "an optimizer state must be float32 to match input, got float64",
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
            states=a["states"][:2],
            hyperparameters=MOMENTUM * 2,
        ),
        "a parameter must not share memory with a parameter that learns",
    ),
    "a buffer twice": (
        lambda a: a["states"].__setitem__(2, a["states"][0]),
        "an optimizer state must not share memory with an optimizer state",
    ),
    "a buffer that is its parameter": (
        lambda a: a["states"].__setitem__(0, a["parameters"][0]),
        "(a parameter that learns|an optimizer state) must not share memory with an? ",
    ),
    "a buffer that is another's parameter": (
        lambda a: a["states"].__setitem__(0, a["parameters"][2]),
        "(a parameter that learns|an optimizer state) must not share memory with an? ",
    ),
    "a buffer in the input": (
        lambda a: a["states"].__setitem__(0, a["input"][1:5]),
        "input must not share memory with an optimizer state",
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
        "states": [torch.ones_like(p) for p in parameters],
        "learning": [0, 1, 2, 3],
        "hyperparameters": MOMENTUM * 4,
    }
    change, message = ALIASES[name]
    change(given)
    read = [given["input"], given["target"], *tensors(given)]
    before = [t.clone() for t in read]
    for options in ({}, {"batch_size": 2}):
        with pytest.raises(RuntimeError, match=f"^mlp_train_step_: {message}.*; pass a clone"):
            OP(**given, **options)
    assert all(map(torch.equal, read, before))


def test_shared_count_of_steps_is_an_error() -> None:
    given = arguments_of("adam")
    given["steps"] = [given["steps"][0]] * 3
    with pytest.raises(RuntimeError, match="a count of steps must not share memory with a count"):
        OP(**given)


def test_neighbours_in_memory_are_no_aliases() -> None:
    """As in a flat buffer that holds all parameters, all momentum, and the data."""
    given, expected = arguments(requires_grad=False), arguments(requires_grad=False)
    names = ("input", "target")
    all_of_it = [*tensors(expected), *(expected[name] for name in names)]
    flat = torch.cat([t.flatten() for t in all_of_it])
    parts = flat.split([t.numel() for t in all_of_it])
    views = [part.view(t.shape) for part, t in zip(parts, all_of_it, strict=True)]
    given["parameters"], given["states"] = views[:4], views[4:5]
    given["input"], given["target"] = views[5:]
    torch.testing.assert_close(OP(**given), OP(**expected))
    torch.testing.assert_close(given["parameters"], expected["parameters"])
    torch.testing.assert_close(given["states"], expected["states"])


def test_what_is_only_read_may_share_memory() -> None:
    given = arguments(requires_grad=False)
    x = torch.rand(6, 4)
    frozen = torch.randn(4, 4)
    given |= {
        "input": x,
        "target": x,
        "parameters": [frozen, torch.zeros(4), frozen, torch.zeros(4)],
        "states": [],
        "learning": [1, 3],
        "hyperparameters": PLAIN * 2,
    }
    assert OP(**given).isfinite()


@pytest.mark.parametrize("batch_size", [None, 2], ids=str)
def test_index_beyond_the_parameters_is_an_error(batch_size: int | None) -> None:
    given = arguments()
    with pytest.raises((IndexError, ValueError, RuntimeError), match=r"^mlp_train_step_: learning"):
        OP(**given | {"learning": [10**6], "hyperparameters": PLAIN}, batch_size=batch_size)


def test_more_networks_than_parameters_are_an_error() -> None:
    given = arguments()
    with pytest.raises(RuntimeError, match=r"^mlp_train_many_: parameters must be as many"):
        MANY(**given, orders=[], networks=7, epochs=1, batch_size=6)


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_an_error_before_anything_changes(name: str) -> None:
    change, message = BAD[name]
    given = arguments()
    given |= change(given)
    before = [t.detach().clone() for t in tensors(given)]
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as caught:
        OP(**given)
    assert re.match(re.escape(f"mlp_train_step_: {message}"), str(caught.value)), caught.value
    torch.testing.assert_close(tensors(given), before, rtol=0, atol=0)


def test_errors_of_an_update() -> None:
    given = arguments_of("adam")
    learning = [p.detach() for p in given["parameters"][:3]]
    update = {name: given[name] for name in UPDATE} | {"parameters": learning}
    update["gradients"] = [torch.ones_like(p) for p in learning]
    op = torch.ops.mlp_ext.mlp_train_update_
    for change, message in (
        ({"gradients": update["gradients"][1:]}, "gradients must be one for each of 3 param"),
        ({"gradients": update["gradients"][::-1]}, "a gradient must be .* like its parameter"),
        ({"states": given["states"][:-1]}, "states must be those of each parameter that learns"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, .* got 'lion'"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=f"^mlp_train_update_: {message}"):
            op(**update | change)


@pytest.mark.parametrize(
    ("dropout", "message"),
    [
        ([0.1], "dropout must be one for each layer's input and one for the output, 3, got 1"),
        ([0.1, 0.2, 1.5], "dropout must be from 0 to 1, got 1.5"),
    ],
)
def test_dropout_is_checked(dropout: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OP(**arguments(), dropout=dropout)
