"""Fused linear layers as functions: one operator, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlp_ext.errors import CAUGHT, explain_function
from mlp_ext.ops import ACTIVATIONS

__all__ = ["ACTIVATIONS", "linear_act", "linear_relu", "linear_sigmoid", "linear_tanh"]

_linear_act: Callable[..., Tensor] = torch.ops.mlp_ext.linear_act.default


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    parameters: Sequence[float] | None = None,
) -> Tensor:
    r"""``activation(input @ weight.T + bias)`` as one operator.

    .. math:: y = \sigma(x W^T + b), \quad dz = \sigma'(dy, saved), \quad
              dx = dz\,W, \quad dW = dz^T x, \quad db = \textstyle\sum_m dz_m

    Equals ``torch.relu(F.linear(input, weight, bias))`` etc., in values and all derivatives.
    Backward (Rumelhart, Hinton and Williams, Nature 1986) reads the output y, or z = x W^T + b if
    the derivative needs it, and computes only what requires a gradient. 16-bit types are
    accumulated in float32 and rounded once. Under autocast it behaves like ``F.linear``.
    Second derivatives, forward-mode AD, ``torch.func`` and devices without our kernels use an
    equivalent composite of native operations.

    Args:
        input: ``[*, K]`` with any number of leading dimensions and any strides; float32, float64,
            bfloat16 or float16.
        weight: ``[N, K]``, with the same dtype and device.
        bias: ``[N]`` or None.
        activation: a name in :data:`mlp_ext.ACTIVATIONS`.
        parameters: all parameters of the activation, in the order of PyTorch's function:
            ``[negative_slope]`` of leaky_relu, ``[alpha]`` of elu, ``[beta, threshold]`` of
            softplus, ``[min_val, max_val]`` of hardtanh. None: PyTorch's defaults.

    Returns:
        ``[*, N]``, with the dtype of ``input``.

    Raises:
        ValueError: ``activation`` is unknown, or ``parameters`` has the wrong length.
        TypeError: an argument is not a tensor, a dtype is not supported, or the dtypes differ.
        RuntimeError: shapes do not match, or devices differ. Each message names the argument, what
            was expected and what was passed.
    """
    try:
        return _linear_act(input, weight, bias, activation, parameters)
    except CAUGHT as error:
        explain_function(error, "linear_act", input, weight, bias, activation, parameters)
        raise


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(input @ weight.T + bias)``; shapes, dtypes and errors as in :func:`linear_act`.

    relu(z) = max(z, 0) (Nair and Hinton, ICML 2010); as in torch, relu(NaN) is NaN and the
    derivative at 0 is 0.
    """
    return _named("relu", input, weight, bias)


def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``sigmoid(input @ weight.T + bias)``; shapes, dtypes and errors as in :func:`linear_act`.

    sigmoid(z) = 1 / (1 + exp(-z)); as in torch, it saturates to exactly 0 and 1.
    """
    return _named("sigmoid", input, weight, bias)


def linear_tanh(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``tanh(input @ weight.T + bias)``; shapes, dtypes and errors as in :func:`linear_act`.

    As in torch, it saturates to exactly -1 and 1.
    """
    return _named("tanh", input, weight, bias)


def _named(activation: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    try:
        return _linear_act(input, weight, bias, activation)
    except CAUGHT as error:
        explain_function(error, f"linear_{activation}", input, weight, bias)
        raise
