"""Where memory runs out, Ctrl-C comes or Python raises, what remains is a whole number of steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from once import Once
from steps import Training, training
from torch.utils._python_dispatch import TorchDispatchMode
from whole_steps import CASES

from mlp_ext import TrainStep, TrainSteps

TESTS = Path(__file__).parent
INTERRUPTED = ["lanes", "layers", "fit", "dropout", "composite", "accumulate", "many in lanes"]

pytestmark = pytest.mark.usefixtures("one_thread")


def ended(once: Once, interrupt: bool) -> dict[str, Any]:
    """How the cases of whole_steps.py ended."""

    def run(folder: Path) -> None:
        library = folder / "at_allocation.so"
        compile = ["g++", "-O1", "-shared", "-fPIC", TESTS / "at_allocation.cpp", "-o", library]
        subprocess.run(compile, check=True)
        names = INTERRUPTED if interrupt else CASES
        done = subprocess.run(
            [sys.executable, TESTS / "whole_steps.py", str(int(interrupt)), *names],
            env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        (folder / "ended.json").write_text(done.stdout)

    folder = once(f"whole-steps-{interrupt}", run)
    found: dict[str, Any] = json.loads((folder / "ended.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
@pytest.mark.parametrize("case", CASES)
def test_no_allocation_that_fails_leaves_half_a_step(once: Once, case: str) -> None:
    found = ended(once, interrupt=False)[case]
    assert found["halfway"] == []
    assert found["raised"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
@pytest.mark.parametrize("case", INTERRUPTED)
def test_no_interrupt_leaves_half_a_step(once: Once, case: str) -> None:
    """The first step creates states, which are stored by Python."""
    found = ended(once, interrupt=True)[case]
    assert found["halfway"] == []
    assert found["raised"] == found["runs"] > 0


class RaisesAfter(TorchDispatchMode):
    """Raises once an operator of ours has run."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        if "mlp_ext" in str(function):
            raise ZeroDivisionError
        return result


@pytest.mark.parametrize("options", ["momentum", "dampening", "adam"])
def test_a_step_done_before_an_error_has_its_states(options: str) -> None:
    part = training("10-5-1@10", "mse", options, torch.float64)
    plain = part.to(torch.float64)
    TrainStep(*plain[:3])(*plain[3:])
    with pytest.raises(ZeroDivisionError), RaisesAfter():
        TrainStep(*part[:3])(*part[3:])
    torch.testing.assert_close(part.state(), plain.state(), rtol=0, atol=0)


def no_probabilities(part: Training) -> torch.Tensor:
    return torch.full_like(part.target, 2)


@pytest.mark.parametrize("options", ["momentum", "dampening", "adam"])
@pytest.mark.parametrize("before", [None, {}, {"own": 1}, {"momentum_buffer": None}], ids=str)
def test_a_first_step_that_fails_leaves_the_optimizer_as_it_was(
    before: dict[str, Any] | None, options: str
) -> None:
    part = training("10-5-1@10", "bce", options, torch.float32)
    weight = part.model[0].weight
    if before is not None:
        part.optimizer.state[weight] = dict(before)
    if before and options == "adam":
        pytest.skip("states without others are refused")
    saved = deepcopy(part.optimizer.state_dict())
    for step in (TrainStep(*part[:3]), TrainSteps([part.model], part.criterion, [part.optimizer])):
        for call in (step, lambda x, y, step=step: step.fit(x, y, epochs=2, batch_size=3)):
            with pytest.raises(RuntimeError, match="between 0 and 1"):
                call(part.input, no_probabilities(part))
            assert part.optimizer.state_dict() == saved
    step(part.input, part.target)
    assert len(part.optimizer.state) == 4


@pytest.mark.parametrize("entry", [None, [], 5, MappingProxyType({})], ids=str)
@pytest.mark.parametrize("options", ["momentum", "adam"])
def test_an_entry_that_is_no_dict_changes_nothing(entry: Any, options: str) -> None:
    part = training("10-5-1@10", "mse", options, torch.float32)
    part.optimizer.state[part.model[2].bias] = entry
    before = deepcopy([*part.model.parameters()])
    for step in (TrainStep(*part[:3]), TrainSteps([part.model], part.criterion, [part.optimizer])):
        with pytest.raises(TypeError, match=r"entry in optimizer\.state must be a dict, got"):
            step(part.input, part.target)
    assert all(map(torch.equal, part.model.parameters(), before))
    assert len(part.optimizer.state) == 1
