"""What the tests of libraries share: data, and a small network at each level of fuse."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import mlp_ext

close = torch.testing.assert_close
levels = pytest.mark.parametrize("level", ["layers", "stack"])
NATIVE = "native"


def net(
    level: str = NATIVE,
    widths: tuple[int, ...] = (8, 16, 16, 4),
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """An MLP with the same weights at each call."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return at(level, nn.Sequential(*layers[:-1]))


def at(level: str, model: nn.Module) -> nn.Module:
    return model if level == NATIVE else mlp_ext.fuse(model, level=level)


def rows(count: int = 10, width: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def classes(count: int = 10) -> Tensor:
    return torch.arange(count) % 4


class Body(nn.Module):
    """A model that only calls another, as libraries wrap them."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
