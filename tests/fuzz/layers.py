"""One layer, as function and as module, on each path of the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from hypotheses import st
from references import Results
from torch import Tensor, nn

import mlp_ext
from fuzz import data
from fuzz.plans import Plan, planned, plans
from fuzz.rule import Tensors
from mlp_ext.nn import LinearAct, activation_of

OPERANDS = ("input", "weight", "bias", "grad_output")
Four = tuple[str, str, str, str]


@dataclass(frozen=True)
class Layer:
    luck: ClassVar[int] = 0
    leading: tuple[int, ...]
    K: int
    N: int
    dtype: str
    activation: data.Activation
    bias: bool
    learns: tuple[bool, bool, bool]  # input, weight, bias
    values: Four  # of OPERANDS
    layouts: Four
    is_module: bool
    plan: Plan
    seed: int

    def is_exact(self) -> bool:
        return all(kind in data.EXACT for kind in self.values)

    def tensors(self) -> Tensors:
        data.seed(self.seed)
        shapes = (*self.leading, self.K), (self.N, self.K), (self.N,), (*self.leading, self.N)
        drawn = {
            name: data.tensor(values, layout, *shape, dtype=self.dtype)
            for name, values, layout, shape in zip(
                OPERANDS, self.values, self.layouts, shapes, strict=True
            )
        }
        return {name: t for name, t in drawn.items() if self.bias or name != "bias"}

    def ours(self, tensors: Tensors) -> Results:
        activation = data.module_of(self.activation)
        kind = LinearAct.by_module.get(type(activation))
        name, parameters = activation_of(activation) or ("identity", ())

        def layer(linear: nn.Linear, x: Tensor) -> Tensor:
            if self.is_module and kind:
                return kind.from_linear(linear, **self.activation[1])(x)  # type: ignore[no-any-return]
            return mlp_ext.linear_act(x, linear.weight, linear.bias, name, parameters or None)

        with planned(self.plan):
            return self._results(tensors, layer)

    def native(self, tensors: Tensors) -> Results:
        activation = data.native_of(self.activation)
        return self._results(tensors, lambda linear, x: activation(linear(x)))

    def _results(self, tensors: Tensors, layer: Callable[[nn.Linear, Tensor], Tensor]) -> Results:
        linear = nn.Linear(1, 1)
        input, weight, bias = (
            nn.Parameter(tensors[name], learns) if name in tensors else None
            for name, learns in zip(OPERANDS[:3], self.learns, strict=True)
        )
        linear.weight, linear.bias = weight, bias
        output = layer(linear, input)
        found = {"output": output.detach()}
        if output.requires_grad:
            output.backward(tensors["grad_output"])
        leaves = {"input": input, "weight": weight, "bias": bias}
        return found | {
            k: t.grad for k, t in leaves.items() if t is not None and t.grad is not None
        }


def _fitting(layer: Layer) -> Layer:
    """With fewer rows if it is too large."""
    rows = torch.Size(layer.leading).numel()
    if rows * layer.K * layer.N <= data.MULTIPLY_ADDS:
        return layer
    return replace(layer, leading=(rows % 71,))


layers = st.builds(
    Layer,
    leading=data.leadings,
    K=data.sizes,
    N=data.sizes,
    dtype=data.dtypes,
    activation=data.activations,
    bias=st.booleans(),
    learns=st.tuples(*3 * (st.booleans(),)),
    values=st.tuples(*4 * (data.values,)),
    layouts=st.tuples(*4 * (data.layouts,)),
    is_module=st.booleans(),
    plan=plans,
    seed=data.seeds,
).map(_fitting)
