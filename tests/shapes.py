"""The cases: shapes, dtypes, and the awkward ways in which a tensor can lie in memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

Operands = dict[str, Any]  # Tensors by name: input, weight and, where there is one, bias


class Shape(NamedTuple):
    leading: tuple[int, ...]
    K: int
    N: int

    def __str__(self) -> str:
        return "x".join(map(str, [*self.leading, self.K, self.N]))


ONE_ROW = Shape((), 5, 3)
SMALL = Shape((10,), 10, 5)
ODD = Shape((33,), 65, 17)
THREE_LEADING = Shape((2, 3, 4), 6, 5)
MID = Shape((64,), 784, 256)
TALL = Shape((4099,), 64, 64)
WIDE = Shape((37,), 1031, 129)
BROAD = Shape((1801,), 40, 300)
DEEP = Shape((24,), 999, 130)  # few rows
PAGES = Shape((1,), 1024, 131)  # rows of the weight lie at multiples of a page

SHAPES = [
    ONE_ROW,
    SMALL,
    ODD,
    THREE_LEADING,
    Shape((7,), 13, 5),
    Shape((1,), 1, 1),
    Shape((9,), 4, 1),
    Shape((6,), 1, 8),
    Shape((0,), 4, 3),
    Shape((2, 0, 3), 4, 3),
    Shape((4,), 0, 3),
    Shape((4,), 3, 0),
]
LARGE_SHAPES = [MID, TALL, WIDE, BROAD, DEEP, PAGES]


def grid(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/8 in [-1, 1]. Sums of their products are exact in float32.

    So z has the same sign in every order of summation, and often is 0, where relu has its kink.
    """
    return (torch.randint(-8, 9, sizes) / 8).to(dtype)


def operands(shape: Shape, dtype: torch.dtype = torch.float32, bias: bool = True) -> Operands:
    found = {
        "input": grid(*shape.leading, shape.K, dtype=dtype),
        "weight": grid(shape.N, shape.K, dtype=dtype),
    }
    return found | {"bias": grid(shape.N, dtype=dtype)} if bias else found


def leaves(shape: Shape = SMALL, live: tuple[bool, ...] = (True, True, True)) -> Operands:
    named = operands(shape).items()
    return {name: t.requires_grad_(on) for (name, t), on in zip(named, live, strict=True)}


def grad_output(shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    return grid(*shape.leading, shape.N, dtype=dtype)


def _gaps(t: Tensor) -> Tensor:
    """Every other column of every other row, an odd offset into the storage, NaN in between."""
    big = t.new_full([2 * size + 3 for size in t.shape], torch.nan)
    view = big[tuple(slice(3, None, 2) for _ in t.shape)]
    return view.copy_(t)


def _rows_far_apart(t: Tensor) -> Tensor:
    big = t.new_full([*t.shape[:-1], t.shape[-1] + 1000], torch.nan)
    return big[..., 7 : 7 + t.shape[-1]].copy_(t)


def _transposed(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _leading_swapped(t: Tensor) -> Tensor:
    """The last dimension is contiguous, and yet the leading ones do not fold into one."""
    return t.transpose(0, -2).contiguous().transpose(0, -2) if t.dim() > 2 else _rows_far_apart(t)


def _negated(t: Tensor) -> Tensor:
    """The storage holds -t, and torch's negative bit says so, as in `x.conj().imag`."""
    if t.dtype not in (torch.float32, torch.float64):
        return _gaps(t)
    return torch.complex(torch.zeros_like(t), -t).conj().imag


# Each returns a tensor of the same shape; all but the last four keep the values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaps": _gaps,
    "rows_far_apart": _rows_far_apart,
    "transposed": _transposed,
    "leading_swapped": _leading_swapped,
    "negated": _negated,
    "expanded": lambda t: t.flatten()[0].expand_as(t),
    "expanded_rows": lambda t: t[:1].expand_as(t),
    "expanded_columns": lambda t: t[..., :1].expand_as(t),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, [1] * t.dim()),
}
