"""Runs of drawn cases: a number of them from a seed, with the counts of what was tried."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from fuzz.layers import layers
from fuzz.networks import networks
from fuzz.rule import check
from fuzz.training import manys, trainings

KINDS = {"layers": layers, "networks": networks, "TrainStep": trainings, "TrainSteps": manys}
QUICK = {"layers": 500, "networks": 100, "TrainStep": 70, "TrainSteps": 15}  # cases, a few seconds


def run(
    kind: str, seed: int, cases: int, before: Callable[[Any], None] = lambda case: None
) -> tuple[int, str]:
    """Checks this many cases. Returns how many were checked, and the failure, "" if none.

    before: called with each case.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    tried = 0
    failing: list[Any] = []

    @seeded(seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=[*HealthCheck],
    )
    @given(KINDS[kind])
    def each(case: Any) -> None:
        nonlocal tried
        tried += 1
        failing[:] = [case]
        before(case)
        check(case)
        failing.clear()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of empty tensors, and of torch's own operations
            each()
    except Exception as error:
        return tried, f"{failing[0] if failing else ''}\n{type(error).__name__}: {error}"
    return tried, ""
