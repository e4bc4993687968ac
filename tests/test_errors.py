"""Each bad argument raises at once, and the message says argument, expected and got."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mlp_ext

FUNCTIONS = ["linear_act", "linear_relu", "linear_sigmoid", "linear_tanh"]
ERRORS = (RuntimeError, ValueError, TypeError)

Make = Callable[..., Tensor]
Arguments = dict[str, Any]
Change = Callable[[Make], Arguments]

# The change to a good call (input [64, 10], weight [5, 10], bias [5]), and the message's words.
BAD: dict[str, tuple[Change, list[str]]] = {
    "weight_width": (
        lambda t: {"weight": t(5, 11)},
        ["weight must be", "K=10", "[64, 10]", "got [5, 11]"],
    ),
    "weight_transposed": (
        lambda t: {"weight": t(10, 5)},
        ["weight must be", "K=10", "[64, 10]", "got [10, 5]"],
    ),
    "weight_1d": (lambda t: {"weight": t(10)}, ["weight must be [N, K", "got [10]"]),
    "weight_3d": (lambda t: {"weight": t(1, 5, 10)}, ["weight must be [N, K", "got [1, 5, 10]"]),
    "weight_dtype": (
        lambda t: {"weight": t(5, 10, dtype=torch.float64)},
        ["weight must be float32", "got float64"],
    ),
    "weight_integer": (
        lambda t: {"weight": t(5, 10, dtype=torch.int64)},
        ["weight must be float32", "got int64"],
    ),
    "bias_length": (lambda t: {"bias": t(4)}, ["bias must be", "N=5", "got [4]"]),
    "bias_of_one": (lambda t: {"bias": t(1)}, ["bias must be", "N=5", "got [1]"]),
    "bias_2d": (lambda t: {"bias": t(1, 5)}, ["bias must be", "N=5", "got [1, 5]"]),
    "bias_0d": (lambda t: {"bias": t()}, ["bias must be", "N=5", "got []"]),
    "bias_dtype": (
        lambda t: {"bias": t(5, dtype=torch.bfloat16)},
        ["bias must be float32", "got bfloat16"],
    ),
    "input_0d": (lambda t: {"input": t()}, ["input must", "0-d"]),
    "input_width": (lambda t: {"input": t(64, 9)}, ["K=9", "[64, 9]", "got [5, 10]"]),
    "input_empty_width": (lambda t: {"input": t(0, 9)}, ["K=9", "[0, 9]", "got [5, 10]"]),
    "input_leading": (lambda t: {"input": t(2, 3, 4, 9)}, ["K=9", "[2, 3, 4, 9]", "got [5, 10]"]),
    "activation_unknown": (
        lambda t: {"activation": "swish"},
        ["activation must be one of", *mlp_ext.ACTIVATIONS, "got 'swish'"],
    ),
    "parameters_missing": (
        lambda t: {"activation": "softplus", "parameters": [1.0]},
        ["parameters of softplus must be [beta, threshold], got 1 number"],
    ),
    "parameters_of_none": (
        lambda t: {"parameters": [0.1, 0.2]},
        ["parameters of relu must be none, got 2 numbers"],
    ),
    "parameters_number": (
        lambda t: {"activation": "leaky_relu", "parameters": 0.2},
        ["parameters must be a list of numbers, got 0.2; pass [0.2]"],
    ),
    "parameters_names": (
        lambda t: {"activation": "elu", "parameters": ["alpha"]},
        ["parameters must be numbers, got 'alpha'"],
    ),
    "activation_capitals": (
        lambda t: {"activation": "ReLU"},
        ["activation must be one of", "got 'ReLU'"],
    ),
    "activation_empty": (lambda t: {"activation": ""}, ["activation must be one of", "got ''"]),
    "activation_prefix": (
        lambda t: {"activation": "relu6"},
        ["activation must be one of", "got 'relu6'"],
    ),
}


def unsupported(dtype: torch.dtype) -> tuple[Change, list[str]]:
    def change(t: Make) -> Arguments:
        return {"input": t(64, 10, dtype=dtype), "weight": t(5, 10, dtype=dtype), "bias": None}

    expected = "input must be float32, float64, bfloat16 or float16"
    return change, [expected, f"got {dtype}".replace("torch.", "")]


BAD |= {
    f"input_{dtype}": unsupported(dtype) for dtype in (torch.int64, torch.bool, torch.complex64)
}


def cpu(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*sizes, dtype=dtype) if sizes else torch.ones((), dtype=dtype)


def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def learning(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    floating = dtype.is_floating_point or dtype.is_complex
    return cpu(*sizes, dtype=dtype).requires_grad_(floating)


Surroundings = tuple[Callable[[], AbstractContextManager[Any]], Make]

SURROUNDINGS: dict[str, Surroundings] = {
    "plain": (nullcontext, cpu),
    "requires_grad": (nullcontext, learning),
    "no_grad": (torch.no_grad, learning),
    "inference_mode": (torch.inference_mode, cpu),
    "meta": (nullcontext, meta),
    "fake": (FakeTensorMode, cpu),
    "autocast_off": (lambda: torch.autocast("cpu", enabled=False), learning),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str, surroundings: str) -> None:
    change, words = BAD[case]
    context, make = SURROUNDINGS[surroundings]
    with context():
        good: Arguments = {
            "input": make(64, 10),
            "weight": make(5, 10),
            "bias": make(5),
            "activation": "relu",
        }
        assert mlp_ext.linear_act(**good).shape == (64, 5)
        with pytest.raises(ERRORS) as raised:
            mlp_ext.linear_act(**good | change(make))
    message = str(raised.value)
    assert message.startswith("linear_act: ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("moved", ["weight", "bias"])
def test_operands_on_different_devices_are_named(moved: str) -> None:
    good: Arguments = {"input": cpu(64, 10), "weight": cpu(5, 10), "bias": cpu(5)}
    device = good["input"].device
    with pytest.raises(ERRORS, match=rf"^linear_act: {moved} must be on {device}.*got meta"):
        mlp_ext.linear_act(**good | {moved: good[moved].to("meta")})


@pytest.mark.parametrize("missing", ["input", "weight"])
def test_none_for_a_tensor_is_named(missing: str) -> None:
    for make in (cpu, learning):
        good: Arguments = {"input": make(64, 10), "weight": make(5, 10)}
        with pytest.raises(TypeError, match=f"^linear_act: {missing} must be a tensor, got None"):
            mlp_ext.linear_act(**good | {missing: None})


def test_shapes_are_checked_under_autocast_too() -> None:
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ERRORS, match=r"^linear_act: weight must be"),
    ):
        mlp_ext.linear_act(cpu(64, 10), cpu(5, 11))


def test_shapes_are_checked_under_vmap_too() -> None:
    with pytest.raises(ERRORS, match="linear_act: bias must be"):
        torch.func.vmap(lambda x: mlp_ext.linear_act(x, cpu(5, 10), cpu(4)))(cpu(7, 10))


@pytest.mark.parametrize(
    "function", [mlp_ext.linear_relu, mlp_ext.linear_sigmoid, mlp_ext.linear_tanh]
)
def test_named_functions_check_as_well(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ERRORS, match=rf"^{function.__name__}: bias must be"):
        function(cpu(64, 10), cpu(5, 10), cpu(4))


# --- What was typed is named, and data are never printed ---

ROWS = [[0.125] * 10] * 2000
Wrong = tuple[object, type[Exception], str]
WRONG_INPUTS: dict[str, Wrong] = {
    "list": (ROWS, TypeError, "input must be a tensor, got list; pass torch.as_tensor(input)"),
    "array": (
        np.ones((2000, 10)),
        TypeError,
        "input must be a tensor, got numpy.ndarray; pass torch.from_numpy(input)",
    ),
    "tuple": ((cpu(64, 10),), TypeError, "input must be a tensor, got tuple"),
    "none": (None, TypeError, "input must be a tensor, got None"),
    "dtype": (
        cpu(64, 10).double(),
        RuntimeError,
        "input is float64, the model float32; pass input.float()",
    ),
    "integers": (
        cpu(64, 10).int(),
        RuntimeError,
        "input is int32, the model float32; pass input.float()",
    ),
    "device": (
        meta(64, 10),
        RuntimeError,
        "input is on meta, the model on cpu; pass input.to('cpu')",
    ),
    "width": (cpu(64, 9), RuntimeError, "input must be [*, K=10], got [64, 9]"),
    "images": (
        cpu(64, 2, 5),
        RuntimeError,
        "input must be [*, K=10], got [64, 2, 5]; pass input.flatten(1)",
    ),
    "scalar": (cpu(), RuntimeError, "input must be [*, K=10], got []"),
}


@pytest.mark.parametrize("kind", ["LinearReLU", "Sequential"])
@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_a_model_names_its_input(case: str, kind: str) -> None:
    layer = mlp_ext.LinearReLU(10, 5)
    model = layer if kind == "LinearReLU" else mlp_ext.Sequential(layer)
    wrong, error, message = WRONG_INPUTS[case]
    with pytest.raises(error, match="^" + re.escape(f"{kind}: {message}") + "$") as raised:
        model(wrong)
    assert raised.value.__suppress_context__ or len(str(raised.value.__context__)) < 400


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        ("linear_act", "activation"),
        *product(FUNCTIONS, ["input", "weight", "bias"]),
    ],
)
def test_a_function_tells_types_not_data(function: str, argument: str) -> None:
    good: Arguments = {"input": cpu(64, 10), "weight": cpu(5, 10), "bias": cpu(5)}
    expected = "a str" if argument == "activation" else "a tensor"
    with pytest.raises(TypeError, match=f"^{function}: {argument} must be {expected}, got list"):
        getattr(mlp_ext, function)(**good | {argument: ROWS})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (
            torch.float64,
            "weight must be float64 to match input, got float32; or pass input.float()",
        ),
        (
            torch.int64,
            "input must be float32, float64, bfloat16 or float16, got int64; pass input.f",
        ),
    ],
)
def test_a_function_tells_how_to_cast(function: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(RuntimeError, match="^" + re.escape(f"{function}: {message}")):
        getattr(mlp_ext, function)(cpu(64, 10, dtype=dtype), cpu(5, 10))


def test_a_layer_with_a_bias_of_another_length_names_itself() -> None:
    layer = mlp_ext.LinearReLU(10, 5)
    layer.bias = torch.nn.Parameter(cpu(4))
    with pytest.raises(RuntimeError, match=r"^LinearReLU: bias must be \[N=5\]"):
        layer(cpu(64, 10))


def test_dtypes_are_left_to_autocast() -> None:
    layer = mlp_ext.LinearReLU(10, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(cpu(64, 10).bfloat16()).dtype is torch.bfloat16
        with pytest.raises(RuntimeError, match=r"^LinearReLU: input must be \[\*, K=10\]"):
            layer(cpu(64, 9).bfloat16())


def test_a_caught_error_leaves_no_trace() -> None:
    x, w = learning(64, 10), learning(5, 10)
    for _ in range(3):
        with pytest.raises(ERRORS):
            mlp_ext.linear_act(x, w, cpu(4))
    mlp_ext.linear_act(x, w, activation="identity").sum().backward()
    torch.testing.assert_close(w.grad, torch.full((5, 10), 64.0))


def backward_arguments() -> Arguments:
    return {
        "grad_output": cpu(64, 5),
        "saved": cpu(64, 5),
        "input": cpu(64, 10),
        "weight": cpu(5, 10),
        "activation": "relu",
        "parameters": [],
        "output_mask": [True, True, True],
    }


def bad_backward() -> Iterator[tuple[Arguments, str]]:
    yield {"activation": "swish"}, "activation"
    yield {"parameters": [0.1]}, "relu takes 0 parameters"
    yield {"saved": None}, "saved"
    yield {"input": None}, "input"
    yield {"weight": None}, "weight"
    yield {"grad_output": cpu(64, 4)}, "grad_output"
    yield {"grad_output": cpu(63, 5)}, "grad_output"
    yield {"grad_output": cpu(64, 5, dtype=torch.float64)}, "grad_output"
    yield {"weight": cpu(4, 10)}, "weight"
    yield {"input": cpu(63, 10)}, "input"
    yield {"input": cpu(64, 11)}, "weight"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("change", "argument"), list(bad_backward()))
def test_bad_arguments_of_the_backward_operator_are_named(
    change: Arguments, argument: str, device: str
) -> None:
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in (backward_arguments() | change).items()
    }
    with pytest.raises(ERRORS, match=rf"^_?linear_act\w*: .*{argument}"):
        torch.ops.mlp_ext._linear_act_backward(**arguments)


# --- The kinds of error are those of PyTorch ---


def weights(**changed: Any) -> dict[str, Any]:
    return {"input": cpu(3, 8), "weight": cpu(4, 8), "bias": cpu(4)} | changed


LIKE_NATIVE: dict[str, dict[str, Any]] = {
    **{
        f"input {d}": weights(input=cpu(3, 8).to(d))
        for d in (torch.float64, torch.int64, torch.bool)
    },
    **{f"weight {d}": weights(weight=cpu(4, 8).to(d)) for d in (torch.float64, torch.int64)},
    "bias float64": weights(bias=cpu(4).double()),
    "complex input": weights(input=cpu(3, 8).cfloat()),
    "width": weights(input=cpu(3, 9)),
    "no rows": weights(input=cpu(9)),
    "bias of another length": weights(bias=cpu(5)),
    "weight with three dimensions": weights(weight=cpu(4, 8, 1)),
    "list": weights(input=[[1.0] * 8]),
    "array": weights(input=np.ones((3, 8))),
    "none": weights(input=None),
    "text": weights(input="x"),
    "weight none": weights(weight=None),
    "bias list": weights(bias=[1.0] * 4),
    "meta input": weights(input=meta(3, 8)),
    "meta weight": weights(weight=meta(4, 8), bias=meta(4)),
}


@pytest.mark.parametrize("case", LIKE_NATIVE)
def test_the_kind_of_error_is_that_of_native(case: str) -> None:
    given = LIKE_NATIVE[case]
    with pytest.raises((TypeError, RuntimeError)) as native:
        torch.relu(torch.nn.functional.linear(**given))
    with pytest.raises(native.type) as raised:
        mlp_ext.linear_relu(**given)
    assert raised.type is native.type
    if isinstance(given["weight"], Tensor) and not isinstance(given["bias"], list):
        layer = mlp_ext.LinearReLU(8, 4)
        for name in ("weight", "bias"):
            setattr(layer, name, torch.nn.Parameter(given[name], requires_grad=False))
        for model in (layer, mlp_ext.Sequential(layer)):
            with pytest.raises(native.type):
                model(given["input"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_a_layer_of_another_dtype_is_native(dtype: torch.dtype) -> None:
    layer = mlp_ext.LinearReLU(8, 4)
    for name, parameter in layer.named_parameters():
        changed = torch.nn.Parameter(parameter.detach().abs().to(dtype), requires_grad=False)
        setattr(layer, name, changed)
    x = torch.ones(3, 8, dtype=dtype)
    try:
        expected = torch.relu(torch.nn.functional.linear(x, layer.weight, layer.bias))
    except RuntimeError as native:
        with pytest.raises(type(native), match="^" + re.escape(str(native)) + "$"):
            layer(x)
    else:
        torch.testing.assert_close(layer(x), expected)
