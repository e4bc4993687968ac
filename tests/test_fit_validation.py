"""fit with validation: early stopping against the plain loop, epoch by epoch; chunks; modes."""

import math
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from overfitting import Problem, mean_error
from references import Results
from steps import training
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mlp_ext import FitResult, TrainStep, fuse
from mlp_ext import predict as predict_function

pytestmark = pytest.mark.usefixtures("one_thread")

predict = sys.modules[predict_function.__module__]


def plain_loop(
    problem: Problem,
    epochs: int,
    patience: int | None = None,
    metric: Callable[[Tensor, Tensor], Tensor] | None = None,
    shuffle: bool = False,
) -> tuple[FitResult, Results]:
    """Every line as one would write it; and the parameters of the best epoch."""
    model, (x, y), (x_val, y_val) = problem.model, problem.rows, problem.held_out
    fused = fuse(deepcopy(model), level="stack").eval()
    losses, of_validation, metrics = [], [], []
    best, best_epoch, state, reason = math.inf, -1, {}, "epochs"
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(x)) if shuffle else torch.arange(len(x))
        for rows in order.split(8):
            total += problem.step(x[rows], y[rows]).item() * len(rows)
        losses.append(total / len(x))
        fused.load_state_dict(model.state_dict())
        with torch.no_grad():
            output = fused(x_val)
            of_validation.append(problem.criterion(output, y_val).item())
            if metric:
                metrics.append(metric(output, y_val).item())
        value = -metrics[-1] if metric else of_validation[-1]
        if value < best:
            best, best_epoch, state = value, epoch, problem.state()
        elif patience and epoch - best_epoch >= patience:
            reason = "patience"
            break
    found = [torch.tensor(v, dtype=torch.float64) for v in (losses, of_validation, metrics)]
    return FitResult(*found[:2], found[2] if metric else None, best_epoch, reason), state


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("metric", [None, mean_error])
@pytest.mark.parametrize("patience", [None, 1, 3])
def test_every_epoch_is_the_plain_loops(
    patience: int | None, metric: Callable[..., Any] | None, shuffle: bool
) -> None:
    plain, ours = Problem(), Problem()
    options = {"patience": patience, "metric": metric, "shuffle": shuffle}
    torch.manual_seed(3)
    expected, state = plain_loop(plain, 40, **options)
    torch.manual_seed(3)
    found = ours.fit(validation=ours.held_out, **options)
    assert expected.reason == ("patience" if patience else "epochs")
    assert (found.best_epoch, found.reason) == (expected.best_epoch, expected.reason)
    assert 0 < found.best_epoch < len(found.losses) - 1
    for name in ("losses", "validation_losses", *["metrics"] * (metric is not None)):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=0, atol=0, msg=name
        )
    assert (found.metrics is None) == (metric is None)
    torch.testing.assert_close(ours.state(), state, rtol=0, atol=0)
    moments = [s["exp_avg"] for s in ours.optimizer.state.values()]  # not put back
    expected_moments = [s["exp_avg"] for s in plain.optimizer.state.values()]
    torch.testing.assert_close(moments, expected_moments, rtol=0, atol=0)


def test_validation_losses_are_torchs() -> None:
    problem = Problem()
    expected = []

    def evaluate(*of_epoch: float) -> None:
        with torch.no_grad():
            expected.append(F.mse_loss(problem.model(problem.held_out[0]), problem.held_out[1]))

    found = problem.fit(validation=problem.held_out, on_epoch=evaluate)
    torch.testing.assert_close(found.validation_losses, torch.stack(expected))


@pytest.mark.parametrize("restore", [True, False])
def test_best_parameters_are_put_back(restore: bool) -> None:
    problem, states = Problem(), []
    options = {"validation": problem.held_out, "restore_best": restore}
    found = problem.fit(**options, on_epoch=lambda *of_epoch: states.append(problem.state()))
    assert found.best_epoch == int(found.validation_losses.argmin()) < 39
    expected = states[found.best_epoch if restore else -1]
    torch.testing.assert_close(problem.state(), expected, rtol=0, atol=0)


def test_the_first_of_equal_epochs_is_the_best() -> None:
    problem = Problem()
    values = iter([1, 3, 2, 3, 3, 1])
    found = problem.fit(9, validation=problem.held_out, metric=lambda *_: next(values), patience=4)
    assert (found.best_epoch, found.reason) == (1, "patience")
    assert found.metrics.tolist() == [1, 3, 2, 3, 3, 1]


def test_nan_is_never_the_best() -> None:
    problem = Problem()
    values = iter([torch.nan, 1.0, torch.nan, torch.nan])
    found = problem.fit(9, validation=problem.held_out, metric=lambda *_: next(values), patience=2)
    assert (found.best_epoch, found.reason, len(found.losses)) == (1, "patience", 4)


def test_nothing_is_put_back_if_all_losses_are_nan() -> None:
    problem, states = Problem(), []
    x, y = problem.held_out
    found = problem.fit(
        validation=(x, y * torch.nan),
        patience=3,
        on_epoch=lambda *_: states.append(problem.state()),
    )
    assert (found.best_epoch, found.reason, len(states)) == (None, "patience", 3)
    assert found.validation_losses.isnan().all()
    torch.testing.assert_close(problem.state(), states[-1], rtol=0, atol=0)


CRITERIA = ["mse", "bce-logits-weight", "classes-weight-smoothing", "probabilities", "nll"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", CRITERIA)
def test_loss_is_the_criterions_on_all_rows(
    loss: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of ignored classes and weights make it differ from a mean over chunks."""
    monkeypatch.setattr(predict, "AT_ONCE", 800)  # a few rows
    part = training("3-17-5@100", loss, "plain", torch.float64, reduction)
    x, y = torch.randn(37, 3).double(), part.target[:37]
    found = TrainStep(*part[:3]).fit(*part[3:], epochs=1, validation=(x, y))
    with torch.no_grad():
        expected = part.criterion(part.model(x), y)
    torch.testing.assert_close(found.validation_losses, expected.reshape(1))


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 100])
def test_outputs_in_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images, which the model flattens, several rows of a sequence at a time."""
    chunks = []
    alone = predict._alone
    monkeypatch.setattr(
        predict, "_alone", lambda x, *rest: chunks.append(len(x)) or alone(x, *rest)
    )
    monkeypatch.setattr(predict, "AT_ONCE", 6 * (8 + 4 + 2) * 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    step = TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = torch.randn(rows, 2, 4).double(), torch.randint(2, (rows,))
    found = step.fit(x, y, 1, validation=(x, y))
    assert (sum(chunks), max(chunks) <= 6) == (rows, True)
    with torch.no_grad():
        expected = F.cross_entropy(model(x), y)
    torch.testing.assert_close(found.validation_losses, expected.reshape(1))


def test_rows_with_leading_dimensions() -> None:
    problem = Problem()
    x, y = torch.randn(4, 3, 10).double(), torch.randn(4, 3, 1).double()
    found = problem.step.fit(x, y, 1, validation=(x, y))
    with torch.no_grad():
        expected = F.mse_loss(problem.model(x), y)
    torch.testing.assert_close(found.validation_losses, expected.reshape(1))


@pytest.mark.parametrize(
    ("dtype", "of_losses"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
)
def test_losses_are_float32_at_least(dtype: torch.dtype, of_losses: torch.dtype) -> None:
    part = training("10-5-1@10", "mse", "plain", dtype)
    found = TrainStep(*part[:3]).fit(
        *part[3:], epochs=2, validation=part[3:], metric=lambda *_: 0.1
    )
    dtypes = [t.dtype for t in (found.losses, found.validation_losses, found.metrics)]
    assert dtypes == [of_losses, of_losses, torch.float64]


def test_validation_may_be_a_loader() -> None:
    expected, found = (
        problem.fit(validation=rows, metric=mean_error, patience=2)
        for problem in (Problem(), Problem())
        for rows in [problem.held_out]
    )
    problem = Problem()
    loader = DataLoader(TensorDataset(*problem.held_out), batch_size=7)
    for rows in (loader, [*loader]):
        problem = Problem()
        found = problem.fit(validation=rows, metric=mean_error, patience=2)
        assert found[3:] == expected[3:]
        torch.testing.assert_close(found[:3], expected[:3])


MEMORY = """
import resource
import torch
from torch import nn
import mlp_ext

torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

model = nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Linear(1000, 1))
step = mlp_ext.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
x, y = torch.randn(100_000, 4), torch.rand(100_000, 1)
step.fit(x[:10], y[:10], 1, validation=(x[:10], y[:10]))
before = peak()
step.fit(x[:10], y[:10], 1, validation=(x, y))
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_of_validation_is_bounded() -> None:
    """All outputs of the hidden layer would be 381 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=100, check=True
    )
    assert float(done.stdout) < 150


# --- Modes ---


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("of_model", [True, False])
@pytest.mark.parametrize("of_dropout", [True, False])
def test_modes_are_eval_in_validation_and_restored(of_model: bool, of_dropout: bool) -> None:
    problem, seen = Problem(dropout=0.5), []
    problem.model.training, problem.model[2].training = of_model, of_dropout
    before = modes(problem.model)

    def metric(y: Tensor, target: Tensor) -> float:
        seen.append((any(modes(problem.model)), torch.is_grad_enabled()))
        torch.testing.assert_close(y, problem.model(problem.held_out[0]))
        return -float(F.mse_loss(y, target))

    def on_epoch(*of_epoch: float) -> None:
        assert modes(problem.model) == before
        assert torch.is_grad_enabled()

    found = problem.fit(3, validation=problem.held_out, metric=metric, on_epoch=on_epoch)
    assert seen == [(False, False)] * 3
    assert torch.equal(found.metrics, -found.validation_losses)
    assert modes(problem.model) == before


def test_validation_draws_no_dropout() -> None:
    plain, ours = Problem(dropout=0.5), Problem(dropout=0.5)
    torch.manual_seed(3)
    expected = plain.fit()
    torch.manual_seed(3)
    found = ours.fit(validation=ours.held_out, restore_best=False)
    assert torch.equal(found.losses, expected)
    torch.testing.assert_close(ours.state(), plain.state(), rtol=0, atol=0)
