"""A peer: the whole training step, from forward to update, as one graph of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mlp_ext.bench.training import Step

Group = dict[str, Any]  # a param_group
OPTIONS = ("lr", "betas", "alpha", "eps", "weight_decay")  # those that the updates read


def _sgd(p: Tensor, g: Tensor, group: Group, t: Tensor) -> None:
    p.sub_(group["lr"] * g)


def _adam(p: Tensor, g: Tensor, group: Group, t: Tensor, m: Tensor, v: Tensor) -> None:
    beta1, beta2 = group["betas"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = v.sqrt() / (1 - beta2**t).sqrt() + group["eps"]
    p.sub_(group["lr"] / (1 - beta1**t) * m / root)


def _adamw(p: Tensor, g: Tensor, group: Group, t: Tensor, m: Tensor, v: Tensor) -> None:
    p.mul_(1 - group["lr"] * group["weight_decay"])
    _adam(p, g, group, t, m, v)


def _rmsprop(p: Tensor, g: Tensor, group: Group, t: Tensor, square: Tensor) -> None:
    square.mul_(group["alpha"]).addcmul_(g, g, value=1 - group["alpha"])
    p.addcdiv_(group["lr"] * g, square.sqrt().add_(group["eps"]), value=-1)


def _adagrad(p: Tensor, g: Tensor, group: Group, t: Tensor, total: Tensor) -> None:
    total.addcmul_(g, g)
    p.addcdiv_(group["lr"] * g, total.sqrt().add_(group["eps"]), value=-1)


class Update(NamedTuple):
    """torch.optim's update of a parameter in place, with its default options.

    Only lr may be a tensor.
    """

    function: Callable[..., None]
    states: tuple[str, ...] = ()  # torch.optim's names


UPDATES: dict[type[torch.optim.Optimizer], Update] = {
    torch.optim.SGD: Update(_sgd),
    torch.optim.Adam: Update(_adam, ("exp_avg", "exp_avg_sq")),
    torch.optim.AdamW: Update(_adamw, ("exp_avg", "exp_avg_sq")),
    torch.optim.RMSprop: Update(_rmsprop, ("square_avg",)),
    torch.optim.Adagrad: Update(_adagrad, ("sum",)),
}


def compiled_step(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """One graph, and one step count for all parameters. State is kept in optimizer.state."""
    update, names = UPDATES[type(optimizer)], [name for name, _ in model.named_parameters()]
    parameters = [p.detach() for p in model.parameters()]  # share memory
    t = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    states = []
    for p in model.parameters():
        optimizer.state[p] = {
            "step": t,
            **{name: torch.zeros_like(p.detach()) for name in update.states},
        }
        states.append([optimizer.state[p][name] for name in update.states])
    (group,) = optimizer.param_groups

    def loss(parameters: list[Tensor], input: Tensor, target: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        found: Tensor = criterion(torch.func.functional_call(model, named, (input,)), target)
        return found

    def step(
        parameters: list[Tensor],
        states: list[list[Tensor]],
        t: Tensor,
        input: Tensor,
        target: Tensor,
        options: Group,
    ) -> Tensor:
        gradients, value = torch.func.grad_and_value(loss)(parameters, input, target)
        t += 1  # Dynamo in torch 2.13 drops t.add_(1)
        for p, gradient, state in zip(parameters, gradients, states, strict=True):
            update.function(p, gradient, options, t, *state)
        return cast(Tensor, value)

    compiled = torch.compile(step, dynamic=False, fullgraph=True)
    used = [name for name in OPTIONS if name in group]

    def call(input: Tensor, target: Tensor) -> Tensor:
        options: Group = {name: group[name] for name in used}
        return compiled(parameters, states, t, input, target, options)

    return call
