"""StepGraph with a graph that only counts: when it runs the step, captures and replays it."""

from collections.abc import Iterator
from itertools import count

import pytest
import torch
from torch import Tensor, nn

import mlp_ext
from mlp_ext.step_graph import KEPT, WARM_UPS, Step, StepGraph


class Recorder:
    """What was done, in order, and a StepGraph that does it."""

    def __init__(self, keys: Iterator[object] | None = None) -> None:
        self.done: list[str] = []
        self.key: object = 0
        self.step = StepGraph(
            self.eager, lambda: next(keys) if keys else self.key, self.capture, self.warm_up
        )

    def eager(self, input: Tensor, target: Tensor) -> Tensor:
        self.done.append("eager")
        return input.sum() + target.sum()

    def warm_up(self, step: Step, input: Tensor, target: Tensor) -> Tensor:
        self.done.append("warm up")
        return input.sum() + target.sum()

    def capture(self, step: Step, input: Tensor, target: Tensor) -> Step:
        self.done.append("capture")

        def replay(input: Tensor, target: Tensor) -> Tensor:
            self.done.append("replay")
            return input.sum() + target.sum()

        return replay

    def __call__(self, times: int = 1, rows: int = 4, dtype: torch.dtype = torch.float32) -> str:
        self.done = []
        for _ in range(times):
            input, target = torch.rand(rows, 3).to(dtype), torch.rand(rows, 2).to(dtype)
            assert torch.equal(self.step(input, target), input.sum() + target.sum())
        return " ".join(self.done)


FIRST = " ".join(["eager", *["warm up"] * WARM_UPS, "capture", "replay"])
UNTIL_CAPTURED = 2 + WARM_UPS


@pytest.fixture
def run() -> Recorder:
    return Recorder()


def test_a_step_that_comes_again_is_captured_once(run: Recorder) -> None:
    assert run(UNTIL_CAPTURED) == FIRST
    assert run(3) == "replay replay replay"


def test_new_hyperparameters_are_captured_anew(run: Recorder) -> None:
    run(UNTIL_CAPTURED)
    run.key = 1
    assert run(UNTIL_CAPTURED) == FIRST
    run.key = 0
    assert run() == "replay"


@pytest.mark.parametrize("change", [{"rows": 3}, {"dtype": torch.float64}], ids=str)
def test_other_arguments_have_a_graph_of_their_own(run: Recorder, change: dict[str, int]) -> None:
    """As the last, short batch of each epoch."""
    run(UNTIL_CAPTURED)
    for _ in range(UNTIL_CAPTURED - 1):
        assert run(**change) in ("eager", "warm up")
        assert run() == "replay"
    assert run(**change) == "capture replay"


def test_what_changes_at_every_call_stays_eager() -> None:
    run = Recorder(keys=count())
    assert set(run(20).split()) == {"eager"}
    assert len(run.step._calls) == KEPT


def test_few_graphs_are_kept(run: Recorder) -> None:
    for run.key in range(KEPT + 2):
        assert run(UNTIL_CAPTURED) == FIRST
    assert len(run.step._graphs) == KEPT
    run.key = 0
    assert run() == "eager"


def with_momentum() -> tuple[nn.Sequential, torch.optim.SGD, mlp_ext.TrainStep]:
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, mlp_ext.TrainStep(model, nn.MSELoss(), optimizer)


def test_key_follows_the_optimizer() -> None:
    model, optimizer, step = with_momentum()
    step(torch.randn(4, 3), torch.randn(4, 2))  # makes the momentum buffers
    key = step._stepper.key
    first = key()
    assert key() == first
    optimizer.param_groups[0]["lr"] = 0.2
    assert key() != first
    optimizer.param_groups[0]["lr"] = 0.1
    assert key() == first
    model[0].bias.requires_grad_(False)
    assert key() != first


def test_a_call_without_a_key_does_the_step(run: Recorder) -> None:
    run(UNTIL_CAPTURED)
    run.key = None
    assert run(2) == "eager eager"
    run.key = 0
    assert run() == "replay"


def test_there_is_no_key_before_momentum() -> None:
    *_, step = with_momentum()
    assert step._stepper.key() is None
    step(torch.randn(4, 3), torch.randn(4, 2))
    assert step._stepper.key() is not None
