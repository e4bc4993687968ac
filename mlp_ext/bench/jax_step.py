"""A peer: the whole training step in JAX, compiled, with donated parameter buffers."""

from __future__ import annotations

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


class JaxStep:
    """Forward, MSELoss, backward and SGD of a Sequential, on JAX's own copies of the parameters.

    The number of threads is JAX's choice.
    """

    _parameters: list[Any]

    def __init__(
        self, model: nn.Sequential, criterion: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        import jax

        def loss(parameters: list[Any], input: Any, target: Any) -> Any:
            rest, y = iter(parameters), input
            for module in model:
                if isinstance(module, nn.Linear):
                    y = y @ next(rest).T + next(rest)
                else:
                    y = getattr(jax.nn, ACTIVATIONS[type(module)])(y)
            return ((y - target) ** 2).mean()

        def step(parameters: list[Any], input: Any, target: Any, lr: float) -> Any:
            value, gradients = jax.value_and_grad(loss)(parameters, input, target)
            return value, [p - lr * g for p, g in zip(parameters, gradients, strict=True)]

        self._step = jax.jit(step, donate_argnums=0)
        self._array = jax.numpy.array
        self._model, self._group = model, optimizer.param_groups[0]
        self._data: dict[Tensor, Any] = {}  # as JAX arrays, converted once
        self.load()

    def __call__(self, input: Tensor, target: Tensor) -> Any:
        for tensor in (input, target):
            if tensor not in self._data:
                self._data[tensor] = self._array(tensor.numpy())
        x, y = self._data[input], self._data[target]
        loss, self._parameters = self._step(self._parameters, x, y, self._group["lr"])
        return loss.block_until_ready()

    def load(self) -> None:
        """Copies the model's parameters to JAX."""
        self._parameters = [self._array(p.detach().numpy()) for p in self._model.parameters()]

    def save(self) -> None:
        """Copies the parameters back to the model."""
        with torch.no_grad():
            for p, array in zip(self._model.parameters(), self._parameters, strict=True):
                p.copy_(torch.tensor(array.tolist(), dtype=p.dtype))
