"""A training that goes on too long, for the tests of fit with validation."""

from typing import Any

import torch
from references import Results
from torch import Tensor, nn

from mlp_ext import TrainStep


class Problem:
    """A network that learns and then overfits few, noisy rows. All of them start alike."""

    def __init__(self, dropout: float = 0.0, lr: float = 0.02) -> None:
        torch.manual_seed(1)
        layers = [nn.Linear(10, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 1)]
        self.model = nn.Sequential(*layers).double()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.criterion = nn.MSELoss()
        x = torch.randn(70, 10).double()
        y = x[:, :2].sum(1, keepdim=True) + torch.randn(70, 1)
        self.rows, self.held_out = (x[:30], y[:30]), (x[30:], y[30:])
        self.step = TrainStep(self.model, self.criterion, self.optimizer)

    def fit(self, epochs: int = 40, **options: Any) -> Any:
        return self.step.fit(*self.rows, epochs, **{"batch_size": 8, **options})

    def state(self) -> Results:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def rate(self) -> float:
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate


def mean_error(y: Tensor, target: Tensor) -> Tensor:
    return -(y - target).abs().mean()
