"""predict: the outputs of each model, whatever stands beside it."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from references import assert_as_accurate_as_native
from steps import make_net
from torch import Tensor, nn

import mlp_ext
from mlp_ext import predict
from mlp_ext.nn import LinearAct

pytestmark = pytest.mark.usefixtures("one_thread", "small_heap")


def as_alone(models: list[Any], x: Tensor) -> None:
    found = predict(models, x)
    assert not found.requires_grad
    inputs = x if x.dim() == 3 else [x] * len(models)
    with torch.no_grad():
        for y, model, own in zip(found, models, inputs, strict=True):
            assert_as_accurate_as_native(y, model(own), deepcopy(model).double()(own.double()))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("count", [1, 3, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [[10, 5, 1], [3, 17, 5], [40, 300, 300, 4]], ids=str)
def test_outputs(widths: list[int], dtype: torch.dtype, count: int, own: bool) -> None:
    count = min(count, 5) if widths[1] == 300 else count
    models = [make_net(widths).to(dtype) for _ in range(count)]
    shape = (count, 20, widths[0]) if own else (20, widths[0])
    as_alone(models, torch.randn(shape).to(dtype))


@pytest.mark.parametrize("activation", [*LinearAct.by_module], ids=lambda kind: kind.__name__)
def test_every_activation(activation: type[nn.Module]) -> None:
    as_alone([nn.Sequential(nn.Linear(4, 3), activation()) for _ in range(3)], torch.randn(7, 4))


@pytest.mark.parametrize("rows", [0, 1, 5000])
def test_numbers_of_rows(rows: int) -> None:
    models = [make_net([4, 3, 2]) for _ in range(4)]
    assert predict(models, torch.randn(rows, 4)).shape == (4, rows, 2)
    as_alone(models, torch.randn(max(rows, 1), 4))


def test_other_forms_of_models() -> None:
    models = [
        nn.Sequential(
            nn.Flatten(), nn.Linear(12, 5, bias=False), nn.ReLU(), nn.Dropout(), nn.Linear(5, 2)
        )
        for _ in range(3)
    ]
    models[1] = mlp_ext.fuse(models[1])
    for model in models:
        model.eval()
    x = torch.randn(8, 3, 4)
    expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(predict(models, x), expected)
    torch.testing.assert_close(predict(models, x.expand(3, 8, 3, 4)), expected)


def changed_weight(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))


def trained(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].weight.add_(1)


def other_activation(model: nn.Sequential) -> None:
    model[1] = nn.Tanh()


def other_option(model: nn.Sequential) -> None:
    model[1].negative_slope = 0.7


@pytest.mark.parametrize("change", [changed_weight, trained, other_activation, other_option])
def test_changes_are_followed(change: Callable[[nn.Sequential], None]) -> None:
    models = [nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(), nn.Linear(3, 2)) for _ in range(3)]
    x = torch.randn(5, 4)
    before = predict(models, x)
    for model in models:
        change(model)
    assert not torch.equal(predict(models, x), before)
    as_alone(models, x)


def hooked() -> list[Any]:
    models = [make_net([4, 3, 2]) for _ in range(3)]
    predict(models, torch.randn(2, 4))
    models[2].register_forward_hook(lambda *_: None)
    return models


def in_training() -> list[Any]:
    models = [nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.Linear(3, 2)) for _ in range(2)]
    for model in models:
        model.eval()
    predict(models, torch.randn(2, 4))
    models[1].train()
    return models


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (list, "ValueError: predict: models must be at least one, got an empty list"),
    "one": (lambda: make_net([4, 2]), "TypeError: predict: models must be a list, got torch.nn"),
    "widths": (
        lambda: [make_net([4, 2]), make_net([4, 3])],
        "ValueError: predict: models must be alike, and widths: 4-3 in models[1], 4-2 in models[0]",
    ),
    "hooks": (hooked, "ValueError: predict: models[2] has forward hooks; "),
    "dropout": (
        in_training,
        "ValueError: predict: models[1] has a Dropout in training mode; call ",
    ),
    "module": (lambda: [nn.Sequential(nn.LSTM(4, 2))], "TypeError: predict: models[0].0 is a "),
    "input": (
        lambda: [make_net([5, 2])],
        "RuntimeError: predict: input must be [M, K=5] for all networks or [E=1, M, K=5] for each ",
    ),
    "dtype": (
        lambda: [make_net([4, 2]).double()],
        "RuntimeError: predict: input is float32, the model float64; pass input.double()",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    models = make()
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        predict(models, torch.randn(2, 4))
    assert re.match(re.escape(message), f"{type(caught.value).__name__}: {caught.value}")


def test_models_are_not_kept_alive() -> None:
    models = [make_net([4, 3, 2]) for _ in range(2)]
    predict(models, torch.randn(2, 4))
    gone = [weakref.ref(models[0]), weakref.ref(models[0][0].weight)]
    del models
    gc.collect()
    assert not any(ref() for ref in gone)
