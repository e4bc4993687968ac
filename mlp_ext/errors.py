"""Error messages: which argument is wrong, and what to pass instead.

The operators check their own arguments, but their messages name the operator and the weight, and
torch's argument parser prints whole lists. So public calls catch an error, inspect their arguments
and raise a better one. Calls that succeed never run this code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mlp_ext.ops import PARAMETERS

CAUGHT = (TypeError, ValueError, IndexError, RuntimeError)  # what the operators raise

_OPERATOR = re.compile(r"(linear_act|mlp(_train_(step|many)_)?): ")
_CASTS = {
    torch.float32: "float()",
    torch.float64: "double()",
    torch.bfloat16: "bfloat16()",
    torch.float16: "half()",
    torch.int64: "long()",
}


def kind(value: object) -> str:
    """The type of an argument, or its value if that is short."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str) and len(value) < 40:
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name, module = type(value).__qualname__, type(value).__module__
    return name if module == "builtins" else f"{module}.{name}"


def as_float(value: object) -> float | None:
    """None if it is no number, or too large."""
    try:
        return float(value) if isinstance(value, (int, float)) else None
    except OverflowError:
        return None


def rename(error: Exception, name: str) -> None:
    """Raises `error` with `name` instead of the operator's name; returns if it names none."""
    message = str(error)
    if match := _OPERATOR.match(message):
        what = message[match.end() :].replace("loss_weight", "the criterion's weight")
        raise type(error)(f"{name}: {what}") from None


def check_tensor(name: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        functions = {"list": "as_tensor", "DataFrame": "as_tensor", "ndarray": "from_numpy"}
        function = functions.get(type(value).__name__)
        advice = f"; pass torch.{function}({argument})" if function else ""
        raise TypeError(f"{name}: {argument} must be a tensor, got {kind(value)}{advice}") from None
    if value.is_nested and value.layout is torch.strided:  # has no shape
        what = f"{argument} must be dense, got a nested tensor"
        raise RuntimeError(f"{name}: {what}; pad it by torch.nested.to_padded_tensor")


def explain_function(
    error: Exception,
    name: str,
    input: object,
    weight: object,
    bias: object,
    activation: object = "identity",
    parameters: object = None,
) -> None:
    """Raises `error` of linear_act with advice for callers of `name`; returns if there is none."""
    check_tensor(name, "input", input)
    check_tensor(name, "weight", weight)
    if bias is not None:
        check_tensor(name, "bias", bias)
    if not isinstance(activation, str):
        raise TypeError(f"{name}: activation must be a str, got {kind(activation)}") from None
    if activation not in PARAMETERS:
        what = f"activation must be one of {', '.join(PARAMETERS)}, got {kind(activation)}"
        raise ValueError(f"{name}: {what}") from None
    _check_parameters(name, activation, parameters)
    assert isinstance(input, Tensor) and isinstance(weight, Tensor)
    if input.dtype == weight.dtype or not _is_floating(weight) or _is_autocast(input):
        return rename(error, name)
    if _is_floating(input):
        what = f"weight must be {_dtype(input)} to match input, got {_dtype(weight)}; or"
    else:
        what = f"input must be float32, float64, bfloat16 or float16, got {_dtype(input)};"
    raise RuntimeError(f"{name}: {what} pass input.{_cast(weight.dtype)}") from None


def _check_parameters(name: str, activation: str, parameters: object) -> None:
    """Raises unless `parameters` are the activation's, or None."""
    if parameters is None:
        return
    if not isinstance(parameters, Sequence) or isinstance(parameters, str):
        what = f"parameters must be a list of numbers, got {kind(parameters)}"
        number = isinstance(parameters, (int, float))
        raise TypeError(f"{name}: {what}{f'; pass [{parameters}]' if number else ''}") from None
    for value in parameters:
        if as_float(value) is None:
            raise TypeError(f"{name}: parameters must be numbers, got {kind(value)}") from None
    names = PARAMETERS.get(activation)
    if names is not None and len(parameters) not in (0, len(names)):
        takes = f"[{', '.join(names)}]" if names else "none"
        what = f"parameters of {activation} must be {takes}, got {len(parameters)}"
        raise ValueError(f"{name}: {what} number{'s' * (len(parameters) > 1)}") from None


def check_input(name: str, input: object, weight: Tensor) -> None:
    """Raises if `input` does not fit a model whose first weight is `weight` [N, K]."""
    check_tensor(name, "input", input)
    assert isinstance(input, Tensor)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return
    K, shape = weight.shape[1], list(input.shape)
    if not shape or shape[-1] != K:
        advice = ""
        if len(shape) > 2 and shape[0] and input[0].numel() == K:
            advice = "; pass input.flatten(1)"
        elif len(shape) == 1 and K == 1:
            advice = "; pass input.unsqueeze(1)"
        raise RuntimeError(f"{name}: input must be [*, K={K}], got {shape}{advice}") from None
    _check_device(name, "input", input, weight)
    if not _is_autocast(input):
        _check_dtype(name, "input", input, weight)


def check_target(
    name: str, loss: str, input: Tensor, target: object, weight: Tensor, promotes: bool
) -> None:
    """Raises if `target` does not fit `loss` and a model whose last weight is `weight`.

    loss: a name in csrc/math/losses.h. input: [*, K], checked by check_input. promotes: whether
    float64 is taken where the model is float32.
    """
    check_tensor(name, "target", target)
    assert isinstance(target, Tensor)
    N, shape, leading = len(weight), list(target.shape), list(input.shape[:-1])
    M = leading[0] if leading else 1
    classes = (torch.int64, torch.uint8)
    of_classes = loss == "nll" or (
        loss == "cross_entropy" and (target.dtype in classes or shape[1:] != [N])
    )
    if of_classes and target.dtype not in classes:
        what = f"target must be classes [M={M}] of int64"
        what += f", or probabilities [M={M}, N={N}]" * (loss == "cross_entropy")
        cast = "target.argmax(1)" if shape == [M, N] else "target.long()"
        cast += ".squeeze(1)" * (shape == [M, 1] != [M, N])
        raise TypeError(f"{name}: {what}, got {shape} of {_dtype(target)}; pass {cast}") from None
    if of_classes and shape != leading:
        advice = ""
        if shape == [M, N]:
            advice = "; pass target.argmax(1)"
            if loss == "cross_entropy":
                advice += ", or as probabilities target." + _cast(weight.dtype)
        elif shape == [M, 1]:
            advice = "; pass target.squeeze(1)"
        what = f"target must be classes [M={M}], got {shape}{advice}"
        raise RuntimeError(f"{name}: {what}") from None
    if not of_classes and shape != [*leading, N]:
        advice = ""
        if shape == [M * N] and len(leading) == 1:
            how = f"view({M}, {N})" if 1 not in (M, N) else f"unsqueeze({1 if N == 1 else 0})"
            advice = f"; pass target.{how}"
        rows = f"M={M}" if len(leading) == 1 else ", ".join(map(str, leading))
        what = f"target must be [{rows}{', ' * bool(rows)}N={N}] as the output, got {shape}{advice}"
        raise RuntimeError(f"{name}: {what}") from None
    _check_device(name, "target", target, weight)
    promoted = promotes and (target.dtype, weight.dtype) == (torch.float64, torch.float32)
    if not of_classes and not promoted:
        _check_dtype(name, "target", target, weight)


def _check_dtype(name: str, argument: str, value: Tensor, weight: Tensor) -> None:
    if value.dtype != weight.dtype:
        what = f"{argument} is {_dtype(value)}, the model {_dtype(weight)}"
        raise RuntimeError(f"{name}: {what}; pass {argument}.{_cast(weight.dtype)}") from None


def _check_device(name: str, argument: str, value: Tensor, weight: Tensor) -> None:
    if value.device != weight.device:
        what = f"{argument} is on {value.device}, the model on {weight.device}"
        raise RuntimeError(f"{name}: {what}; pass {argument}.to('{weight.device}')") from None


def _is_floating(t: Tensor) -> bool:
    return t.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _is_autocast(t: Tensor) -> bool:
    device = t.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _cast(dtype: torch.dtype) -> str:
    return _CASTS.get(dtype, f"to({dtype})")
