"""torch_geometric: its Linear, MLP and GIN, whose layers are written in code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from clients import NATIVE, at, close, levels, rows
from torch import Tensor, nn
from torch_geometric.nn import GIN, MLP, DeepSetsAggregation, GINConv, Sequential

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 0]])


def gin_conv() -> nn.Module:
    inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    return Sequential("x, edges", [(GINConv(inner), "x, edges -> x"), nn.Linear(16, 4)])


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "MLP": (lambda: MLP([8, 16, 16, 4], norm=None, dropout=0.2), False),
    "MLP_batch_norm": (lambda: MLP([8, 16, 16, 4]), False),
    "MLP_act_first": (lambda: MLP([8, 16, 4], act_first=True, norm=None), False),
    "MLP_no_plain_last": (lambda: MLP([8, 16, 4], act="elu", norm=None, plain_last=False), False),
    "GIN": (lambda: GIN(8, 16, 2, 4, norm=None), True),
    "GINConv": (gin_conv, True),
    "DeepSets": (
        lambda: DeepSetsAggregation(MLP([8, 16, 8], norm=None), MLP([8, 8, 4], norm=None)),
        False,
    ),
}


def results(model: nn.Module, edges: bool, training: bool) -> dict[str, Any]:
    model.train(training)
    model.zero_grad()
    torch.manual_seed(2)
    x = rows(7).requires_grad_()
    output: Tensor = model(x, EDGES) if edges else model(x)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output, "input": x.grad, **gradients, **dict(model.named_buffers())}


@levels
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:fuse changed nothing")
def test_model(level: str, name: str) -> None:
    make, edges = MODELS[name]
    models = []
    for kind in (NATIVE, level):
        torch.manual_seed(0)
        models.append(at(kind, make()))
    assert type(models[1]).__name__ == type(models[0]).__name__
    assert [*models[1].state_dict()] == [*models[0].state_dict()]
    for training in (True, False, True):
        close(results(models[1], edges, training), results(models[0], edges, training))
    for model in models:
        model.reset_parameters()
        torch.manual_seed(3)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)  # results of size 1, whose rounding is below the tolerance
    close(results(models[1], edges, False), results(models[0], edges, False), rtol=1e-4, atol=1e-4)
