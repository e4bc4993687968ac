"""The providers: ways to compute the same thing. To add one, add a function and a row."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlp_ext.bench.cases import Case, Nets, Setting
from mlp_ext.bench.compiled_step import compiled_step
from mlp_ext.bench.jax_step import ACTIVATIONS as JAX_ACTIVATIONS
from mlp_ext.bench.jax_step import JaxStep, JaxVmapStep
from mlp_ext.bench.plans import LAYER_PATHS, capability, paths, plan
from mlp_ext.bench.stacked import (
    Models,
    Optimizers,
    StackedStep,
    bmm_gradients,
    vmap_gradients,
)
from mlp_ext.bench.training import LAYERS, Step, sgd_step
from mlp_ext.functional import linear_act
from mlp_ext.nn import MODULES
from mlp_ext.step_graph import Graphs
from mlp_ext.train_step import TrainStep
from mlp_ext.train_steps import TrainSteps

Function = Callable[[Tensor, Tensor, Tensor], Tensor]  # [M, K], [N, K], [N] -> [M, N]


def _native(setting: Setting) -> Function:
    name = setting.activation
    if name == "identity":
        return F.linear
    if name == "gelu_tanh":
        return lambda input, weight, bias: F.gelu(F.linear(input, weight, bias), approximate="tanh")
    activation: Callable[[Tensor], Tensor] = getattr(torch, name, None) or getattr(F, name)
    return lambda input, weight, bias: activation(F.linear(input, weight, bias))


def _native_inplace(setting: Setting) -> Function:
    return lambda input, weight, bias: torch.relu_(F.linear(input, weight, bias))


def _compile(setting: Setting, mode: str = "default") -> Function:
    compiled: Function = torch.compile(_native(setting), mode=mode)
    if setting.mode != "backward":
        return compiled

    def function(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # With donated buffers backward could run only once. Compiled in the first forward.
        with torch._functorch.config.patch(donated_buffer=False):
            return compiled(input, weight, bias)

    return function


# Arguments of oneDNN: name, scalars, algorithm.
MKLDNN: dict[str, tuple[str, list[float], str | None]] = {
    "identity": ("none", [], None),
    "relu": ("relu", [], None),
    "sigmoid": ("sigmoid", [], None),
    "tanh": ("tanh", [], None),
    "leaky_relu": ("leaky_relu", [0.01], None),
    "silu": ("swish", [], None),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "hardtanh": ("hardtanh", [-1.0, 1.0], None),
}


def _mkldnn(setting: Setting) -> Function:
    operator: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
    activation = MKLDNN[setting.activation]
    return lambda input, weight, bias: operator(input, weight, bias, *activation)


def _fused(setting: Setting) -> Function:
    activation = setting.activation
    return lambda input, weight, bias: linear_act(input, weight, bias, activation)


PATHS = {"cpu": tuple(LAYER_PATHS), "cuda": ("small", "tall", "large")}  # of our kernels


def _path_takes(forced: str) -> Callable[[Case, Setting], bool]:
    """Forward or backward, as the mode has them."""

    def takes(case: Case, setting: Setting) -> bool:
        found = paths(plan(case, setting, _arch(setting), forced))
        return forced in (found[way] for way in found if setting.mode in (way, "full"))

    return takes


def _has_path(path: str) -> Callable[[Setting], str]:
    return lambda setting: "" if path in PATHS[setting.device] else f"no path on {setting.device}"


def _arch(setting: Setting) -> int:
    return capability() if setting.device == "cuda" else 0


def _addmm_activation(setting: Setting) -> Function:
    return lambda input, weight, bias: torch._addmm_activation(bias, input, weight.t())


def _compiled_model(model: nn.Module, *rest: Any) -> Step:
    return sgd_step(cast(nn.Module, torch.compile(model)), *rest)


def _captured_step(*parts: Any) -> Step:
    """The eager step as a CUDA graph."""
    step, graphs = sgd_step(*parts), Graphs()
    return lambda input, target: graphs(step, parts[2].param_groups[0]["lr"], input, target)


def _fit(make: Callable[..., Any], *parts: Any) -> Callable[..., Tensor]:
    """Epochs of one batch, by TrainStep or TrainSteps; returns the last loss or losses."""
    step = make(*parts)
    return lambda input, target, epochs=1: step.fit(input, target, epochs=epochs)[-1]


def _native_autocast(model: nn.Module, criterion: nn.Module, *rest: Any) -> Step:
    """The eager step whose forward and loss run under autocast."""
    autocast = _autocast_of(model)
    return sgd_step(autocast(model), autocast(criterion), *rest)


def _autocast(model: nn.Module, *rest: Any) -> Step:
    step: Step = _autocast_of(model)(TrainStep(model, *rest))
    return step


def _autocast_of(model: nn.Module) -> Any:
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


def _each(make: Callable[..., Step]) -> Callable[..., Any]:
    """Steps network after network."""

    def made(models: Models, criterion: nn.Module, optimizers: Optimizers) -> Any:
        steps = [make(m, criterion, o) for m, o in zip(models, optimizers, strict=True)]
        return lambda input, target: [step(input, target) for step in steps]

    return made


def _fit_each(models: Models, criterion: nn.Module, optimizers: Optimizers) -> Any:
    fits = [_fit(TrainStep, m, criterion, o) for m, o in zip(models, optimizers, strict=True)]
    return lambda input, target, epochs=1: [fit(input, target, epochs=epochs) for fit in fits]


def _stacked(gradients: Callable[..., Any], **options: Any) -> Callable[..., StackedStep]:
    """options: of torch.compile; not compiled without."""
    compile = partial(torch.compile, **options) if options else lambda step: step
    return partial(StackedStep, gradients, compile)


def _relu_only(setting: Setting) -> str:
    return "" if setting.activation == "relu" else "for relu only"


def _on_cuda(setting: Setting) -> str:
    return "" if setting.device == "cuda" else "on cuda only"


def _fused_optimizer_here(setting: Setting) -> str:
    on_cpu, optimizer = setting.device == "cpu", setting.optimizer
    if optimizer == "rmsprop" or (optimizer == "adagrad" and not on_cpu):
        return f"torch has no fused {optimizer} on {setting.device}"
    if optimizer == "sgd" and on_cpu and setting.torch_dtype.itemsize == 2:
        return f"torch's fused sgd does not update {setting.dtype} on the CPU"  # seen with 2.13
    return ""


def _float32_only(setting: Setting) -> str:
    return "" if setting.dtype == "float32" else "for parameters of float32 only"


def _capturable_here(setting: Setting) -> str:
    capturable = "" if setting.optimizer != "adagrad" else "adagrad cannot be captured"
    return _on_cuda(setting) or capturable


def _capturable(setting: Setting) -> dict[str, Any]:
    return {} if setting.optimizer == "sgd" else {"capturable": True}


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
    if setting.activation not in MKLDNN:
        return f"has no {setting.activation}"
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
    if setting.optimizer != "sgd":
        return "for sgd only"
    if type(MODULES[setting.activation]()) not in JAX_ACTIVATIONS:
        return f"not written for {setting.activation}"
    return "" if find_spec("jax") else "needs jax"


class Provider(NamedTuple):
    """`make` takes a Setting in layers; in train it is called like training.LAYERS; in many it
    takes models, criterion and optimizers, and its steps return the losses."""

    make: Callable[..., Any]
    about: str = ""  # one line
    obstacle: Callable[[Setting], str] = lambda setting: ""  # why it does not apply, or ""
    planned: bool = False  # it runs the path of `plan`
    captured: bool = False  # in layers: on cuda, captured in a CUDA graph and replayed
    options: Callable[[Setting], dict[str, Any]] = lambda setting: {}  # optimizer options
    has_epochs: bool = False  # of networks: a call may run several steps; the time is of one
    one_by_one: bool = False  # in many: runs the path of each network alone
    path: str | None = None  # of csrc/*/plan.h, forced
    rounds_to: str | None = None  # the dtype that it computes in, if not the setting's
    takes: Callable[[Case, Setting], bool] = lambda case, setting: True


def path(case: Case, setting: Setting, provider: Provider) -> str:
    """The path of our kernels that it runs, forward/backward in mode full; "" for others."""
    if provider.path or not provider.planned:
        return provider.path or ""
    if isinstance(case, Nets) and provider.one_by_one:
        case = case.net
    found = paths(plan(case, setting, _arch(setting)))
    return "/".join(dict.fromkeys(found[way] for way in found if setting.mode in (way, "full")))


PROVIDERS: dict[str, dict[str, Provider]] = {  # by suite
    "layers": {
        "native": Provider(_native, "F.linear and the activation"),
        "native_inplace": Provider(_native_inplace, "the same with relu_", _relu_only),
        "compile": Provider(_compile, "torch.compile of native", _compiler_here),
        "compile-max-autotune": Provider(
            lambda setting: _compile(setting, "max-autotune"),
            "the same with mode max-autotune; takes minutes",
            _compiler_here,
        ),
        "mkldnn": Provider(_mkldnn, "oneDNN's fused forward, as torch has it", _onednn_here),
        "cudagraph": Provider(_native, "native in a CUDA graph", _on_cuda, captured=True),
        "addmm_activation": Provider(
            _addmm_activation, "torch's product with cuBLASLt's ReLU", _cublaslt_here
        ),
        "fused": Provider(_fused, "mlp_ext.linear_act", planned=True),
        "fused-cudagraph": Provider(
            _fused, "fused in a CUDA graph", _on_cuda, planned=True, captured=True
        ),
        **{
            path: Provider(
                _fused,
                f"fused by the path {path}, where it takes the case; on cuda in a CUDA graph",
                _has_path(path),
                captured=True,
                path=path,
                takes=_path_takes(path),
            )
            for path in dict.fromkeys((*PATHS["cpu"], *PATHS["cuda"]))
        },
    },
    "train": {
        "native": Provider(LAYERS["native"], "the eager loop"),
        "native_fused": Provider(
            LAYERS["native"],
            "the same with the optimizer's fused=True",
            _fused_optimizer_here,
            options=lambda setting: {"fused": True},
        ),
        "cudagraph": Provider(
            _captured_step, "native in a CUDA graph", _capturable_here, options=_capturable
        ),
        "compile": Provider(_compiled_model, "torch.compile of the model", _compiler_here),
        "compile-step": Provider(
            compiled_step, "torch.compile of the whole step, as one graph", _compiler_here
        ),
        "fused": Provider(LAYERS["fused"], "mlp_ext.fuse(model)"),
        "stack": Provider(LAYERS["stack"], 'mlp_ext.fuse(model, level="stack")'),
        "step": Provider(LAYERS["step"], "mlp_ext.TrainStep", planned=True),
        "fit": Provider(
            partial(_fit, TrainStep),
            "TrainStep.fit, many epochs of one batch",
            planned=True,
            has_epochs=True,
        ),
        "native_autocast": Provider(
            _native_autocast,
            "native under torch.autocast in bfloat16",
            _float32_only,
            rounds_to="bfloat16",
        ),
        "autocast": Provider(
            _autocast,
            "mlp_ext.TrainStep under torch.autocast in bfloat16",
            _float32_only,
            rounds_to="bfloat16",
        ),
        "jax": Provider(JaxStep, "the jitted step in JAX, which chooses its threads", _jax_here),
    },
    "many": {
        "native": Provider(_each(LAYERS["native"]), "the eager loop, network after network"),
        "vmap": Provider(
            _stacked(vmap_gradients), "torch.func: vmap(grad) of stacked parameters, and the update"
        ),
        "bmm": Provider(
            _stacked(bmm_gradients), "stacked parameters, baddbmm and autograd, and the update"
        ),
        "compile-vmap": Provider(
            _stacked(vmap_gradients, dynamic=False, fullgraph=True),
            "torch.compile of vmap, as one graph",
            _compiler_here,
        ),
        "step": Provider(
            _each(LAYERS["step"]), "TrainStep of each in turn", planned=True, one_by_one=True
        ),
        "fit": Provider(
            _fit_each,
            "TrainStep.fit of each in turn, many epochs of one batch",
            planned=True,
            has_epochs=True,
            one_by_one=True,
        ),
        "steps": Provider(
            partial(_fit, TrainSteps),
            "mlp_ext.TrainSteps.fit, many epochs of one batch",
            planned=True,
            has_epochs=True,
        ),
        "jax-vmap": Provider(JaxVmapStep, "the jitted vmap of the step in JAX", _jax_here),
    },
}
DEFAULT = {  # by device; those that the suite has
    "cpu": (
        "native",
        "native_fused",
        "compile",
        "compile-step",
        "vmap",
        "bmm",
        "compile-vmap",
        "fused",
        "stack",
        "step",
        "fit",
        "steps",
    ),
    "cuda": (
        "native",
        "native_fused",
        "cudagraph",
        "compile",
        "compile-step",
        "vmap",
        "bmm",
        "compile-vmap",
        "fused",
        "fused-cudagraph",
        "stack",
        "step",
        "fit",
        "steps",
    ),
}
