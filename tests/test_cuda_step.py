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

from mlp_ext.nn import Activation

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


SMALL = Training((6, 5, 4), 40, 36, hidden=Activation("tanh"))
# A loss that adds or scales by other numbers than its defaults, too.
LOSSES: list[tuple[str, dict[str, float], bool]] = [
    ("mse", {}, False),
    ("bce", {}, False),
    ("bce_with_logits", {}, False),
    ("bce_with_logits", {}, True),
    ("l1", {}, False),
    ("smooth_l1", {"beta": 0.3}, False),
    ("huber", {"delta": 0.2}, False),
    ("cross_entropy", {}, False),
    ("cross_entropy", {"label_smoothing": 0.1}, True),
    ("cross_entropy-soft", {}, True),
    ("cross_entropy-soft", {"label_smoothing": 0.1}, False),
    ("nll", {}, False),
    ("nll", {"ignore_index": 1}, True),
]


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("loss", "options", "weighted"), LOSSES)
def test_losses_match_torch(
    loss: str, options: dict[str, float], weighted: bool, reduction: str, kernels: ctypes.CDLL
) -> None:
    chosen = {"lr": 0.02 if reduction == "mean" else 0.0005}
    training = SMALL._replace(
        loss=loss, loss_options=options, weighted=weighted, reduction=reduction, options=chosen
    )
    for dtype in DTYPES if reduction == "mean" else DTYPES[:1]:
        assert_trains_as_torch(model_of_cuda(kernels), training._replace(dtype=dtype))


@pytest.mark.parametrize("options", OPTIONS)
def test_optimizers_match_torch(options: str, kernels: ctypes.CDLL) -> None:
    """Two steps, each parameter with its own lr, after three by torch."""
    name, chosen = OPTIONS[options]
    for dtype in DTYPES:
        training = SMALL._replace(optimizer=name, options=chosen, dtype=dtype)
        assert_trains_as_torch(model_of_cuda(kernels), training)


@pytest.mark.parametrize("options", ["adam-amsgrad", "adagrad"])
@pytest.mark.parametrize("count", [torch.float32, torch.float64], ids=str)
def test_counts_of_steps_may_be_on_the_device(
    count: torch.dtype, options: str, kernels: ctypes.CDLL
) -> None:
    name, chosen = OPTIONS[options]
    training = SMALL._replace(optimizer=name, options=chosen, batch=13, device_count=count)
    here = found_by(model_of_cuda(kernels), training._replace(device_count=None))
    there = found_by(model_of_cuda(kernels), training)
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert torch.equal(value.double(), there[name].double()), name


ACTIVATIONS = [
    Activation("identity"),
    Activation("sigmoid"),
    Activation("leaky_relu", (0.2,)),
    Activation("leaky_relu", (-0.5,)),  # needs z
    Activation("elu", (0.7,)),
    Activation("silu"),
    Activation("gelu"),
    Activation("softplus", (2.0, 1.5)),
    Activation("hardtanh", (-0.25, 0.5)),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: "-".join(map(str, a)))
def test_activations_match_torch(activation: Activation, kernels: ctypes.CDLL) -> None:
    """Hidden and last, before a loss of elements and one of rows, in more rows than fit at once."""
    training = SMALL._replace(hidden=activation, last=activation, widths=(6, 5, 7, 4))
    for loss in ("mse", "cross_entropy"):
        for dtype in (torch.float32, torch.bfloat16):
            assert_trains_as_torch(
                model_of_cuda(kernels), training._replace(loss=loss, dtype=dtype)
            )


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2, 3), (0, 1, 2), (0, 1, 2, 3)], ids=str)
def test_frozen_parameters_stay(frozen: tuple[int, ...], kernels: ctypes.CDLL) -> None:
    assert_trains_as_torch(model_of_cuda(kernels), SMALL._replace(frozen=frozen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_steps_at_once_are_as_many_launches(dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    name, chosen = OPTIONS["adam-amsgrad"]
    training = Training((6, 5, 2), 20, 7, "cross_entropy", "mean", name, chosen, dtype)
    together = found_by(model_of_cuda(kernels), training)

    def one_by_one(t, data, parameters, states):  # type: ignore[no-untyped-def]
        run = model_of_cuda(kernels)
        losses = [
            run(t._replace(rows=len(rows)), data._replace(order=rows), parameters, states)
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
