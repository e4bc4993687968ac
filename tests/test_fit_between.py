"""fit with a scheduler and a callback; errors, Ctrl-C and groups between epochs."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from overfitting import Problem, mean_error
from terminals import on_terminal
from test_fit_validation import modes
from torch.optim import lr_scheduler

from mlp_ext import TrainStep
from mlp_ext.bench.training import sgd_step

pytestmark = pytest.mark.usefixtures("one_thread")


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "plateau-max": lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", patience=1, factor=0.5),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "validates"),
    [(kind, validates) for kind in SCHEDULERS for validates in (True, False)][:-1],
)
def test_rates_are_the_eager_loops(kind: str, validates: bool) -> None:
    eager, ours = Problem(lr=0.3), Problem(lr=0.3)
    step = sgd_step(eager.model, eager.criterion, eager.optimizer)
    scheduler, expected = SCHEDULERS[kind](eager.optimizer), []
    for _ in range(20):
        batches = [*zip(*(t.split(8) for t in eager.rows), strict=True)]
        losses = [step(x, y).item() * len(x) for x, y in batches]
        with torch.no_grad():
            y = eager.model(eager.held_out[0])
        if kind == "plateau-max":
            scheduler.step(mean_error(y, eager.held_out[1]))
        elif kind == "plateau":
            loss = eager.criterion(y, eager.held_out[1]) if validates else sum(losses) / 30
            scheduler.step(loss)
        else:
            scheduler.step()
        expected.append(eager.rate())

    rates: list[float] = []
    options: dict[str, Any] = {"scheduler": SCHEDULERS[kind](ours.optimizer)}
    if validates:
        options |= {"validation": ours.held_out, "metric": mean_error, "restore_best": False}
    ours.fit(20, **options, on_epoch=lambda *_: rates.append(ours.rate()))
    assert rates == expected
    assert len({*rates}) > 1
    torch.testing.assert_close(ours.state(), eager.state())


def test_callback_gets_what_there_is() -> None:
    problem, calls = Problem(), []
    losses = problem.fit(2, on_epoch=lambda *of_epoch: calls.append(of_epoch))
    assert calls == [*enumerate(losses.tolist())]
    calls.clear()
    found = problem.fit(
        2, validation=problem.held_out, metric=mean_error, on_epoch=lambda *a: calls.append(a)
    )
    lists = (t.tolist() for t in found[:3])
    assert calls == [*zip(range(2), *lists, strict=True)]


def test_callback_stops() -> None:
    problem, plain = Problem(), Problem()
    expected = plain.fit(4)
    losses = problem.fit(on_epoch=lambda epoch, loss: epoch == 3)
    assert torch.equal(losses, expected)
    torch.testing.assert_close(problem.state(), plain.state(), rtol=0, atol=0)
    problem = Problem()
    found = problem.fit(validation=problem.held_out, on_epoch=lambda epoch, *_: epoch == 3)
    assert (len(found.losses), len(found.validation_losses), found.reason) == (4, 4, "on_epoch")
    assert torch.equal(found.losses, expected)


def test_callback_may_change_the_model_and_the_optimizer() -> None:
    plain, ours = Problem(), Problem()

    def change(problem: Problem) -> None:
        problem.model[0].weight.requires_grad_(False)
        problem.optimizer.param_groups[0]["lr"] = 0.01

    expected = [*plain.fit(2), change(plain), *plain.fit(2)]
    losses = ours.fit(4, on_epoch=lambda epoch, loss: change(ours) if epoch == 1 else None)
    assert losses.tolist() == [loss for loss in expected if loss is not None]
    torch.testing.assert_close(ours.state(), plain.state(), rtol=0, atol=0)


@pytest.mark.parametrize("shuffle", [False, True])
def test_groups_go_on_over_epochs(shuffle: bool) -> None:
    """Four batches per epoch in groups of three, of which the last is incomplete."""
    found = []
    for options in ({}, {"on_epoch": lambda *_: None}):
        problem = Problem(dropout=0.5)
        parts = (problem.model, problem.criterion, problem.optimizer)
        problem.step = TrainStep(*parts, accumulate=3, max_norm=0.1)
        torch.manual_seed(3)
        losses = problem.fit(5, shuffle=shuffle, **options)
        steps = {int(state["step"]) for state in problem.optimizer.state.values()}
        assert steps == {7}
        found.append({"losses": losses, **problem.state()})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_progress_shows_the_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, problem = on_terminal(monkeypatch), Problem()
    monkeypatch.setattr("mlp_ext.progress.find_spec", lambda name: None)
    problem.fit(2, validation=problem.held_out, metric=mean_error, progress=True)
    line = r"\repoch: 0 loss: [\d.]+ validation loss: [\d.]+ metric: -[\d.]+\r"
    assert re.match(line, terminal.getvalue())


# --- Errors and Ctrl-C ---


@pytest.mark.parametrize("where", ["metric", "on_epoch", "scheduler"])
def test_error_between_epochs_leaves_the_finished_steps(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, plain = Problem(dropout=0.5), Problem(dropout=0.5)
    before, values = modes(problem.model), iter([5, 4, 3])
    torch.manual_seed(3)
    plain.fit(3)

    def failing(*of_epoch: object) -> float | None:
        value = next(values)
        if value == 3:
            raise ArithmeticError("of a user")
        return value if where == "metric" else None

    scheduler = lr_scheduler.LambdaLR(problem.optimizer, lambda epoch: 1.0)
    monkeypatch.setattr(scheduler, "step", failing)
    options = {"scheduler": scheduler} if where == "scheduler" else {where: failing}
    torch.manual_seed(3)
    with pytest.raises(ArithmeticError, match=r"^of a user$"):
        problem.fit(validation=problem.held_out, **options)
    torch.testing.assert_close(problem.state(), plain.state(), rtol=0, atol=0)
    assert modes(problem.model) == before
    assert torch.is_grad_enabled()


CTRL_C = """
import os, signal, threading, time
import torch
from torch import nn
import mlp_ext

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
optimizer = torch.optim.Adam(model.parameters())
step = mlp_ext.TrainStep(model, nn.MSELoss(), optimizer)
x, y = torch.randn(20, 10), torch.rand(20, 1)
found = []

class Held_out:
    def __iter__(self):
        if len(found) == 3:  # in the validation of the fourth epoch, which has no end
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        while len(found) == 3:
            yield x, y
        yield x, y

def on_epoch(epoch, loss, validation_loss):
    found.append([p.detach().clone() for p in model.parameters()])

try:
    step.fit(x, y, epochs=10, batch_size=5, validation=Held_out(), on_epoch=on_epoch)
except KeyboardInterrupt:
    steps = {int(state["step"]) for state in optimizer.state.values()}
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), found[-1])]
    print(steps, all(changed), all(m.training for m in model.modules()), torch.is_grad_enabled())
"""


@pytest.mark.slow
def test_ctrl_c_in_a_validation() -> None:
    command = [sys.executable, "-c", CTRL_C]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "{16} True True True\n", done.stderr
