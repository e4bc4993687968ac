"""Many networks to compare with each alone."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from references import Results
from steps import Training, assert_runs_match, training
from torch import Tensor, nn

from mlp_ext import TrainStep, TrainSteps


class Many(NamedTuple):
    """Networks, what trains them, and their data: for all, or with a leading dimension for each."""

    models: list[Any]
    criterion: nn.Module
    optimizers: list[torch.optim.Optimizer]
    input: Tensor
    target: Tensor

    def each(self) -> list[Training]:
        """Every network with its data. Shares everything with this."""
        count = len(self.models)
        classes = not self.target.is_floating_point()
        flat = any(isinstance(module, nn.Flatten) for module in self.models[0])
        own_input = self.input.dim() == (4 if flat else 3)
        own_target = self.target.dim() == (2 if classes else 3)
        return [
            Training(
                self.models[i],
                self.criterion,
                self.optimizers[i],
                self.input[i] if own_input else self.input,
                self.target[i] if own_target else self.target,
            )
            for i in range(count)
        ]

    def chosen(self, indices: list[int]) -> Many:
        """These networks, with data for all."""
        models = [self.models[i] for i in indices]
        return Many(models, self.criterion, [self.optimizers[i] for i in indices], *self[3:])

    def to(self, dtype: torch.dtype) -> Many:
        """A copy in which all that is real is of `dtype`."""
        models, criterion, optimizers, x, y = deepcopy(self)
        for model, optimizer in zip(models, optimizers, strict=True):
            model.to(dtype)
            optimizer.load_state_dict(optimizer.state_dict())  # also of `dtype`
        y = y.to(dtype) if y.is_floating_point() else y
        return Many(models, criterion.to(dtype), optimizers, x.to(dtype), y)

    def alone(self) -> Callable[[Tensor, Tensor], list[Tensor]]:
        """A step of each, one after another."""
        steps = [TrainStep(*each[:3]) for each in self.each()]
        return lambda x, y: [step(x, y) for step in steps]

    def state(self) -> Results:
        """Parameters and optimizer states of all, by name."""
        return {f"{i}: {k}": v for i, e in enumerate(self.each()) for k, v in e.state().items()}


def many(
    count: int, net: str, loss: str, options: str, dtype: torch.dtype, reduction: str = "mean"
) -> Many:
    """Networks of their own values and learning rates, with data for all."""
    parts = [training(net, loss, options, dtype, reduction) for _ in range(count)]
    for i, part in enumerate(parts):
        for group in part.optimizer.param_groups:
            group["lr"] = group["lr"] * (1 - 0.5 * i / count)
    models, optimizers = [p.model for p in parts], [p.optimizer for p in parts]
    return Many(models, parts[0].criterion, optimizers, *parts[0][3:])


Run = Callable[[Many], Tensor]  # trains it, and returns losses whose last dimension is of networks


def steps_together(count: int) -> Run:
    def run(parts: Many) -> Tensor:
        steps = TrainSteps(*parts[:3])
        return torch.stack([steps(*parts[3:]) for _ in range(count)])

    return run


def steps_alone(count: int) -> Run:
    def run(parts: Many) -> Tensor:
        steps = [(TrainStep(*each[:3]), *each[3:]) for each in parts.each()]
        return torch.stack(
            [torch.stack([step(x, y) for step, x, y in steps]) for _ in range(count)]
        )

    return run


def assert_like_each_alone(
    parts: Many, steps: int, together: Run | None = None, alone: Run | None = None
) -> None:
    """As accurate as the TrainStep of each: see references.py.

    together, alone: what runs instead of this number of steps.
    """
    together, alone = together or steps_together(steps), alone or steps_alone(steps)
    dtype = parts.input.dtype
    results = []
    for run, of in ((alone, torch.float64), (alone, dtype), (together, dtype)):
        copy = parts.to(of)
        results.append({"losses": run(copy), **copy.state()})
    reference, native, found = results
    assert_runs_match(found, native, reference, steps, dtype)
