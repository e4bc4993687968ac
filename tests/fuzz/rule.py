"""The rule of references.py for whole cases, also where rounding decides between far results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from references import Results, alone, assert_as_accurate_as_native
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

Tensors = dict[str, Tensor]
NUDGES = 12
REFUSALS = (IndexError, RuntimeError, TypeError, ValueError)


class Case(Protocol):
    """What is computed from which tensors, in two ways."""

    luck: ClassVar[int]  # times native's own error that is allowed besides, where steps amplify it

    @property
    def dtype(self) -> str: ...

    def is_exact(self) -> bool:
        """Whether all sums before an activation are exact, so that rounding decides nothing."""
        ...

    def tensors(self) -> Tensors:
        """The operands, with the same values at each call. Both ways may change them."""
        ...

    def ours(self, tensors: Tensors) -> Results: ...

    def native(self, tensors: Tensors) -> Results:
        """The same by torch, in the dtype of the tensors."""
        ...


def check(case: Case) -> None:
    """Asserts that mlp_ext is as accurate as native torch, and raises where it raises."""
    tensors = case.tensors()
    expected = _refused(case.native, _copies(tensors))
    reference = _refused(case.native, _copies(tensors, torch.float64))
    found = _refused(case.ours, tensors)
    if isinstance(expected, Exception) and not isinstance(reference, Exception):
        return  # native's values overflow, and it refuses them
    if isinstance(expected, Exception) or isinstance(found, Exception):
        both = isinstance(expected, Exception) and isinstance(found, Exception)
        assert both, f"native torch: {expected!r}, mlp_ext: {found!r}"
        return
    assert not isinstance(reference, Exception), f"in float64 native torch: {reference!r}"
    assert found.keys() == expected.keys()
    nudged: list[Results] = []
    of_sizes: Results = {}
    for name, actual in found.items():
        like = expected[name]
        assert (actual.dtype, actual.shape) == (like.dtype, like.shape), name
        roundings = _roundings(case.dtype)
        exact, terms = reference[name].double(), roundings * _terms(reference, name)
        native = _without_overflow(actual, like, exact)
        try:
            assert_as_accurate_as_native(actual, native, exact, terms, name)
        except AssertionError:
            if not (nudged or case.is_exact()):
                nudged = [_nudged(case, i) for i in range(NUDGES)]
            others = torch.stack([exact, *(other[name].double() for other in nudged)])
            # Infinite sums are inf or NaN, as they are ordered.
            overflows = ~native.isfinite() & ~actual.isfinite()
            of_sizes = of_sizes or _of_sizes(case)
            summed = of_sizes[name].double().abs()
            sizes, terms = torch.stack([*others, summed]), terms.maximum(roundings * summed)
            native = native.where(_is_sure(sizes, actual.dtype) & ~overflows, actual)
            slack = 8 * (others - exact).abs().nan_to_num(0, 0).amax(0)
            slack += case.luck * (native.double() - exact).abs().nan_to_num(0, 0, 0).max()
            assert_as_accurate_as_native(actual, native, exact, terms, name, slack)


def _refused(way: Callable[[Tensors], Results], tensors: Tensors) -> Results | Exception:
    """The results, or the exception."""
    try:
        return way(tensors)
    except REFUSALS as refused:
        return refused


def _copies(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """For native: nothing lies beside the rows."""
    return {
        name: alone(t).to(dtype) if dtype and t.is_floating_point() else alone(t)
        for name, t in tensors.items()
    }


def _nudged(case: Case, i: int) -> Results:
    """Native's in float64, as if all but sums had been rounded a little differently."""
    limits = torch.finfo(getattr(torch, case.dtype))
    unit = 4 * limits.eps / 2 ** (i % 4)  # large ones jump over the few values between two kinks
    generator = torch.Generator().manual_seed(i)

    def noise(t: Tensor) -> Tensor:
        drawn = torch.rand(t.shape, generator=generator, dtype=torch.float64)
        return unit * (drawn * 2 - 1)

    def nudged(t: Tensor) -> Tensor:
        """Subnormals by absolute steps. What is from 0 to 1 stays so, as BCELoss wants it."""
        share = noise(t)
        is_subnormal = t.abs() < limits.smallest_normal
        moved = torch.where(is_subnormal, t + limits.smallest_normal * share, t * (1 + share))
        return moved.clamp(0, 1).where((t >= 0) & (t <= 1), moved)

    def nudge_output(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return nudged(output)

    def nudge_gradients(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.numel():
                    size = p.grad.abs().nan_to_num(0, 0, 0).max()  # of the terms of each
                    p.grad += noise(p.grad) * size

    tensors = _copies(case.tensors(), torch.float64)
    hooks = [
        register_module_forward_hook(nudge_output),
        register_optimizer_step_pre_hook(nudge_gradients),
    ]
    try:
        return case.native(
            {k: nudged(t) if t.is_floating_point() else t for k, t in tensors.items()}
        )
    finally:
        for hook in hooks:
            hook.remove()


def _of_sizes(case: Case) -> Results:
    """Native's of the operands' absolute values: how large partial sums may be."""
    tensors = _copies(case.tensors(), torch.float64)
    return case.native({k: t.abs() if t.is_floating_point() else t for k, t in tensors.items()})


def _terms(reference: Results, name: str) -> Tensor:
    """At least the result and, of steps, a loss of 1."""
    losses = reference.get("losses", torch.ones(1)).nan_to_num(1, 1, 1)
    size = losses.abs().max().clamp(max=1) if losses.numel() else 1
    return reference[name].double().abs() + size


def _roundings(dtype: str) -> float:
    """How often each term is rounded, in the dtype of accumulation.

    In 16 bits intermediates are rounded, too; in float64 the reference is no more exact.
    """
    if dtype == "float64":
        return 16
    return max(1, torch.finfo(getattr(torch, dtype)).eps / torch.finfo(torch.float32).eps / 4)


def _without_overflow(actual: Tensor, native: Tensor, exact: Tensor) -> Tensor:
    """Native's result, or ours where native's is not finite and the exact one is like ours.

    Native rounds intermediates to its dtype, and they overflow; its gelu of inf is NaN.
    """
    is_like_exact = (actual.isfinite() & exact.isfinite()) | (actual == exact)
    return actual.where(~native.isfinite() & is_like_exact, native)


def _is_sure(others: Tensor, dtype: torch.dtype) -> Tensor:
    """Where all results are within the range of the dtype, or none is finite."""
    is_within = others.abs() < torch.finfo(dtype).max / 4
    return is_within.all(0) | ~others.isfinite().any(0)
