"""The providers: ways to compute the same thing. Another one is a function and a row."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlp_ext import _C
from mlp_ext.bench.cases import Case, Layer, Setting
from mlp_ext.bench.jax_step import JaxStep
from mlp_ext.commands import loop
from mlp_ext.functional import linear_act
from mlp_ext.step_graph import StepGraph
from mlp_ext.train_step import TrainStep

Function = Callable[[Tensor, Tensor, Tensor], Tensor]  # [M, K], [N, K], [N] -> [M, N]


def _native(setting: Setting) -> Function:
    if setting.activation == "identity":
        return F.linear
    activation: Callable[[Tensor], Tensor] = getattr(torch, setting.activation)
    return lambda input, weight, bias: activation(F.linear(input, weight, bias))


def _native_inplace(setting: Setting) -> Function:
    return lambda input, weight, bias: torch.relu_(F.linear(input, weight, bias))


def _compile(setting: Setting, mode: str = "default") -> Function:
    compiled: Function = torch.compile(_native(setting), mode=mode)
    if setting.mode != "backward":
        return compiled

    def function(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Its backward may otherwise run once only. It is compiled in the first forward.
        with torch._functorch.config.patch(donated_buffer=False):
            return compiled(input, weight, bias)

    return function


def _mkldnn(setting: Setting) -> Function:
    operator: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    name = "none" if setting.activation == "identity" else setting.activation
    return lambda input, weight, bias: operator(input, weight, bias, name, [], None)


def _fused(setting: Setting) -> Function:
    activation = setting.activation
    return lambda input, weight, bias: linear_act(input, weight, bias, activation)


def _path_takes(path: str) -> Callable[[Case, Setting], bool]:
    def takes(case: Case, setting: Setting) -> bool:
        assert isinstance(case, Layer)
        major, minor = torch.cuda.get_device_capability()
        dtype, tf32 = setting.dtype.replace("tf32", "float32"), setting.dtype == "tf32"
        arch = 10 * major + minor
        plan = _C.cuda_plan(*case, dtype, setting.activation, arch, tf32=tf32, path=path)
        return plan["forward"] == path

    return takes


def _addmm_activation(setting: Setting) -> Function:
    return lambda input, weight, bias: torch._addmm_activation(bias, input, weight.t())


def _compiled_model(model: nn.Module, *rest: Any) -> loop.Step:
    return loop.sgd_step(cast(nn.Module, torch.compile(model)), *rest)


def _compiled_step(
    model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer
) -> loop.Step:
    """The whole step as one graph, which updates the parameters in place."""
    names = [name for name, _ in model.named_parameters()]
    parameters = [p.detach() for p in model.parameters()]  # over the same memory

    def loss(parameters: list[Tensor], input: Tensor, target: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        found: Tensor = criterion(torch.func.functional_call(model, named, (input,)), target)
        return found

    def step(parameters: list[Tensor], input: Tensor, target: Tensor, lr: float) -> Tensor:
        gradients, value = torch.func.grad_and_value(loss)(parameters, input, target)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.sub_(gradient, alpha=lr)
        return cast(Tensor, value)

    compiled = torch.compile(step, dynamic=False)
    group = optimizer.param_groups[0]
    return lambda input, target: compiled(parameters, input, target, group["lr"])


def _captured_step(*parts: Any) -> loop.Step:
    """The eager step as a CUDA graph."""
    return StepGraph(loop.sgd_step(*parts), lambda: parts[2].param_groups[0]["lr"])


def _fit(*parts: Any) -> Callable[..., Tensor]:
    """Epochs of one batch; the last loss."""
    step = TrainStep(*parts)
    return lambda input, target, epochs=1: step.fit(input, target, epochs=epochs)[-1]


def _relu_only(setting: Setting) -> str:
    return "" if setting.activation == "relu" else "for relu only"


def _on_cuda(setting: Setting) -> str:
    return "" if setting.device == "cuda" else "on cuda only"


def _cublaslt_here(setting: Setting) -> str:
    forward = "" if setting.mode == "forward" else "forward only"
    return _on_cuda(setting) or forward or _relu_only(setting)


def _compiler_here(setting: Setting) -> str:
    if setting.device == "cuda":
        return "" if find_spec("triton") else "needs triton"
    compiler = os.environ.get("CXX", "g++")
    return "" if shutil.which(compiler) else f"needs the C++ compiler {compiler}"


def _onednn_here(setting: Setting) -> str:
    if setting.mode != "forward" or setting.device != "cpu":
        return "forward on the CPU only"
    operators = torch.ops.mkldnn
    supported: dict[str, Callable[[], bool]] = {
        "float32": torch.backends.mkldnn.is_available,
        "bfloat16": operators._is_mkldnn_bf16_supported,
        "float16": operators._is_mkldnn_fp16_supported,
    }
    here = setting.dtype in supported and supported[setting.dtype]()
    return "" if here else f"has no {setting.dtype} here"


def _jax_here(setting: Setting) -> str:
    if (setting.device, setting.dtype) != ("cpu", "float32"):
        return "float32 on the CPU only"
    return "" if find_spec("jax") else "needs jax"


class Provider(NamedTuple):
    """`make` is called with a Setting in layers, and as a row of loop.LAYERS in train."""

    make: Callable[..., Any]
    obstacle: Callable[[Setting], str] = lambda setting: ""  # why it does not apply, or ""
    captured: bool = False  # in layers: the call is captured in a CUDA graph and replayed
    has_epochs: bool = False  # in train: a call may make several steps; its time is divided by them
    path: str | None = None  # of csrc/cuda/plan.h, instead of the plan's; for what is captured
    takes: Callable[[Case, Setting], bool] = lambda case, setting: True


PROVIDERS: dict[str, dict[str, Provider]] = {  # by suite
    "layers": {
        "native": Provider(_native),
        "native_inplace": Provider(_native_inplace, _relu_only),
        "compile": Provider(_compile, _compiler_here),
        "compile-max-autotune": Provider(lambda s: _compile(s, "max-autotune"), _compiler_here),
        "mkldnn": Provider(_mkldnn, _onednn_here),
        "cudagraph": Provider(_native, _on_cuda, captured=True),
        "addmm_activation": Provider(_addmm_activation, _cublaslt_here),
        "fused": Provider(_fused),
        "fused-cudagraph": Provider(_fused, _on_cuda, captured=True),
        **{
            path: Provider(_fused, _on_cuda, captured=True, path=path, takes=_path_takes(path))
            for path in ("small", "tall", "large")
        },
    },
    "train": {
        "native": Provider(loop.LAYERS["native"]),
        "cudagraph": Provider(_captured_step, _on_cuda),
        "compile": Provider(_compiled_model, _compiler_here),
        "compile-step": Provider(_compiled_step, _compiler_here),
        "fused": Provider(loop.LAYERS["fused"]),
        "stack": Provider(loop.LAYERS["stack"]),
        "step": Provider(loop.LAYERS["step"]),
        "fit": Provider(_fit, has_epochs=True),
        "jax": Provider(JaxStep, _jax_here),
    },
}
DEFAULT = {  # by device; of these, those of the suite
    "cpu": ("native", "compile", "compile-step", "fused", "stack", "step", "fit"),
    "cuda": (
        "native",
        "cudagraph",
        "compile",
        "compile-step",
        "fused",
        "fused-cudagraph",
        "stack",
        "step",
        "fit",
    ),
}
