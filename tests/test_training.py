"""Ten steps of SGD with linear_act in place of torch's own: equal losses and gradients by name."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from references import Function, assert_as_accurate_as_native, native
from torch import Tensor, nn

import mlp_ext

NETS = {
    "10-5-1": ([10, 5, 1], ["relu", "sigmoid"], 10),
    "30-16-8-1": ([30, 16, 8, 1], ["relu", "tanh", "sigmoid"], 57),
    "64-128-10": ([64, 128, 10], ["sigmoid", "identity"], 100),
}
STEPS = 10


def trained(
    function: Function, layers: nn.ModuleList, activations: list[str], input: Tensor, target: Tensor
) -> dict[str, Tensor]:
    """The losses, each step's gradients and the final parameters, by name."""
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    losses: list[Tensor] = []
    found: dict[str, Any] = {}
    for step in range(STEPS):
        output = input
        for layer, activation in zip(layers, activations, strict=True):
            output = function(output, layer.weight, layer.bias, activation)
        loss = nn.functional.mse_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        found |= {f"step {step} {name}.grad": p.grad for name, p in layers.named_parameters()}
    found |= {name: p.detach() for name, p in layers.named_parameters()}
    return {"losses": torch.stack(losses), **found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("net", NETS)
def test_ten_sgd_steps_match_native(net: str, dtype: torch.dtype) -> None:
    widths, activations, rows = NETS[net]
    layers = nn.ModuleList(nn.Linear(k, n, dtype=dtype) for k, n in pairwise(widths))
    input, target = (
        torch.randn(rows, widths[0], dtype=dtype),
        torch.rand(rows, widths[-1], dtype=dtype),
    )

    found = trained(mlp_ext.linear_act, copy.deepcopy(layers), activations, input, target)
    expected = trained(native, copy.deepcopy(layers), activations, input, target)
    reference = trained(
        native, copy.deepcopy(layers).double(), activations, input.double(), target.double()
    )

    assert found["losses"][-1] < found["losses"][0]
    assert found.keys() == expected.keys()
    assert len(found) == 1 + 2 * len(layers) * (STEPS + 1)
    for name in expected:
        terms = reference[name].abs() + reference["losses"][0]
        assert_as_accurate_as_native(found[name], expected[name], reference[name], 4 * terms, name)
