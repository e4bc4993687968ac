"""predict: the outputs of many networks in one call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlp_ext import _C
from mlp_ext.errors import CAUGHT, check_input, check_tensor
from mlp_ext.functional import activated
from mlp_ext.networks import Look, check_alike, flattened, listed, look, of_network
from mlp_ext.nn import Activation
from mlp_ext.plan import GuardList, call_mlp
from mlp_ext.reading import read_model

# Bytes of a network's widest activation beyond which it is computed alone, by its fused layers:
# they take 45 us for 784-100-10 @ 20, batched products 80; for 30-16-1 @ 32 it is 10 and 5.
ALONE = 1 << 13
TOGETHER = 1 << 20  # bytes of those of the networks in one batched product
AT_ONCE = 1 << 25  # of a network's activations that are computed at once


class _Stack(NamedTuple):
    """A model as a stack of layers. Holds nothing alive: see plan.py."""

    guards: _C.Guards
    layers: list[weakref.ref[nn.Module]]
    activations: list[Activation]
    flattened: list[tuple[int, int]]
    look: Look

    def parameters(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each layer."""
        found = [layer()._parameters for layer in self.layers]  # type: ignore[union-attr]
        return [(each["weight"], each["bias"]) for each in found]  # type: ignore[misc]


_STACKS: weakref.WeakKeyDictionary[nn.Module, _Stack] = weakref.WeakKeyDictionary()


def predict(models: Sequence[nn.Module], input: Tensor) -> Tensor:
    """The outputs of many networks, without gradients.

    Equals, in far less time where networks are small,

        with torch.no_grad():
            torch.stack([model(input) for model in models])

    Args:
        models (sequence of nn.Module): E models as `TrainSteps` takes them: alike, and none with a
            dropout in training mode.
        input (Tensor): a batch for all networks, or one for each, of the dtype and device of the
            Parameters.

    Shape:
        - input: `(M, K)` or `(E, M, K)`, or what the models' `nn.Flatten` makes these.
        - Output: `(E, M, N)`.

    Returns:
        Tensor: the outputs of each network.

    Raises:
        TypeError: a module is of a type that is not supported, or the input is not a tensor.
        ValueError: the models are not alike, or have hooks or options that are not supported.
        RuntimeError: shape, dtype or device of the input do not match.

    Examples:
        >>> models = [nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in "abcd"]
        >>> x = torch.randn(64, 10)
        >>> y = mlp_ext.predict(models, x)
        >>> y.shape, torch.allclose(y[2], models[2](x), atol=1e-6)
        (torch.Size([4, 64, 3]), True)
    """
    models = listed("predict", "models", models)
    check_tensor("predict", "input", input)
    if input.layout is not torch.strided:
        what = f"input must be dense, got {input.layout}"
        raise RuntimeError(f"predict: {what}; call its to_dense()")
    with torch.no_grad():
        stacks = [_stack(i, model) for i, model in enumerate(models)]
        check_alike("predict", [stack.look for stack in stacks])
        of_each = [stack.parameters() for stack in stacks]
        weight, first, count = of_each[0][0][0], stacks[0], len(models)
        x = flattened("predict", input, weight.shape[1], first.flattened, count)
        check_input("predict", x, weight)
        widest = max(max(w.shape) for w, _ in of_each[0])
        bytes_of_one = max(1, x.shape[-2] * widest * x.element_size())
        if bytes_of_one > ALONE:
            return torch.stack(
                [_alone(x[i] if x.dim() == 3 else x, of_each[i], first) for i in range(count)]
            )
        size = max(1, TOGETHER // bytes_of_one)
        return torch.cat(
            [
                _together(x[i : i + size] if x.dim() == 3 else x, of_each[i : i + size], first)
                for i in range(0, count, size)
            ]
        )


def outputs(model: nn.Module, input: Tensor) -> Tensor:
    """Those of one network in eval mode, by its fused layers. Memory of hidden layers is bounded.

    input: what a step takes, [n, *, K]. Call under no_grad.
    """
    torch.clear_autocast_cache()  # under autocast it holds weights from before the last steps
    stack = _stack(0, model)
    parameters = stack.parameters()
    for dimensions in stack.flattened:
        input = input.flatten(*dimensions)
    widths = [parameters[0][0].shape[1], *(len(weight) for weight, _ in parameters)]
    rows_of_one = input.numel() // max(1, len(input) * widths[0])
    bytes_of_one = sum(widths) * rows_of_one * input.element_size()
    rows = max(1, AT_ONCE // max(1, bytes_of_one))
    if len(input) <= rows:
        return _alone(input, parameters, stack)
    return torch.cat([_alone(part, parameters, stack) for part in input.split(rows)])


def _alone(x: Tensor, parameters: list[tuple[Tensor, Tensor | None]], stack: _Stack) -> Tensor:
    weights, biases = zip(*parameters, strict=True)
    y: Tensor = call_mlp(x, weights, biases, stack.activations)
    return y


def _together(
    x: Tensor, of_each: list[list[tuple[Tensor, Tensor | None]]], stack: _Stack
) -> Tensor:
    """x: [M, K] or [E, M, K]."""
    x = x.expand(len(of_each), *x.shape[-2:])
    for layer, activation in enumerate(stack.activations):
        weights, biases = zip(*(each[layer] for each in of_each), strict=True)
        W = torch.stack(weights).mT
        z = x @ W if biases[0] is None else torch.baddbmm(torch.stack(biases).unsqueeze(1), x, W)
        x = activated(z, *activation)
    return x


def _stack(index: int, model: nn.Module) -> _Stack:
    try:
        known = _STACKS.get(model) if isinstance(model, nn.Module) else None
        if known and known.guards.holds():
            return known
        found = _STACKS[model] = _read(model)
    except CAUGHT as error:
        raise of_network("predict", error, index) from None
    return found


def _read(model: nn.Module) -> _Stack:
    if type(model) is DistributedDataParallel:
        model = model.module
    reading, guards = read_model(model), GuardList()
    if reading.dropout:
        raise ValueError("model has a Dropout in training mode; call its eval()")
    for module in model.modules():
        guards.layer(module)
        guards.children(module)
        options = {nn.Dropout: ("training", "p"), nn.Flatten: ("start_dim", "end_dim")}
        place = (weakref.ref(module), None)
        own = vars(module)
        guards.items += [(place, name, own[name]) for name in options.get(type(module), ())]
    guards.class_items += [(weakref.ref(m), name, own) for m, name, own in reading.forwards]
    layers = [weakref.ref(layer.module) for layer in reading.layers]
    activations = [layer.activation or Activation("identity") for layer in reading.layers]
    return _Stack(guards.guards(), layers, activations, reading.flattened, look(reading))
