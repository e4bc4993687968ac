"""Other plans than this processor's, so that small cases reach each path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from hypotheses import st

from mlp_ext import _C

FORWARD = ("small", "dots", "narrow", "one_input", "packed", "library")
BACKWARD = ("small", "narrow", "tall", "one_input", "one_output", "few_rows", "packed", "library")
MODES = ("fma", "converted", "bf16_dot", "amx")
PAIRS = _C.dot_mode("bfloat16")  # how this processor multiplies bfloat16


class Plan(NamedTuple):
    """None: this processor's."""

    machine: str | None = None  # whose limits
    forward: str | None = None  # path where it is supported
    backward: str | None = None
    dot_mode: str | None = None  # of bfloat16


@contextmanager
def planned(plan: Plan) -> Iterator[None]:
    """Plans like that; NaN in fresh memory."""
    if plan.machine:
        limits = _C.machine(plan.machine)
        _C.use_machine({mode: limits[mode] for mode in MODES})
    _C.force_paths(plan.forward, plan.backward)
    if PAIRS != "fma":  # else it has fma alone
        _C.force_dot_mode(plan.dot_mode)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        _C.force_dot_mode(None)
        _C.force_paths(None, None)
        if plan.machine:
            _C.use_machine(None)


plans = st.builds(
    Plan,
    st.sampled_from((None, None, *_C.machines())),
    st.sampled_from((*3 * (None,), *FORWARD)),
    st.sampled_from((*3 * (None,), *BACKWARD)),
    st.sampled_from((None, None, "fma", *(("bf16_dot",) if PAIRS == "amx" else ()))),
)
