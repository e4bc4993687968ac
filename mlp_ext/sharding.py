"""DTensor: how the operators run on sharded tensors, for each dimension of the mesh.

Batch: x is sharded along its rows, and dW and db are partial sums.
Columns of the output, as in ColwiseParallel: W and b are sharded along N, and dx is a partial sum.
Rows of W^T, as in RowwiseParallel: x and W are sharded along K. Then z is a partial sum, and the
activation needs all of it, so that forward runs PyTorch's operators; backward is one operator.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from mlp_ext.interop import BACKWARD, FORWARD

Placements = list[Any]
Strategies = list[tuple[Placements, Placements]]  # placements of the outputs and of the inputs


def _present(tensors: list[Any], placements: Placements) -> Placements:
    return [None if t is None else p for t, p in zip(tensors, placements, strict=True)]


def _forward(input: Any, weight: Any, bias: Any = None, *options: Any, outputs: int) -> Strategies:
    columns = len(input.shape) - 1
    batch = [([Shard(d)], [Shard(d), Replicate(), Replicate()]) for d in range(columns)]
    rules: Strategies = [
        ([Replicate()], [Replicate(), Replicate(), Replicate()]),
        *batch,
        ([Shard(columns)], [Replicate(), Shard(0), Shard(0)]),
    ]
    return [(y * outputs, _present([input, weight, bias], given)) for y, given in rules]


def _backward(
    grad_output: Any,
    saved: Any,
    input: Any,
    weight: Any,
    activation: Any,
    parameters: Any,
    output_mask: Any,
) -> Strategies:
    columns = len(grad_output.shape) - 1
    whole, total, last = Replicate(), Partial(), Shard(columns)
    rules: Strategies = [  # dx, dW, db from dy, saved, x, W
        ([whole, whole, whole], [whole, whole, whole, whole]),
        ([total, Shard(0), Shard(0)], [last, last, whole, Shard(0)]),  # columns
        ([last, Shard(1), whole], [whole, whole, last, Shard(1)]),  # rows of W^T
    ]
    for d in range(columns):
        rows = Shard(d)
        rules.append(([rows, total, total], [rows, rows, rows, whole]))
    needed = [needs or None for needs in output_mask]
    given = [grad_output, saved, input, weight]
    return [(_present(needed, out), _present(given, into)) for out, into in rules]


@cache
def register() -> None:
    """Registers the strategies, at the first layer whose weight is a DTensor."""
    for outputs, operator in enumerate(FORWARD, 1):
        register_sharding(operator)(partial(_forward, outputs=outputs))
    register_sharding(BACKWARD)(_backward)


def needs_native(weight: Any) -> bool:
    """Whether z is a partial sum, which the activation needs whole."""
    register()
    return any(placement.is_shard(1) for placement in weight.placements)


def summed(z: Any) -> Any:
    """z without partial sums, so that backward does not sum the z that it has saved again."""
    whole = [Replicate() if placement.is_partial() else placement for placement in z.placements]
    return z.redistribute(placements=whole)
