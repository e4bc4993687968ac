"""Peers: the whole training step in JAX, compiled, with donated parameter buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Modules with default options, and their names in jax.nn.
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.SiLU: "silu",
    nn.Softplus: "softplus",
    nn.Hardtanh: "hard_tanh",
    nn.Mish: "mish",
}


def _step(model: nn.Sequential) -> Callable[..., Any]:
    """Forward, MSELoss, backward and SGD: parameters, input, target, lr -> loss, parameters."""
    import jax

    def loss(parameters: list[Any], input: Any, target: Any) -> Any:
        rest, y = iter(parameters), input
        for module in model:
            if isinstance(module, nn.Linear):
                y = y @ next(rest).T + next(rest)
            else:
                y = getattr(jax.nn, ACTIVATIONS[type(module)])(y)
        return ((y - target) ** 2).mean()

    def step(parameters: list[Any], input: Any, target: Any, lr: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(parameters, input, target)
        return value, [p - lr * g for p, g in zip(parameters, gradients, strict=True)]

    return step


class JaxStep:
    """The step of a Sequential, on JAX's own copies of parameters and learning rate.

    The number of threads is JAX's choice.
    """

    _parameters: list[Any]
    _rate: Any

    def __init__(
        self, model: nn.Sequential, criterion: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self._parts = model, optimizer
        self._start(_step(model))

    def _start(self, step: Callable[..., Any]) -> None:
        import jax

        self._step = jax.jit(step, donate_argnums=0)
        self._array = jax.numpy.array
        self._data: dict[Tensor, Any] = {}  # as JAX arrays, converted once
        self.load()

    def __call__(self, input: Tensor, target: Tensor) -> Any:
        for tensor in (input, target):
            if tensor not in self._data:
                self._data[tensor] = self._array(tensor.numpy())
        x, y = self._data[input], self._data[target]
        loss, self._parameters = self._step(self._parameters, x, y, self._rate)
        return loss.block_until_ready()

    def load(self) -> None:
        """Copies the model's parameters and the learning rate to JAX."""
        model, optimizer = self._parts
        self._parameters = [self._array(p.detach().numpy()) for p in model.parameters()]
        self._rate = optimizer.param_groups[0]["lr"]

    def save(self) -> None:
        """Copies the parameters back to the model."""
        _copy(self._parts[0].parameters(), self._parameters)


class JaxVmapStep(JaxStep):
    """vmap of the step over many networks."""

    def __init__(
        self,
        models: Sequence[nn.Sequential],
        criterion: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        import jax

        self._models, self._optimizers = models, optimizers
        self._start(jax.vmap(_step(models[0]), in_axes=(0, None, None, 0)))

    def load(self) -> None:
        stacks, _ = torch.func.stack_module_state(list(self._models))
        self._parameters = [self._array(p.detach().numpy()) for p in stacks.values()]
        self._rate = self._array([o.param_groups[0]["lr"] for o in self._optimizers])

    def save(self) -> None:
        for i, model in enumerate(self._models):
            _copy(model.parameters(), [array[i] for array in self._parameters])


def _copy(parameters: Iterable[Tensor], arrays: Sequence[Any]) -> None:
    with torch.no_grad():
        for p, array in zip(parameters, arrays, strict=True):
            p.copy_(torch.tensor(array.tolist(), dtype=p.dtype))
