"""Drawn cases equal native torch, and so do those that once did not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import in_forks
from levels import LEVELS, available

pytest.importorskip("hypothesis")

from fuzz.layers import Layer
from fuzz.networks import Dense
from fuzz.plans import Plan
from fuzz.rule import check
from fuzz.runs import KINDS, QUICK, run
from fuzz.training import Fit, Loss, Optimizer, Training

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = ("contiguous", "contiguous")
LAYER = Layer(
    leading=(129,),
    K=1,
    N=3,
    dtype="float32",
    activation=("SELU", {}),
    bias=True,
    learns=(False, False, True),
    values=("grid", "grid", "grid", "grid"),
    layouts=(*PLAIN, *PLAIN),
    is_module=True,
    plan=Plan(),
    seed=0,
)
DENSE = Dense(4, ("Identity", {}), True, (True, True), "normal", "contiguous")
TRAINING = Training(
    leading=(9,),
    K=5,
    layers=(DENSE,),
    dtype="float32",
    loss=Loss("MSELoss", {}),
    optimizer=Optimizer("SGD", {"lr": 0.1}, None, 0),
    max_norm=None,
    accumulate=1,
    fit=None,
    values=("normal", "normal"),
    layouts=PLAIN,
    plan=Plan(),
    seed=0,
)
WITH_NAN = (DENSE._replace(values="nan"),)
FOUND = {
    "no outputs, path for one input": replace(LAYER, N=0, plan=Plan(backward="one_input")),
    "ignore_index beside probabilities": replace(
        TRAINING, loss=Loss("CrossEntropyLoss", {"ignore_index": 1}, probabilities=True)
    ),
    "probabilities of no classes": replace(
        TRAINING,
        layers=(DENSE._replace(N=0),),
        loss=Loss("CrossEntropyLoss", {}, probabilities=True),
    ),
    "classes shuffled in filled memory": replace(
        TRAINING, loss=Loss("CrossEntropyLoss", {}), fit=Fit(2, 4, shuffle=True)
    ),
    "huber of NaN": replace(TRAINING, loss=Loss("HuberLoss", {}), layers=WITH_NAN),
    "smooth l1 of NaN": replace(TRAINING, loss=Loss("SmoothL1Loss", {}), layers=WITH_NAN),
}


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_found_cases(case: Any) -> None:
    check(case)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_cases(kind: str) -> None:
    _, failure = run(kind, seed=0, cases=QUICK[kind])
    assert not failure, failure


@pytest.mark.slow
def test_drawn_cases_on_each_instruction_set_with_several_threads() -> None:
    code = """
import torch
from fuzz.runs import QUICK, run
torch.set_num_threads(int(os.environ["THREADS"]))
for kind, cases in QUICK.items():
    print(run(kind, seed=1, cases=cases // 8)[1], end="")
"""
    levels = [LEVELS[level][0] for level in available()]
    cases = [
        {"ATEN_CPU_CAPABILITY": level, "THREADS": str(4 - i)} for i, level in enumerate(levels)
    ]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    for told in in_forks(code, cases, env=os.environ | {"PYTHONPATH": path}):
        assert not told, told
