"""Fused linear layers as functions: one operator, forward and backward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Parameter

from mlp_ext.errors import CAUGHT, explain_function
from mlp_ext.ops import ACTIVATIONS

__all__ = ["ACTIVATIONS", "linear_act", "linear_relu", "linear_sigmoid", "linear_tanh"]

_linear_act: Callable[..., Tensor] = torch.ops.mlp_ext.linear_act.default

# A Parameter, its substitute in torch.func.functional_call, and those in tracing.
PLAIN = frozenset({Parameter, Tensor, FakeTensor, FunctionalTensor})
EAGER = frozenset({Parameter, Tensor})  # checked first, at every call


def needs_native(weight: Any) -> bool:
    """Whether a weight whose type is not in EAGER must reach F.linear instead of the operators.

    True for other tensor subclasses, such as quantized ones, which implement F.linear; for the
    proxies of torch.fx; and in torch.export, so that a program consists of PyTorch's operators: it
    loads without mlp_ext, and quantizers and other backends know it. False in torch.compile.
    """
    if not isinstance(weight, (Tensor, torch.fx.Proxy)):
        return False
    if torch.compiler.is_exporting():
        return True
    if _is_dtensor(weight):
        from mlp_ext import sharding

        return sharding.needs_native(weight)
    return type(weight) not in PLAIN


def _is_dtensor(tensor: object) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")
    return isinstance(tensor, getattr(distributed, "DTensor", ()))


def native(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    name: str,
    parameters: Sequence[float] | None = None,
) -> Tensor:
    """linear_act by PyTorch: the activations have their names in torch.nn.functional."""
    z = F.linear(input, weight, bias)
    if _is_dtensor(z):
        from mlp_ext import sharding

        z = sharding.summed(z)
    return activated(z, name, parameters or ())


def activated(z: Tensor, name: str, parameters: Sequence[float] = ()) -> Tensor:
    if name == "identity":
        return z
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    activate: Callable[..., Tensor] = getattr(F, name)
    return activate(z, *parameters)


def linear_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    parameters: Sequence[float] | None = None,
) -> Tensor:
    """Computes `activation(input @ weight.T + bias)` as one operator, forward and backward.

    Equals `torch.relu(F.linear(input, weight, bias))` and the like, in values and all derivatives:

        z = x W^T + b        y = act(z)
        dz = dy act'(z)      dx = dz W      dW = dz^T x      db = sum of dz over rows

    Backward computes only what requires a gradient. 16-bit types are accumulated in float32. Under
    autocast, it behaves like `F.linear`. Second derivatives, forward-mode AD, `torch.func` and
    devices without our kernels run PyTorch's own operations.

    Args:
        input (Tensor): x, with any strides; float32, float64, bfloat16 or float16.
        weight (Tensor): W, of the same dtype and device.
        bias (Tensor, optional): b, of the same dtype and device.
        activation (str): a name in `mlp_ext.ACTIVATIONS`. Default: "relu".
        parameters (sequence of float, optional): all parameters of the activation, in the order of
            PyTorch's function: `[negative_slope]` for leaky_relu, `[alpha]` for elu,
            `[beta, threshold]` for softplus, `[min_val, max_val]` for hardtanh. None uses PyTorch's
            defaults.

    Shape:
        - input: `(*, K)`, with any number of leading dimensions, including none.
        - weight: `(N, K)`.
        - bias: `(N)`.
        - Output: `(*, N)`.

    Returns:
        Tensor: y, of the dtype of `input`.

    Raises:
        TypeError: an argument is not of the type above.
        ValueError: `activation` is unknown, or `parameters` has the wrong length.
        RuntimeError: shapes, dtypes or devices do not match, or the dtype is not supported. The
            message names the argument, what was expected and what was passed.

    Examples:
        >>> x, w, b = torch.randn(128, 20), torch.randn(30, 20), torch.randn(30)
        >>> y = mlp_ext.linear_act(x, w, b, "leaky_relu", parameters=[0.2])
        >>> torch.allclose(y, F.leaky_relu(F.linear(x, w, b), 0.2), atol=1e-5)
        True
    """
    if type(weight) not in EAGER and activation in ACTIVATIONS and needs_native(weight):
        return native(input, weight, bias, activation, parameters)
    try:
        return _linear_act(input, weight, bias, activation, parameters)
    except CAUGHT as error:
        if getattr(input, "is_nested", False):
            return native(input, weight, bias, activation, parameters)
        explain_function(error, "linear_act", input, weight, bias, activation, parameters)
        raise


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `relu(input @ weight.T + bias)` as one operator.

    relu(z) = max(z, 0). As in PyTorch, relu(NaN) is NaN, and the derivative at 0 is 0.

    Args:
        input (Tensor): x; float32, float64, bfloat16 or float16.
        weight (Tensor): W, of the same dtype and device.
        bias (Tensor, optional): b, of the same dtype and device.

    Shape:
        - input: `(*, K)`, with any number of leading dimensions, including none.
        - weight: `(N, K)`.
        - bias: `(N)`.
        - Output: `(*, N)`.

    Returns:
        Tensor: y, of the dtype of `input`.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: shapes, dtypes or devices do not match, or the dtype is not supported.

    Examples:
        >>> x, w, b = torch.randn(128, 20), torch.randn(30, 20), torch.randn(30)
        >>> mlp_ext.linear_relu(x, w, b).shape
        torch.Size([128, 30])
    """
    return _named("relu", input, weight, bias)


def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `sigmoid(input @ weight.T + bias)` as one operator.

    sigmoid(z) = 1 / (1 + e^-z). As in PyTorch, it saturates to exactly 0 and 1.

    Args:
        input (Tensor): x; float32, float64, bfloat16 or float16.
        weight (Tensor): W, of the same dtype and device.
        bias (Tensor, optional): b, of the same dtype and device.

    Shape:
        - input: `(*, K)`, with any number of leading dimensions, including none.
        - weight: `(N, K)`.
        - bias: `(N)`.
        - Output: `(*, N)`.

    Returns:
        Tensor: y, of the dtype of `input`.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: shapes, dtypes or devices do not match, or the dtype is not supported.

    Examples:
        >>> x, w, b = torch.randn(128, 20), torch.randn(30, 20), torch.randn(30)
        >>> mlp_ext.linear_sigmoid(x, w, b).shape
        torch.Size([128, 30])
    """
    return _named("sigmoid", input, weight, bias)


def linear_tanh(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes `tanh(input @ weight.T + bias)` as one operator.

    tanh(z) = (e^z - e^-z) / (e^z + e^-z). As in PyTorch, it saturates to exactly -1 and 1.

    Args:
        input (Tensor): x; float32, float64, bfloat16 or float16.
        weight (Tensor): W, of the same dtype and device.
        bias (Tensor, optional): b, of the same dtype and device.

    Shape:
        - input: `(*, K)`, with any number of leading dimensions, including none.
        - weight: `(N, K)`.
        - bias: `(N)`.
        - Output: `(*, N)`.

    Returns:
        Tensor: y, of the dtype of `input`.

    Raises:
        TypeError: an argument is not a tensor.
        RuntimeError: shapes, dtypes or devices do not match, or the dtype is not supported.

    Examples:
        >>> x, w, b = torch.randn(128, 20), torch.randn(30, 20), torch.randn(30)
        >>> mlp_ext.linear_tanh(x, w, b).shape
        torch.Size([128, 30])
    """
    return _named("tanh", input, weight, bias)


def _named(activation: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if type(weight) not in EAGER and needs_native(weight):
        return native(input, weight, bias, activation)
    try:
        return _linear_act(input, weight, bias, activation)
    except CAUGHT as error:
        if getattr(input, "is_nested", False):
            return native(input, weight, bias, activation)
        explain_function(error, f"linear_{activation}", input, weight, bias)
        raise
