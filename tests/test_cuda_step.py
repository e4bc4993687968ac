"""The kernel of whole training steps, in the CUDA model, trains as torch does."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_kernels import load_once
from cuda_steps import (
    OPTIONS,
    PLAIN,
    Training,
    assert_trains_as_torch,
    found_by,
    model_of_cuda,
)
from once import Once
from shapes import DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def kernels(once: Once) -> ctypes.CDLL:
    return load_once(once, "step")


SHAPES = [
    Training((1, 1), 1, 1),
    Training((10, 5, 1), 10, 10),
    Training((3, 17, 5), 33, 14),  # three steps, the last one short
    Training((33, 64, 20, 7), 70, 70),
    Training((2, 3), 100, 64, shuffled=False),  # tiles of rows, the last one short
    Training((4, 3, 3, 3, 3, 3, 3, 3, 2), 9, 4),  # as many layers as fit
    Training((5, 4, 3), 12, 5, bias=False),
    Training((40, 30), 33, 33, options=PLAIN),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", SHAPES, ids=str)
def test_steps_match_torch(training: Training, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    assert_trains_as_torch(model_of_cuda(kernels), training._replace(dtype=dtype))


SMALL = Training((6, 5, 4), 40, 36, hidden="tanh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["mse", "bce", "bce_with_logits", "cross_entropy-soft"])
def test_losses_match_torch(
    loss: str, reduction: str, dtype: torch.dtype, kernels: ctypes.CDLL
) -> None:
    options = OPTIONS["plain"] | {"lr": 0.1 if reduction == "mean" else 0.001}
    training = SMALL._replace(loss=loss, reduction=reduction, dtype=dtype, options=options)
    assert_trains_as_torch(model_of_cuda(kernels), training)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["cross_entropy", "cross_entropy-soft"])
def test_cross_entropy_matches_torch(
    loss: str, reduction: str, weighted: bool, smoothing: float, kernels: ctypes.CDLL
) -> None:
    more = {"options": {"lr": 0.01}, "weighted": weighted, "smoothing": smoothing}
    training = SMALL._replace(loss=loss, reduction=reduction, **more)
    assert_trains_as_torch(model_of_cuda(kernels), training)


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_sgd_match_torch(options: str, kernels: ctypes.CDLL) -> None:
    for dtype in DTYPES:
        training = SMALL._replace(options=OPTIONS[options], dtype=dtype, hidden="sigmoid")
        assert_trains_as_torch(model_of_cuda(kernels), training)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2, 3), (0, 1, 2), (0, 1, 2, 3)], ids=str)
def test_frozen_parameters_stay(frozen: tuple[int, ...], kernels: ctypes.CDLL) -> None:
    assert_trains_as_torch(model_of_cuda(kernels), SMALL._replace(frozen=frozen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_steps_at_once_are_as_many_launches(dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    training = Training((6, 5, 2), 20, 7, "cross_entropy", dtype=dtype)
    together = found_by(model_of_cuda(kernels), training)

    def one_by_one(t, data, parameters, buffers):  # type: ignore[no-untyped-def]
        run = model_of_cuda(kernels)
        losses = [
            run(t._replace(rows=len(rows)), data._replace(order=rows), parameters, buffers)
            for rows in data.order.split(t.batch)
        ]
        return torch.cat(losses)

    apart = found_by(one_by_one, training)
    assert all(torch.equal(together[name], apart[name]) for name in together)


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits", "cross_entropy"])
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_special_values_spread_as_in_torch(special: float, loss: str, kernels: ctypes.CDLL) -> None:
    for rows in (8, 5):  # in the last batch, and in none
        training = Training((3, 2, 2), rows, 4, loss, shuffled=False, special=special)
        assert_trains_as_torch(model_of_cuda(kernels), training)


@pytest.mark.parametrize(
    ("loss", "wrong", "message"),
    [("cross_entropy", 2, "not a class"), ("cross_entropy", -1, "not a class"),
     ("bce", 1.5, "not a probability"), ("bce", torch.nan, "not a probability")],
)  # fmt: skip
def test_the_device_asserts_what_torch_asserts(
    loss: str, wrong: float, message: str, kernels: ctypes.CDLL
) -> None:
    training = Training((3, 2), 8, 4, loss, shuffled=False)

    def run(t, data, *rest):  # type: ignore[no-untyped-def]
        data.target[6] = wrong
        return model_of_cuda(kernels)(t, data, *rest)

    with pytest.raises(AssertionError, match=message):
        found_by(run, training)


def test_the_order_is_of_rows_that_exist(kernels: ctypes.CDLL) -> None:
    training = Training((3, 2), 8, 4)

    def run(t, data, *rest):  # type: ignore[no-untyped-def]
        data.order[6] = len(data.input)
        return model_of_cuda(kernels)(t, data, *rest)

    with pytest.raises(AssertionError, match="not a row of the input"):
        found_by(run, training)
