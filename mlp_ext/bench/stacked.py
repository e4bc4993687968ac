"""Peers for many networks: their parameters stacked, by vmap or by batched GEMMs and autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mlp_ext.bench.compiled_step import OPTIONS, UPDATES, Group

# Stacked parameters, input [M, K], target [M, N] -> gradients and losses [E].
Gradients = Callable[[list[Tensor], Tensor, Tensor], tuple[Sequence[Tensor], Tensor]]
Models = Sequence[nn.Module]
Optimizers = Sequence[torch.optim.Optimizer]


def vmap_gradients(models: Models, criterion: nn.Module) -> Gradients:
    """torch.func, as its tutorial on ensembles has it."""
    names = [name for name, _ in models[0].named_parameters()]

    def loss(parameters: list[Tensor], input: Tensor, target: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        found: Tensor = criterion(torch.func.functional_call(models[0], named, (input,)), target)
        return found

    of_each = torch.vmap(torch.func.grad_and_value(loss), in_dims=(0, None, None))
    return cast(Gradients, of_each)


def bmm_gradients(models: Models, criterion: nn.Module) -> Gradients:
    """MSELoss of a Sequential, whose Linear layers are one baddbmm for all networks."""
    modules = list(cast(nn.Sequential, models[0]))

    def gradients(
        parameters: list[Tensor], input: Tensor, target: Tensor
    ) -> tuple[Sequence[Tensor], Tensor]:
        leaves = [p.detach().requires_grad_() for p in parameters]
        rest, y = iter(leaves), input.expand(len(models), *input.shape)
        for module in modules:
            if isinstance(module, nn.Linear):
                weight, bias = next(rest), next(rest)  # [E, N, K], [E, N]
                y = torch.baddbmm(bias.unsqueeze(1), y, weight.mT)
            else:
                y = module(y)
        differences = nn.functional.mse_loss(y, target.expand_as(y), reduction="none")
        losses = differences.mean((1, 2))
        return torch.autograd.grad(losses.sum(), leaves), losses.detach()

    return gradients


class StackedStep:
    """A step of all networks, on stacked copies of their parameters and learning rates."""

    _parameters: list[Tensor]  # [E, ...] of each
    _states: list[list[Tensor]]  # of the optimizer, for each
    _options: list[Group]  # for each, with the learning rates as lr

    def __init__(
        self,
        gradients: Callable[[Models, nn.Module], Gradients],
        compile: Callable[[Callable[..., Any]], Callable[..., Any]],
        models: Models,
        criterion: nn.Module,
        optimizers: Optimizers,
    ) -> None:
        self._models, self._optimizers = models, optimizers
        self._update = UPDATES[type(optimizers[0])]
        self._step = compile(partial(_step, gradients(models, criterion), self._update.function))
        self.load()

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        stacks = (self._parameters, self._states, self._options)
        losses: Tensor = self._step(*stacks, self._t, input, target)
        return losses

    def load(self) -> None:
        """Copies the models' parameters and the options; the optimizer's states start at zero."""
        stacks, _ = torch.func.stack_module_state(list(self._models))
        self._parameters = [stack.detach() for stack in stacks.values()]
        self._states = [
            [torch.zeros_like(p) for _ in self._update.states] for p in self._parameters
        ]
        self._t = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        groups = [optimizer.param_groups[0] for optimizer in self._optimizers]
        shared = {name: groups[0][name] for name in OPTIONS if name in groups[0]}
        rates = self._parameters[0].new_tensor([group["lr"] for group in groups])
        self._options = [
            {**shared, "lr": rates.view(-1, *[1] * (p.dim() - 1))} for p in self._parameters
        ]

    def save(self) -> None:
        """Copies the parameters back to the models."""
        with torch.no_grad():
            for i, model in enumerate(self._models):
                own = [p[i] for p in self._parameters]
                torch._foreach_copy_(list(model.parameters()), own)


def _step(
    gradients_of: Gradients,
    update: Callable[..., None],
    parameters: list[Tensor],
    states: list[list[Tensor]],
    options: list[Group],
    t: Tensor,
    input: Tensor,
    target: Tensor,
) -> Tensor:
    gradients, losses = gradients_of(parameters, input, target)
    t += 1  # Dynamo in torch 2.13 drops t.add_(1)
    for p, gradient, group, state in zip(parameters, gradients, options, states, strict=True):
        update(p, gradient, group, t, *state)
    return losses
