"""How many pairs of linear layer and activation a model executes, and how many of them run fused.

`python tests/pairs.py` prints both for each model of tests/models.py.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from models import EXAMPLES, Example
from torch import Tensor, fx, nn
from torch._inductor import config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mlp_ext

ACTIVATIONS = {
    *("relu", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "silu"),
    *("gelu", "softplus", "hardtanh", "relu6", "mish"),
}


def executed_pairs(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """How often a forward in training mode applies an activation to the result of F.linear."""
    with _Pairs() as mode:
        model.train()(*inputs)
    return mode.count


class _Pairs(TorchFunctionMode):
    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []  # of F.linear

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "").rstrip("_")
        if name == "linear":
            self.results.append(result)
        elif name in ACTIVATIONS:
            self.count += any(first is y for y in self.results)
        return result


def found_by_fuse(example: Example) -> int:
    """How many pairs run fused after mlp_ext.fuse, in training mode."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fuse changed nothing")
        model = mlp_ext.fuse(example.model())
    with _Operators() as mode:
        model.train()(*example.batch())
    return mode.count


class _Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += _activations(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def _activations(function: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """How many activations a call of an operator computes with their linear layers."""
    name = getattr(function, "_opname", "")
    if getattr(function, "namespace", "") != "mlp_ext" or name not in FORWARD:
        return 0
    names = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, str)]
    return sum(name != "identity" for name in names or ["relu"])  # linear_act's default


FORWARD = ("linear_act", "_linear_act_forward", "mlp", "_mlp_forward")


def found_by_compile(example: Example) -> int:
    """How many pairs torch.compile(model, backend="mlp_ext") hands fused to Inductor, in
    training mode."""
    count = 0

    def look(graph: fx.Graph) -> None:
        nonlocal count
        if any("tangents" in str(node.target) for node in graph.nodes if node.op == "placeholder"):
            return  # of the backward
        count += sum(_activations(node.target, node.args, node.kwargs) for node in graph.nodes)

    torch._dynamo.reset()
    with config.patch(post_grad_custom_pre_pass=look, force_disable_caches=True):
        torch.compile(example.model().train(), backend="mlp_ext")(*example.batch())
    torch._dynamo.reset()
    return count


class Row(NamedTuple):
    name: str
    group: str
    pairs: int
    by_fuse: int
    by_compile: int | None  # None: fuse has found all

    @property
    def found(self) -> int:
        return max(self.by_fuse, self.by_compile or 0)


def yardstick() -> list[Row]:
    """The pairs found in each example: by fuse, or by the backend where fuse finds fewer."""
    rows = []
    for name, example in EXAMPLES.items():
        by_fuse = found_by_fuse(example)
        by_compile = found_by_compile(example) if by_fuse < example.pairs else None
        rows.append(Row(name, example.group, example.pairs, by_fuse, by_compile))
    return rows


if __name__ == "__main__":
    rows = yardstick()
    for row in rows:
        backend = "" if row.by_compile is None else f"  {row.by_compile} by the backend"
        style = EXAMPLES[row.name].style
        print(f"{row.name:20}{row.pairs} pairs  {row.by_fuse} by fuse{backend}  {style}")
    for group in ("tutorial", "rl", "library", ""):
        part = [row for row in rows if group in (row.group, "")]
        found, pairs = sum(row.found for row in part), sum(row.pairs for row in part)
        print(f"{group or 'all'}: {found} of {pairs} pairs found")
