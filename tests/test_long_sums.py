"""Sums over many rows keep their digits, on each path of the plan."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from references import Function, assert_as_accurate_as_native, native, results
from torch import Tensor, nn

import mlp_ext
from mlp_ext import _C
from mlp_ext.bench.plans import LAYER_PATHS

ROWS = 1 << 21
TOLERANCE = 4 * torch.finfo(torch.float32).eps  # relative; plain sums in float32 are 4e-5 off
PATHS = {  # of backward: K, N
    "tall": (9, 8),
    "narrow": (4, 8),
    "one_input": (1, 16),
    "one_output": (9, 1),
}


@pytest.mark.parametrize("path", PATHS)
def test_bias_gradient_of_millions_of_rows(path: str) -> None:
    """Of equal terms, whose roundings all go the same way."""
    K, N = PATHS[path]
    assert _C.plan(ROWS, K, N, 4, torch.get_num_threads())["backward_path"] == path
    bias = torch.zeros(N, requires_grad=True)
    weight = torch.zeros(N, K, requires_grad=True)  # else backward knows no K
    output = mlp_ext.linear_act(torch.zeros(ROWS, K), weight, bias, "identity")
    output.backward(torch.full((), 0.1).expand_as(output))
    exact = ROWS * torch.tensor(0.1).double()
    assert ((bias.grad.double() - exact) / exact).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("K", "N"), [(600, 600), (1030, 20)], ids=["packed", "packed_with_few_outputs"]
)
def test_bias_gradient_of_packed_products(K: int, N: int) -> None:
    rows = 20_000
    bias, weight = torch.zeros(N, requires_grad=True), torch.zeros(N, K, requires_grad=True)
    output = mlp_ext.linear_act(torch.zeros(rows, K), weight, bias, "identity")
    _C.force_paths(None, "packed")  # on some processors the library is faster
    try:
        output.backward(torch.full((), 0.1).expand_as(output))
    finally:
        _C.force_paths(None, None)
    exact = rows * torch.tensor(0.1).double()
    assert ((bias.grad.double() - exact) / exact).abs().max() < TOLERANCE


@pytest.mark.parametrize("widths", [(2, 4, 1), (600, 8)], ids=["blocks", "layers"])
def test_a_step_of_many_rows_updates_the_bias_exactly(widths: tuple[int, ...]) -> None:
    rows = (1 << 21) if len(widths) == 3 else 20_000
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    criterion = nn.MSELoss(reduction="sum")
    target = torch.full((), 0.05).expand(rows, widths[-1]).contiguous()
    mlp_ext.TrainStep(model, criterion, optimizer)(torch.zeros(rows, widths[0]), target)
    exact = 2 * rows * torch.tensor(0.05).double()
    last = model[-1]
    assert isinstance(last, nn.Linear)
    assert ((last.bias.detach().double() - exact) / exact).abs().max() < TOLERANCE


def test_biases_beyond_what_one_piece_sums_are_cut() -> None:
    limit = 1 << 18
    assert _C.plan(0, 3, 3 * limit, 4, 1)["grad_weight"][0] == 3
    assert _C.plan(64, 32, limit + 1, 4, 1)["grad_weight"][0] == 2
    weight = torch.zeros(limit + 5, 1, requires_grad=True)
    bias = torch.zeros(limit + 5, requires_grad=True)
    mlp_ext.linear_act(torch.ones(8, 1), weight, bias, "relu").sum().backward()
    assert bias.grad is not None
    assert not bias.grad.any()
    mlp_ext.linear_act(torch.ones(9, 1), weight, bias, "identity").sum().backward()
    assert bias.grad.eq(9).all()


@pytest.mark.parametrize("rows", [112, 2048])
def test_loss_of_equal_terms_keeps_its_digits(rows: int) -> None:
    """As at the start of training, where all outputs are near 0."""
    model = nn.Linear(8, 400)
    nn.init.normal_(model.weight, std=1e-3)
    nn.init.zeros_(model.bias)
    x, target = torch.randn(rows, 8), torch.rand(rows, 400)
    criterion = nn.BCEWithLogitsLoss()
    exact = criterion(model(x).double(), target.double()).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = mlp_ext.TrainStep(model, criterion, optimizer)(x, target)
    assert ((loss.double() - exact) / exact).abs() < TOLERANCE


MILLION = 1_000_000
SUMS = [  # M, K, N and the result whose sums are long
    (1, MILLION, 1, "output"),
    (3, MILLION, 4, "output"),
    (1, 1 << 16, 1, "output"),
    (2, 3, MILLION, "input"),
    (12, 128, MILLION // 10, "input"),
    (MILLION, 1, 4, "weight"),
    (MILLION, 4, 1, "weight"),
    (MILLION, 4, 4, "weight"),
    (MILLION // 10, 200, 8, "weight"),
]


@pytest.mark.parametrize(("M", "K", "N", "result"), SUMS)
def test_each_path_sums_a_million_terms_as_accurately_as_torch(
    M: int, K: int, N: int, result: str
) -> None:
    """Equal terms, whose roundings all go the same way."""
    way = "forward_path" if result == "output" else "backward_path"

    def value(function: Function, dtype: torch.dtype = torch.float32) -> Tensor:
        x, w, dy = (torch.full(s, 0.1).to(dtype) for s in ((M, K), (N, K), (M, N)))
        leaves = {"input": x, "weight": w}
        return results(function, leaves, "identity", None if result == "output" else dy)[result]

    expected, exact = value(native), value(native, torch.float64)
    for path in LAYER_PATHS:
        if _C.plan(M, K, N, 4, 1, forward=path, backward=path)[way] != path:
            continue
        _C.force_paths(path, path)
        try:
            found = value(mlp_ext.linear_act)
        finally:
            _C.force_paths(None, None)
        assert_as_accurate_as_native(found, expected, exact, name=path)


def test_a_step_of_a_million_rows_is_as_accurate_as_torchs() -> None:
    """The gradient of W, of equal terms: path blocks."""
    K, N = 20, 16
    assert _C.step_plan([K, N], MILLION, 4, 1)["path"] == "blocks"
    model = nn.Linear(K, N)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, target = torch.full((MILLION, K), 0.1), torch.full((MILLION, N), 0.05)
    expected = (-2 * target).T @ x
    exact = (-2 * target).double().T @ x.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mlp_ext.TrainStep(model, nn.MSELoss(reduction="sum"), optimizer)(x, target)
    assert_as_accurate_as_native(-model.weight.detach(), expected, exact)
