"""The operator _mlp_sgd_steps_: many steps in one call are the eager loop's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_steps import OPTIONS, Data, Training, assert_trains_as_torch, hyperparameters
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

OP = torch.ops.mlp_ext._mlp_sgd_steps_.default


def arguments(
    t: Training, data: Data, parameters: list[Tensor], buffers: list[Tensor | None]
) -> dict[str, Any]:
    learning = [place for place in range(len(parameters)) if place not in t.frozen]
    last = "sigmoid" if t.loss == "bce" else "identity"
    order = data.order
    rows = slice(None) if order is not None else slice(t.rows)
    return {
        "input": data.input[rows],
        "target": data.target[rows],
        "parameters": parameters,
        "momentum_buffers": [b for b in buffers if b is not None],
        "activations": [*[t.hidden] * (len(t.widths) - 2), last],
        "loss": t.loss.partition("-")[0],
        "reduction": t.reduction,
        "loss_weight": data.weight,
        "ignore_index": -100,
        "label_smoothing": t.smoothing,
        "learning": learning,
        "hyperparameters": hyperparameters(t) * len(learning),
        "order": order,
        "batch_size": t.batch,
    }


def run(t: Training, data: Data, parameters: list[Tensor], buffers: list[Tensor | None]) -> Tensor:
    losses: Tensor = OP(**arguments(t, data, parameters, buffers))
    return losses


SMALL = Training((6, 5, 4), 40, 12)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    "loss", ["mse", "bce", "bce_with_logits", "cross_entropy", "cross_entropy-soft"]
)
def test_many_steps_match_torch(loss: str, shuffled: bool) -> None:
    for options in OPTIONS.values():
        training = SMALL._replace(loss=loss, shuffled=shuffled, options=options)
        assert_trains_as_torch(run, training)
    assert_trains_as_torch(run, SMALL._replace(loss=loss, frozen=(0, 3), batch=100))


def drawn(shuffled: bool = True) -> dict[str, Any]:
    data = Data(
        torch.randn(9, 3),
        torch.rand(9, 2),
        torch.randperm(9)[:7] if shuffled else None,
        None,
    )
    training = Training((3, 2), 7 if shuffled else 9, 4)
    return arguments(
        training, data, [torch.randn(2, 3), torch.randn(2)], [torch.zeros(2, 3), torch.zeros(2)]
    )


@pytest.mark.parametrize("shuffled", [False, True])
def test_opcheck(shuffled: bool) -> None:
    torch.library.opcheck(OP, (), drawn(shuffled))


@pytest.mark.parametrize("rows", [0, 1, 4, 5])
def test_shapes_are_inferred(rows: int) -> None:
    given = drawn()
    given["order"] = given["order"][:rows]
    meta = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    for name in ("parameters", "momentum_buffers"):
        meta[name] = [t.to("meta") for t in given[name]]
    assert OP(**meta).shape == OP(**given).shape == (-(-rows // 4),)


def test_versions_of_what_learns_go_up() -> None:
    given = drawn()
    before = [t._version for t in (*given["parameters"], *given["momentum_buffers"])]
    OP(**given)
    after = [t._version for t in (*given["parameters"], *given["momentum_buffers"])]
    assert all(b > a for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("size", [9, 2**62, 2**63 - 1])
def test_batch_size_may_be_any(size: int, shuffled: bool) -> None:
    given = drawn(shuffled) | {"batch_size": size}
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    for name in ("parameters", "momentum_buffers"):
        meta[name] = [t.to("meta") for t in given[name]]
    assert OP(**given).shape == OP(**meta).shape == (1,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be from 1 on, got 0"),
        ({"order": torch.zeros(3)}, TypeError, "order must be int64"),
        (
            {"order": torch.zeros(3, 1, dtype=torch.int64)},
            RuntimeError,
            r"order must be .*\[3, 1\]",
        ),
        ({"loss": "mae"}, ValueError, "loss must be one of mse"),
    ],
)
def test_errors_come_before_anything_changes(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = drawn()
    kept = [p.clone() for p in given["parameters"]]
    with pytest.raises(error, match=message):
        OP(**given | change)
    assert all(map(torch.equal, kept, given["parameters"]))
