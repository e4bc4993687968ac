"""What PyTorch's tools need to know about the operators: decompositions, FLOP counts, and rules for
ONNX's older exporter, jagged tensors and DTensor.

Tools that take long to import are told when they are first imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch._decomp import register_decomposition
from torch.nested._internal.nested_tensor import NestedTensor
from torch.utils.flop_counter import register_flop_formula

from mlp_ext.nn import LinearAct
from mlp_ext.ops import PARAMETERS
from mlp_ext.sequential import Sequential

ops = torch.ops.mlp_ext
FORWARD = [ops.linear_act.default, ops._linear_act_forward.default]
BACKWARD = ops._linear_act_backward.default
STACKS = [ops.mlp.default, ops._mlp_forward.default, ops._mlp_backward.default]

Shape = Sequence[int]


# ---- decompositions ----


def decomposed(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """The operator as a composite: a stack of its layers, a layer of PyTorch's operations."""
    return operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)


for operator in (*FORWARD, BACKWARD, *STACKS):
    register_decomposition(operator, unsafe=True)(partial(decomposed, operator))


# ---- FLOPs: those of the matrix products, as PyTorch counts ----


@register_flop_formula([ops.linear_act, ops._linear_act_forward])
def _flops(input: Shape, weight: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(input[:-1]) * prod(weight)


@register_flop_formula(ops._linear_act_backward)
def _backward_flops(
    grad_output: Shape,
    saved: Shape | None,
    input: Shape | None,
    weight: Shape | None,
    activation: str,
    parameters: Sequence[float],
    output_mask: Sequence[bool],
    **kwargs: Any,
) -> int:
    K = (weight or input or (0,))[-1]
    return 2 * prod(grad_output) * K * sum(output_mask[:2])


@register_flop_formula([ops.mlp, ops._mlp_forward])
def _stack_flops(input: Shape, weights: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    return 2 * prod(input[:-1]) * sum(map(prod, weights))


@register_flop_formula(ops._mlp_backward)
def _stack_backward_flops(
    grad_outputs: Sequence[Shape | None],
    input: Shape | None,
    weights: Sequence[Shape],
    outputs: Sequence[Shape | None],
    activations: Sequence[str],
    parameters: Sequence[float],
    output_mask: Sequence[bool],
    out_shape: Sequence[Shape] = (),
) -> int:
    L, (reaches, *learns) = len(weights), output_mask
    products = sum(map(prod, out_shape[reaches : reaches + sum(learns[:L])]))  # dW = dz^T x
    for weight, *learning in zip(weights, learns[:L], learns[L:], strict=True):
        products += prod(weight) if reaches else 0  # dx = dz W
        reaches = reaches or any(learning)
    return 2 * prod(next(filter(None, grad_outputs))[:-1]) * products


# ---- jagged tensors: the rows of a batch, one after the other ----


def _jagged(cls: Any, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
    from torch.nested._internal.ops import extract_kwargs

    jagged = next(a for a in args if isinstance(a, NestedTensor))
    if jagged._ragged_idx != 1:
        raise NotImplementedError(f"{operator}: the ragged dimension must be the second")
    rows = [a._values if isinstance(a, NestedTensor) else a for a in args]
    outputs = operator(*rows, **kwargs)

    def wrapped(values: Any) -> Any:
        return None if values is None else NestedTensor(values, **extract_kwargs(jagged))

    if operator is BACKWARD:
        return wrapped(outputs[0]), *outputs[1:]
    return tuple(map(wrapped, outputs)) if isinstance(outputs, tuple) else wrapped(outputs)


def _by_layer(cls: Any, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
    return decomposed(operator, *args, **kwargs)


def _register_rule(operators: Sequence[Any], tensor: type, rule: Callable[..., Any]) -> None:
    for operator in operators:
        torch.library.register_torch_dispatch(operator, tensor, rule)


_register_rule([*FORWARD, BACKWARD], NestedTensor, _jagged)
_register_rule(STACKS, NestedTensor, _by_layer)


# ---- torch.jit.script ----


def _refuse_script(module: torch.nn.Module) -> NoReturn:
    name = module._get_name()
    raise NotImplementedError(f"{name} does not support torch.jit.script; use torch.export.export")


for kind in (LinearAct, Sequential):
    kind.__prepare_scriptable__ = _refuse_script  # type: ignore[union-attr]


# ---- tools that are told when they are imported ----


class AfterImport:
    """An import finder that calls a function after the first import of a module."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module, self.then = module, then
        if module in sys.modules:
            then()
        else:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        others = [getattr(f, "find_spec", None) for f in sys.meta_path if f is not self]
        specs = (find(name, path, target) for find in others if find)
        spec: ModuleSpec | None = next(filter(None, specs), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_then(module: ModuleType) -> None:  # not for each spec: some only look for one
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.then()

        spec.loader.exec_module = run_then  # type: ignore[method-assign]
        return spec


def _register_onnx() -> None:
    """For torch.onnx.export(dynamo=False). With dynamo=True the decompositions serve."""
    from torch.onnx._internal.torchscript_exporter import registration, symbolic_helper
    from torch.onnx.utils import register_custom_op_symbolic

    constant: Any = symbolic_helper._maybe_get_const

    def symbolic(
        g: Any, input: Any, weight: Any, bias: Any, activation: Any, parameters: Any
    ) -> Any:
        def call(name: str, *args: Any) -> Any:
            group: Any = registration.registry.get_function_group(f"aten::{name}")
            return group.get(g.opset)(g, *args)

        z = call("linear", input, weight, bias)
        name = str(constant(activation, "s"))
        if name == "identity":
            return z
        if name in ("gelu", "gelu_tanh"):
            return call("gelu", z, "tanh" if name == "gelu_tanh" else "none")
        node = parameters.node()  # a constant, a list of constants, or None
        numbers: Any = [constant(number, "f") for number in node.inputs()]
        if node.kind() == "onnx::Constant":
            numbers = constant(parameters, "fs")
        numbers = [*(numbers or PARAMETERS[name].values())]
        if name == "elu":
            numbers += [1.0, 1.0]  # scale, input_scale
        return call(name, z, *[g.op("Constant", value_t=torch.tensor(n)) for n in numbers])

    register_custom_op_symbolic("mlp_ext::linear_act", symbolic, 9)


def _register_dtensor() -> None:
    """A stack of DTensors runs layer by layer; rules of a layer: sharding.py."""
    from torch.distributed.tensor import DTensor

    _register_rule(STACKS, DTensor, _by_layer)


def _register_inductor() -> None:
    """Inductor calls the operators. In CI, which the environment variable CI tells it, it would
    refuse to, since they have decompositions."""
    from torch._inductor.lowering import FALLBACK_ALLOW_LIST

    for operator in (*FORWARD, BACKWARD, *STACKS):
        FALLBACK_ALLOW_LIST.add(operator.name().partition(".")[0])


AfterImport("torch.onnx", _register_onnx)
AfterImport("torch._inductor.lowering", _register_inductor)
AfterImport("torch.distributed.tensor", _register_dtensor)
