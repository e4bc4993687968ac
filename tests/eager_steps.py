"""TrainStep as written in torch, with clipping and groups, and what both come to."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlp_ext import TrainStep

STEPS = 20
TOLERANCES = {torch.bfloat16: {"rtol": 0.05, "atol": 1e-3}}


class Thin(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Only calls its child."""
        return self.body(x)


def net(*first: nn.Module, dropout: float = 0.0) -> nn.Sequential:
    between = [nn.Dropout(dropout)] if dropout else []
    layers = [nn.Linear(8, 16), nn.ReLU(), *between, nn.Linear(16, 12), nn.GELU(), *between]
    return nn.Sequential(*first, *layers, nn.Linear(12, 4))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, dampening=0.1)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


class Eager:
    """TrainStep as written in torch."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        accumulate: int = 1,
    ) -> None:
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.max_norm, self.accumulate, self.count = max_norm, accumulate, 0

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        if self.count == 0:
            self.optimizer.zero_grad()
        loss = self.criterion(self.model(input), target)
        (loss / self.accumulate).backward()
        self.count += 1
        if self.count == self.accumulate:
            self.update()
        return loss.detach()

    def update(self) -> None:
        self.count = 0
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()

    def fit(
        self,
        input: Tensor,
        target: Tensor,
        epochs: int = 50,
        batch_size: int | None = None,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        n, losses = len(input), []
        for _ in range(epochs):
            order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
            batches = order.split(batch_size or max(n, 1))
            each = torch.stack([self(input[rows], target[rows]) for rows in batches]).double()
            if getattr(self.criterion, "reduction", "mean") == "mean":
                each = each * torch.tensor([len(rows) for rows in batches]) / n
            losses.append(each.sum())
        if self.count:
            self.update()
        return torch.stack(losses).to(torch.promote_types(input.dtype, torch.float32))


def results(
    make: Any,
    model: nn.Module,
    criterion: Any,
    optimizer: Callable[..., torch.optim.Optimizer],
    data: list[tuple[Tensor, Tensor]],
    **settings: Any,
) -> dict[str, Tensor]:
    model = deepcopy(model)
    chosen = optimizer(model.parameters())
    step = make(model, criterion, chosen, **settings)
    torch.manual_seed(1)
    found = {"losses": torch.stack([step(x, y) for x, y in data])}
    return found | state_of(model, chosen)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = dict(deepcopy(model).state_dict())
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{key} of {name}"] = value.clone()
    return found


def assert_equal(ours: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def assert_as_eager(
    model: nn.Module,
    criterion: Any = F.mse_loss,
    optimizer: Any = sgd,
    x: Callable[[], Tensor] = lambda: torch.randn(10, 8),
    y: Callable[[], Tensor] = lambda: torch.rand(10, 4),
    **settings: Any,
) -> None:
    data = [(x(), y()) for _ in range(STEPS)]
    found, expected = (
        results(make, model, criterion, optimizer, data, **settings) for make in (TrainStep, Eager)
    )
    assert_equal(found, expected)
