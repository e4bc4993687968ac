"""The operator mlp_train_step_: a good citizen of torch, and its errors before anything changes."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import SMALL_LOSSES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mlp_ext import _C

pytestmark = pytest.mark.usefixtures("one_thread")

OP = torch.ops.mlp_ext.mlp_train_step_.default
MANY = torch.ops.mlp_ext.mlp_train_many_.default
PLAIN = [0.1, 0.0, 0.0, 0.0, 0.0, 0.0]  # lr, momentum, dampening, weight_decay, nesterov, maximize
MOMENTUM = [0.1, 0.9, 0.1, 0.01, 0.0, 0.0]

Arguments = dict[str, Any]
LISTS = ("parameters", "states", "steps")
UPDATE = ("states", "steps", "optimizer", "hyperparameters")


def arguments(loss: str = "mse", reduction: str = "mean", requires_grad: bool = True) -> Arguments:
    """Of a 4-3-2 net at 6 rows; the last bias does not learn, the first weight has momentum."""
    activation, target, weight, numbers = SMALL_LOSSES[loss]
    shapes = ((3, 4), (3,), (2, 3), (2,))
    parameters = [torch.randn(shape).requires_grad_(requires_grad) for shape in shapes]
    return {
        "input": torch.randn(6, 4),
        "target": target(6, 2, torch.float32),
        "parameters": parameters,
        "states": [torch.ones(3, 4)],
        "steps": [],
        "activations": ["relu", activation],
        "activation_parameters": [],
        "loss": loss.split("-")[0],
        "reduction": reduction,
        "loss_weight": weight,
        "loss_parameters": numbers,
        "optimizer": "sgd",
        "learning": [0, 1, 2],
        "hyperparameters": [*MOMENTUM, *PLAIN, *PLAIN],
    }


STATES = {
    "sgd": 0,
    "adam": 3,
    "rmsprop": 1,
    "adagrad": 1,
    "accumulate": 1,
}  # with the hyperparameters below


def arguments_of(optimizer: str, **given: Any) -> Arguments:
    """As arguments(), with an optimizer that counts its steps; Adam with amsgrad."""
    made = arguments(**given)
    numbers = _C.optimizers()[optimizer] | ({"amsgrad": 1.0} if optimizer == "adam" else {})
    learning = [made["parameters"][index] for index in made["learning"]]
    return made | {
        "optimizer": optimizer,
        "states": [torch.rand(p.shape) for p in learning for _ in range(STATES[optimizer])],
        "steps": [torch.tensor(4.0) for _ in learning if optimizer != "accumulate"],
        "hyperparameters": list(numbers.values()) * len(learning),
    }


def converted(given: Arguments, convert: Callable[[Tensor], Tensor]) -> Arguments:
    return {
        name: convert(value)
        if isinstance(value, Tensor)
        else [convert(t) for t in value]
        if name in LISTS
        else value
        for name, value in given.items()
    }


def tensors(given: Arguments) -> list[Tensor]:
    return [t for name in LISTS for t in given[name]]


@pytest.mark.slow
@pytest.mark.parametrize("requires_grad", [False, True], ids=["constants", "parameters"])
@pytest.mark.parametrize("loss", SMALL_LOSSES)
def test_opcheck(loss: str, requires_grad: bool) -> None:
    with torch.no_grad():
        torch.library.opcheck(OP, (), arguments(loss, "sum", requires_grad))


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "adagrad"])
def test_opcheck_of_optimizers(optimizer: str) -> None:
    order = torch.tensor([3, 0, 5, 5, 1])
    with torch.no_grad():
        torch.library.opcheck(OP, (), arguments_of(optimizer) | {"order": order, "batch_size": 2})


@pytest.mark.parametrize("optimizer", ["accumulate", "adam"])
def test_opcheck_of_an_update(optimizer: str) -> None:
    given = arguments_of(optimizer)
    given = {name: given[name] for name in UPDATE if name in given} | {
        "parameters": given["parameters"][:3],
        "gradients": [torch.rand(p.shape) for p in given["parameters"][:3]],
    }
    with torch.no_grad():
        torch.library.opcheck(torch.ops.mlp_ext.mlp_train_update_.default, (), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "adagrad"])
def test_a_step_is_gradients_and_an_update(
    optimizer: str, strided: bool, dtype: torch.dtype
) -> None:
    made = arguments() if optimizer == "sgd" else arguments_of(optimizer)
    made |= {"input": made["input"].to(dtype), "target": made["target"].to(dtype)}
    for name in ("parameters", "states"):
        made[name] = [t.detach().to(dtype) for t in made[name]]
        if strided:
            made[name] = [t.t().contiguous().t() for t in made[name]]
    one, two = (converted(made, lambda t: t.clone()) for _ in range(2))
    loss = OP(**one)
    learning = [two["parameters"][index] for index in two["learning"]]
    gradients = [torch.zeros_like(p) for p in learning]
    sums = {"optimizer": "accumulate", "states": gradients, "steps": []}
    sums["hyperparameters"] = [1.0] * len(learning)
    before = [p.clone() for p in learning]
    torch.testing.assert_close(OP(**two | sums), loss)
    torch.testing.assert_close(learning, before, rtol=0, atol=0)
    update = {name: two[name] for name in UPDATE} | {"parameters": learning}
    torch.ops.mlp_ext.mlp_train_update_(**update, gradients=gradients)
    torch.testing.assert_close(tensors(two), tensors(one))


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


def test_dropout_of_zero_is_none() -> None:
    one = converted(arguments(), lambda t: t.detach().clone())
    two = converted(one, lambda t: t.clone())
    torch.testing.assert_close(OP(**one, dropout=[0.0, 0.0, 0.0]), OP(**two))
    torch.testing.assert_close(tensors(one), tensors(two))


def test_step_is_the_formula() -> None:
    given = arguments()
    w, b, v, c = (p.detach().clone().requires_grad_() for p in given["parameters"])
    y = torch.sigmoid(torch.relu(given["input"] @ w.T + b) @ v.T + c)
    expected = nn.functional.mse_loss(y, given["target"])
    dw, db, dv, _ = torch.autograd.grad(expected, [w, b, v, c])
    buffer = 0.9 * torch.ones(3, 4) + 0.9 * (dw + 0.01 * w)
    loss = OP(**given)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(given["states"], [buffer.detach()])
    after = [w - 0.1 * buffer, b - 0.1 * db, v - 0.1 * dv, c]
    torch.testing.assert_close(
        [p.detach() for p in given["parameters"]], [p.detach() for p in after]
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "adagrad"])
@pytest.mark.parametrize(
    "order",
    [None, [3, 0, 5, 5, 1], [4, 5, 0, 1, 2, 3, 3, 4]],
    ids=["as they lie", "in an order", "in runs"],
)
def test_many_steps_are_single_steps(order: list[int] | None, optimizer: str) -> None:
    given = arguments() if optimizer == "sgd" else arguments_of(optimizer)
    one_by_one = converted(given, lambda t: t.detach().clone())
    rows = torch.tensor(order if order else range(6))
    losses = OP(**given, order=rows if order else None, batch_size=4)
    expected = [
        OP(**one_by_one | {name: one_by_one[name][batch] for name in ("input", "target")})
        for batch in rows.split(4)
    ]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=0, atol=0)
    found = [t.detach() for t in tensors(given)]
    torch.testing.assert_close(found, tensors(one_by_one), rtol=0, atol=0)
    assert all(step == 6 for step in given["steps"])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: torch.stack([t, t + 1], 1)[:, 0],
    "columns": lambda t: t.t().contiguous().t() if t.dim() > 1 else t,
    "slice": lambda t: torch.cat([t, t + 1], -1)[..., : t.size(-1)],
    "one row": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("loss", ["mse", "nll"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_in_an_order_may_have_any_layout(layout: str, loss: str) -> None:
    given = arguments(loss)
    given |= {"order": torch.tensor([3, 0, 5, 5, 1]), "batch_size": 4}
    for name in ("input", "target", "order"):
        given[name] = LAYOUTS[layout](given[name])
    contiguous = converted(given, lambda t: t.detach().clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(OP(**given), OP(**contiguous), rtol=0, atol=0)
    assert all(map(torch.equal, tensors(given), tensors(contiguous)))


def test_step_may_be_counted_in_float64() -> None:
    given = arguments_of("adam")
    wide = converted(given, lambda t: t.detach().clone())
    wide["steps"] = [step.double() for step in wide["steps"]]
    torch.testing.assert_close(OP(**given), OP(**wide), rtol=0, atol=0)
    torch.testing.assert_close(given["states"], wide["states"], rtol=0, atol=0)
    assert all(step.dtype == torch.float64 and step == 5 for step in wide["steps"])


@pytest.mark.parametrize("batch_size", [None, 6], ids=str)
def test_versions_of_what_learns_change_by_one(batch_size: int | None) -> None:
    given = arguments_of("adagrad")
    versions = [t._version for t in tensors(given)]
    OP(**given, batch_size=batch_size)
    after = [t._version for t in tensors(given)]
    changes = [b - a for a, b in zip(versions, after, strict=True)]
    assert changes == [1, 1, 1, 0, *[1] * 6]


def test_failed_step_leaves_finished_ones() -> None:
    given = arguments_of("adam", loss="nll")
    given["target"][5] = 2  # no such class
    good = converted(given, lambda t: t.detach().clone())
    weight = given["parameters"][0]
    version = weight._version
    with pytest.raises(IndexError, match="classes from 0 to 1"):
        OP(**given, batch_size=2)
    OP(**good | {name: good[name][:4] for name in ("input", "target")}, batch_size=2)
    torch.testing.assert_close([t.detach() for t in tensors(given)], tensors(good), rtol=0, atol=0)
    assert weight._version > version


@pytest.mark.parametrize("make", [lambda t: t.to("meta"), None], ids=["meta", "fake"])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, ()),
        ({"batch_size": 4}, (2,)),
        ({"batch_size": 6}, (1,)),
        ({"batch_size": 2**63 - 1}, (1,)),
        ({"batch_size": 2, "order": torch.arange(3)}, (2,)),
        ({"batch_size": 2, "order": torch.arange(0)}, (0,)),
    ],
    ids=str,
)
def test_shapes_are_inferred(
    options: Arguments, shape: tuple[int, ...], make: Callable[[Tensor], Tensor] | None
) -> None:
    given = arguments_of("adam") | options
    with FakeTensorMode() as mode:
        mode.allow_non_fake_inputs = True
        loss = OP(**converted(given, make or mode.from_tensor))
    assert (loss.shape, loss.dtype) == (shape, torch.float32)
    assert OP(**given).shape == shape


def test_old_name_says_the_new_one() -> None:
    old = torch.ops.mlp_ext.mlp_sgd_step_
    with pytest.raises(RuntimeError, match=r"^mlp_sgd_step_: since .* this is mlp_train_step_"):
        x = torch.zeros(1, 1)
        old(x, x, [x], [], ["relu"], "mse", "mean", None, -100, 0.0, [0], PLAIN)


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


def test_steps_of_many_do_not_follow_autocast() -> None:
    given = arguments() | {"dropout": [0.1, 0.0, 0.0]}
    others = converted(given, lambda t: t.detach().clone())
    settings: Arguments = {"orders": [], "networks": 1, "epochs": 1, "batch_size": 6}
    torch.manual_seed(1)
    expected = MANY(**given, **settings)
    torch.manual_seed(1)
    with torch.autocast("cpu"):
        found = MANY(**others, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


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
