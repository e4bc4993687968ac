"""What cases are drawn from: sizes, values, layouts, activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypotheses import st
from shapes import LAYOUTS, grid
from torch import Tensor, nn

DTYPES = ("float32", "float64", "bfloat16", "float16")
# Each below 71, so each tail of each vector; a few that need several blocks.
SIZES = (*range(1, 71), 0, 96, 127, 129, 200, 257, 513, 1000)
MULTIPLY_ADDS = 1 << 21  # at most, of the largest layer


def seed(value: int) -> None:
    """torch.manual_seed without the seeds of devices, which take milliseconds."""
    torch.default_generator.manual_seed(value)


def _with(value: float) -> Callable[..., Tensor]:
    """One element of a grid replaced: no order of sums decides whether they overflow."""

    def make(*sizes: int, dtype: torch.dtype) -> Tensor:
        t = grid(*sizes, dtype=dtype)
        if t.numel():
            t.view(-1)[torch.randint(t.numel(), ())] = value
        return t

    return make


def _huge(*sizes: int, dtype: torch.dtype) -> Tensor:
    """Products of two are infinite, sums of products of one are not."""
    value = 0.75 * torch.finfo(dtype).max ** (0.9 if dtype != torch.float16 else 0.75)
    return _with(value)(*sizes, dtype=dtype)


def _zeros(*sizes: int, dtype: torch.dtype) -> Tensor:
    """Three in four, of both signs."""
    t = grid(*sizes, dtype=dtype)
    return torch.where(torch.rand(sizes) < 0.75, torch.copysign(torch.zeros_like(t), t), t)


def _subnormal(*sizes: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(sizes, dtype=torch.float64) * torch.finfo(dtype).tiny / 8).to(dtype)


# Functions of sizes and dtype. The exact ones are multiples of 1/8 up to 1: see shapes.grid.
EXACT: dict[str, Callable[..., Tensor]] = {
    "grid": grid,
    "zeros": _zeros,
    "nan": _with(torch.nan),
    "inf": _with(torch.inf),
    "-inf": _with(-torch.inf),
}
VALUES: dict[str, Callable[..., Tensor]] = EXACT | {
    "normal": torch.randn,
    "large": lambda *sizes, dtype: 30 * torch.randn(sizes, dtype=dtype),
    "huge": _huge,
    "subnormal": _subnormal,
}


def _unaligned(t: Tensor) -> Tensor:
    flat = t.new_full([t.numel() + 3], torch.nan)
    return flat[3:].view(t.shape).copy_(t)


KEEP_VALUES = ("gaps", "rows_far_apart", "transposed", "leading_swapped", "negated")
ARRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "unaligned": _unaligned,
    **LAYOUTS,
}
OF_PARAMETERS = ("contiguous", "unaligned", *KEEP_VALUES[:3])

Activation = tuple[str, dict[str, Any]]  # its class in torch.nn, and options


def module_of(activation: Activation) -> nn.Module:
    name, options = activation
    module: nn.Module = getattr(nn, name)(**options)
    return module


class _Settled(nn.Module):
    """torch's derivatives at NaN of these depend on whether a whole vector is computed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.is_clamp = isinstance(module, nn.Hardtanh)  # also ReLU6

    def forward(self, z: Tensor) -> Tensor:
        """dz = dy for clamps, and NaN for the others."""
        if self.is_clamp:
            return torch.where(z.isnan(), z, self.module(z))
        return self.module(z) * torch.ones_like(z).masked_fill(z.isnan(), torch.nan)


def native_of(activation: Activation) -> nn.Module:
    module = module_of(activation)
    return _Settled(module) if isinstance(module, (nn.ELU, nn.SELU, nn.Hardtanh)) else module


def tensor(values: str, layout: str, *sizes: int, dtype: str) -> Tensor:
    t = VALUES[values](*sizes, dtype=getattr(torch, dtype))
    return ARRANGE[layout](t) if t.numel() else t


# --- Strategies ---

dtypes = st.sampled_from(DTYPES)
sizes = st.sampled_from(SIZES)
leadings = st.one_of(st.tuples(sizes), st.lists(st.integers(0, 6), max_size=3).map(tuple))
seeds = st.integers(0, 2**16)
values = st.sampled_from((*4 * ("grid", "normal"), *VALUES))
layouts = st.sampled_from((*8 * ("contiguous",), *ARRANGE))
parameter_layouts = st.sampled_from((*4 * ("contiguous",), *OF_PARAMETERS))


def _one(name: str, **options: Any) -> Any:
    return st.tuples(st.just(name), st.fixed_dictionaries(options))


eighths = st.integers(-16, 16).map(lambda i: i / 8)  # kinks are where exact sums may be
_PLAIN = ("SELU", "SiLU", "GELU", "Softplus", "ReLU6", "Mish", "LeakyReLU", "ELU", "Hardtanh")
activations = st.one_of(
    *(_one(name) for name in ("Identity", "ReLU", "Sigmoid", "Tanh")),
    st.one_of(*(_one(name) for name in _PLAIN)),
    _one("GELU", approximate=st.just("tanh")),
    _one("LeakyReLU", negative_slope=eighths),
    _one("ELU", alpha=eighths),
    _one("Softplus", beta=st.sampled_from((0.5, 1.0, 3.0)), threshold=st.sampled_from((0.0, 1.0))),
    _one("Hardtanh", min_val=eighths, max_val=st.just(2.125)),
)
