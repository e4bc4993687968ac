"""Steps of narrow networks, alone and many at once, at the edges of their kernels."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import mlp_ext
from mlp_ext import _C, TrainStep, TrainSteps

close = torch.testing.assert_close


def mlp(*widths: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = [m for k, n in pairwise(widths) for m in (nn.Linear(k, n), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def eager(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The parameters after a step."""
    optimizer = sgd(model)
    criterion(model(x), y).backward()
    optimizer.step()
    return [*model.parameters()]


@pytest.mark.parametrize("rows", [16, 33, 2049])
@pytest.mark.parametrize("criterion", [nn.BCEWithLogitsLoss, nn.CrossEntropyLoss])
def test_weighted_losses_with_a_row_in_each_lane(criterion: type[nn.Module], rows: int) -> None:
    model, weight = mlp(6, 8, 16), torch.rand(16, dtype=torch.float64)
    assert _C.step_plan([6, 8, 16], rows, 8, 1)["path"] == "lanes"
    x = torch.randn(rows, 6, dtype=torch.float64)
    if criterion is nn.CrossEntropyLoss:
        loss, y = nn.CrossEntropyLoss(weight), torch.randint(16, (rows,))
    else:
        loss, y = nn.BCEWithLogitsLoss(pos_weight=weight), torch.rand(rows, 16, dtype=torch.float64)
    expected = eager(deepcopy(model), loss, x, y)
    TrainStep(model, loss, sgd(model))(x, y)
    close([*model.parameters()], expected)


@pytest.mark.parametrize("rows", [16, 17, 33])
def test_infinite_weight_of_a_dead_unit_makes_no_nan(rows: int) -> None:
    model = mlp(3, 4, 2)
    with torch.no_grad():
        model[0].weight[1] = -torch.inf
    x, y = torch.rand(rows, 3, dtype=torch.float64) + 0.1, torch.rand(rows, 2, dtype=torch.float64)
    expected = eager(deepcopy(model), nn.MSELoss(), x, y)
    TrainStep(model, nn.MSELoss(), sgd(model))(x, y)
    assert not model[2].weight.isnan().any()
    close(model[2].weight, expected[2])


@pytest.mark.parametrize("layers", [32, 33])
def test_many_layers(layers: int) -> None:
    models = [mlp(*[2] * (layers + 1)) for _ in "abc"]
    x, y = torch.randn(2, 8, 2, dtype=torch.float64)
    alone = deepcopy(models)
    TrainSteps(models, nn.MSELoss(), [*map(sgd, models)]).fit(x, y, epochs=3)
    for model, other in zip(models, alone, strict=True):
        TrainStep(other, nn.MSELoss(), sgd(other)).fit(x, y, epochs=3)
        close(model.state_dict(), other.state_dict())


def test_losses_of_networks_with_fewer_rows() -> None:
    models = [mlp(5, 4, 1) for _ in range(6)]
    alone = deepcopy(models)
    x, y = torch.randn(100, 5, dtype=torch.float64), torch.randn(100, 1, dtype=torch.float64)
    rows = [torch.randperm(100)[: 40 if i % 2 else 100] for i in range(6)]
    steps = TrainSteps(models, nn.MSELoss(), [*map(sgd, models)])
    for epochs in (1, 7, 50):
        found = steps.fit(x, y, epochs=epochs, batch_size=10, rows=rows)
        for i, model in enumerate(alone):
            step = TrainStep(model, nn.MSELoss(), sgd(model))
            close(found[:, i], step.fit(x[rows[i]], y[rows[i]], epochs=epochs, batch_size=10))


@pytest.mark.parametrize("widths", [(5, 4, 1), (64, 64, 1)])
def test_parameters_that_are_not_contiguous_on_two_threads(widths: tuple[int, ...]) -> None:
    models = [mlp(*widths) for _ in range(40)]
    for model in models:
        model[0].weight.data = model[0].weight.detach().t().contiguous().t()
    alone = deepcopy(models)
    x, y = torch.randn(8, widths[0]).double(), torch.randn(8, 1).double()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    TrainSteps(models, nn.MSELoss(), [*map(sgd, models)])(x, y)
    torch.set_num_threads(before)
    for model, other in zip(models, alone, strict=True):
        close([*model.parameters()], eager(other, nn.MSELoss(), x, y))


@pytest.mark.parametrize("outputs", [300, 70_000])
def test_gradient_of_the_bias_alone_of_few_rows(outputs: int) -> None:
    x, w = torch.randn(2, 8), torch.randn(outputs, 8)
    b = torch.randn(outputs, requires_grad=True)
    _C.force_paths(None, "few_rows")
    try:
        y = mlp_ext.linear_relu(x, w, b)
        y.sum().backward()
    finally:
        _C.force_paths(None, None)
    close(b.grad, (y > 0).float().sum(0))
