"""torch.compile(model, backend="mlp_ext"): Inductor with Linear and activation as one operator.

pyproject.toml names compile_graph as an entry point, through which torch finds it: nothing has to
be imported.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node

from mlp_ext import _C
from mlp_ext.graph import Pair, find_pairs, linear_operands, replace_pairs
from mlp_ext.nn import DTYPES
from mlp_ext.ops import build_info

log = logging.getLogger(__name__)


def compile_graph(
    module: GraphModule,
    inputs: Sequence[Any],
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The backend, as Dynamo calls it; mode and options of torch.compile are Inductor's."""
    fuse_graph(module)
    inductor: Any = torch._TorchCompileInductorWrapper(mode, options, dynamic=None)
    return inductor(module, inputs)


def fuse_graph(module: GraphModule) -> list[Pair]:
    """Replaces the pairs that win as one operator, in place; returns them.

    Graphs within, such as that of a checkpoint, are changed too. Why another pair is left to
    Inductor is logged.
    """
    fused = []
    for part in [m for m in module.modules() if isinstance(m, GraphModule)]:
        pairs = []
        for pair in find_pairs(part.graph, _is_linear):
            reason = why_not(pair)
            log.info("%s and %s: %s", pair.linear, pair.activation_node, reason or "fused")
            if not reason:
                pairs.append(pair)
        replace_pairs(pairs, _linear_act)
        part.recompile()
        fused += pairs
    return fused


def _linear_act(graph: Graph, pair: Pair) -> Node:
    name, parameters = pair.activation
    arguments = (*linear_operands(pair.linear), name, list(parameters))
    return graph.call_function(torch.ops.mlp_ext.linear_act.default, arguments)


def _is_linear(node: Node) -> bool:
    return node.op == "call_function" and node.target is F.linear


def why_not(pair: Pair) -> str:
    """Why Inductor computes the pair, with the shapes that Dynamo saw first; "" if the operator is
    faster.

    On the CPU it is, by 1.1 times and more, in all that benchmarks/results/layers-*.csv have of
    both. On a GPU the plan tells: where it takes native operations, Inductor has the same ones and
    may merge the activation with what follows.
    """
    z, y = _value(pair.linear), _value(pair.activation_node)
    x, weight, bias = map(_value, linear_operands(pair.linear))
    if z is None or y is None or x is None or weight is None:
        return "an operand is not a plain tensor"
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return "weight must be [N, K] and bias [N]"
    if z.dtype not in DTYPES or y.dtype != z.dtype:
        return f"the layer computes in {z.dtype}, its activation in {y.dtype}"
    if z.device.type == "cpu":
        return ""
    if z.device.type != "cuda" or build_info()["cuda"] is None:
        return f"built without kernels for {z.device.type}"
    M, K, N = map(_hint, (prod(x.shape[:-1]), weight.shape[1], weight.shape[0]))
    if M is None or K is None or N is None:  # known only when it runs
        return ""
    dtype, (major, minor) = z.dtype, torch.cuda.get_device_capability(z.device)
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    name, arch = str(dtype).removeprefix("torch."), 10 * major + minor
    plan = _C.cuda_plan(M, K, N, name, pair.activation.name, arch, tf32=tf32)
    return plan["forward_reason"] if plan["forward"] == "native" else ""


def _value(node: Any) -> Tensor | None:
    """The plain tensor that Dynamo saw; None for subclasses, which may be quantized or sharded."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if type(value) is FakeTensor and value.layout is torch.strided else None


def _hint(size: int | torch.SymInt) -> int | None:
    return size if isinstance(size, int) else size.node.hint
