"""The operator mlp_train_step_: a good citizen of torch."""

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
