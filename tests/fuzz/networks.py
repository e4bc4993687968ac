"""Networks: as Sequential, fused, and fused in forward code, with all their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from hypotheses import st
from references import Results
from torch import Tensor, nn

import mlp_ext
from fuzz import data
from fuzz.plans import Plan, planned, plans
from fuzz.rule import Tensors


class Dense(NamedTuple):
    """A linear layer and its activation."""

    N: int
    activation: data.Activation
    bias: bool
    learns: tuple[bool, bool]  # weight, bias
    values: str
    layout: str


Layers = tuple[Dense, ...]


def parameters(K: int, layers: Layers, dtype: str, prefix: str = "") -> Tensors:
    found: Tensors = {}
    for i, (k, layer) in enumerate(zip((K, *(each.N for each in layers)), layers, strict=False)):
        weight = data.tensor(layer.values, layer.layout, layer.N, k, dtype=dtype)
        if layer.values == "normal" and k:
            weight /= k**0.5  # so that outputs are of size 1
        found[f"{prefix}{i}.weight"] = weight
        if layer.bias:
            found[f"{prefix}{i}.bias"] = data.tensor("normal", "contiguous", layer.N, dtype=dtype)
    return found


def children(
    layers: Layers,
    tensors: Tensors,
    make: Callable[[data.Activation], nn.Module] = data.module_of,
    prefix: str = "",
) -> list[nn.Module]:
    """Linear and activation in turn, whose Parameters are these tensors."""
    found: list[nn.Module] = []
    for i, layer in enumerate(layers):
        linear = nn.Linear(1, 1)
        weight, bias = (tensors.get(f"{prefix}{i}.{name}") for name in ("weight", "bias"))
        assert weight is not None
        linear.weight = nn.Parameter(weight, layer.learns[0])
        linear.bias = None if bias is None else nn.Parameter(bias, layer.learns[1])
        linear.out_features, linear.in_features = weight.shape
        found += [linear, make(layer.activation)]
    return found


class Modules(nn.Module):
    """Code that calls layers and activations."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.linears, self.activations = nn.ModuleList(modules[::2]), nn.ModuleList(modules[1::2])

    def forward(self, x: Tensor) -> Tensor:
        for linear, activation in zip(self.linears, self.activations, strict=True):
            x = activation(linear(x))
        return x


class Functions(Modules):
    """Code with functions and methods as activations, and the layers' own."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.linears[0](x))
        for linear in self.linears[1:]:
            x = linear(x).tanh()
        return torch.sigmoid(x)


# How a model is made of its modules natively, and what is made of that.
WAYS: dict[str, tuple[Callable[..., nn.Module], Callable[[Any], nn.Module]]] = {
    "Sequential": (nn.Sequential, lambda model: mlp_ext.Sequential(*model)),
    "layers": (nn.Sequential, lambda model: mlp_ext.fuse(model, level="layers")),
    "stack": (nn.Sequential, lambda model: mlp_ext.fuse(model, level="stack")),
    "modules in code": (Modules, mlp_ext.fuse),
    "functions in code": (Functions, mlp_ext.fuse),
}


@dataclass(frozen=True)
class Network:
    luck: ClassVar[int] = 0
    leading: tuple[int, ...]
    K: int
    layers: Layers
    dtype: str
    way: str
    learns: bool  # the input
    values: tuple[str, str]  # of input and grad_output
    layouts: tuple[str, str]
    plan: Plan
    seed: int

    def is_exact(self) -> bool:
        return False

    def tensors(self) -> Tensors:
        data.seed(self.seed)
        shapes = (*self.leading, self.K), (*self.leading, self.layers[-1].N)
        data_of = zip(("input", "grad_output"), self.values, self.layouts, shapes, strict=True)
        return parameters(self.K, self.layers, self.dtype) | {
            name: data.tensor(values, layout, *shape, dtype=self.dtype)
            for name, values, layout, shape in data_of
        }

    def ours(self, tensors: Tensors) -> Results:
        with planned(self.plan):
            make, fuse = WAYS[self.way]
            return self._results(fuse(make(*children(self.layers, tensors))), tensors)

    def native(self, tensors: Tensors) -> Results:
        modules = children(self.layers, tensors, data.native_of)
        return self._results(WAYS[self.way][0](*modules), tensors)

    def _results(self, model: nn.Module, tensors: Tensors) -> Results:
        x = tensors["input"].requires_grad_(self.learns)
        output = model(x)
        if output.requires_grad:
            output.backward(tensors["grad_output"])
        leaves = [x, *model.parameters()]  # in the same order in each way
        gradients = {f"gradient {i}": t.grad for i, t in enumerate(leaves)}
        return {"output": output.detach()} | {k: g for k, g in gradients.items() if g is not None}


def _without(values: Sequence[str], layer: Dense) -> Dense:
    return layer._replace(values="grid") if layer.values in values else layer


def fitting(case: Network) -> Network:
    """With fewer rows if it is too large, and what rounding decides left out.

    Sums of huge terms may cancel, and what is left depends on their order; so one operand is huge.
    Infinity times an output is NaN if that is 0, to which gelu and others round small values.
    """
    first, *others = case.layers
    first = _without(["huge"], first) if "huge" in case.values else first
    others = [_without(["huge", "inf", "-inf"], layer) for layer in others]
    case = replace(case, layers=(first, *others))
    widths = case.K, *(layer.N for layer in case.layers)
    rows, largest = torch.Size(case.leading).numel(), max(k * n for k, n in pairwise(widths))
    if rows * largest <= data.MULTIPLY_ADDS:
        return case
    return replace(case, leading=(rows % 21,))


layers = st.lists(
    st.builds(
        Dense,
        N=data.sizes,
        activation=data.activations,
        bias=st.booleans(),
        learns=st.sampled_from(
            (*3 * ((True, True),), (True, False), (False, True), (False, False))
        ),
        values=data.values,
        layout=data.parameter_layouts,
    ),
    min_size=1,
    max_size=4,
).map(tuple)

networks = st.builds(
    Network,
    leading=data.leadings,
    K=data.sizes,
    layers=layers,
    dtype=data.dtypes,
    way=st.sampled_from([*WAYS]),
    learns=st.booleans(),
    values=st.tuples(data.values, data.values),
    layouts=st.tuples(data.layouts, data.layouts),
    plan=plans,
    seed=data.seeds,
).map(fitting)
