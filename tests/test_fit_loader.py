"""fit from loaders: the batches, draws and losses of the eager loop over one."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from overfitting import Problem
from references import Results
from steps import training
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from mlp_ext import TrainStep
from mlp_ext.bench.training import sgd_step

pytestmark = pytest.mark.usefixtures("one_thread")

Pair = tuple[Tensor, Tensor]
Make = Callable[[Pair], Any]


class Stream(IterableDataset):
    """Batches that draw from torch's generator as they are made."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.rows = x, y

    def __iter__(self) -> Iterator[Pair]:
        for x, y in zip(*(t.split(8) for t in self.rows), strict=True):
            yield x + torch.randn_like(x) / 10, y


def loader(rows: Pair, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*rows), batch_size=8, **options)


def with_generator(rows: Pair) -> DataLoader:
    return loader(rows, shuffle=True, generator=torch.Generator().manual_seed(5))


LOADERS: dict[str, Make] = {
    "in order": loader,
    "shuffled": partial(loader, shuffle=True),
    "generator": with_generator,
    "workers": partial(loader, shuffle=True, num_workers=2),
    "last batch dropped": partial(loader, drop_last=True),
    "stream": lambda rows: DataLoader(Stream(*rows), batch_size=None),
    "list": lambda rows: [*zip(*(t.split(8) for t in rows), strict=True)],
    "lists": lambda rows: [[*map(torch.clone, batch)] for batch in loader(rows)],
}


def of_eager(problem: Problem, batches: Any, epochs: int) -> Results:
    step = sgd_step(problem.model, problem.criterion, problem.optimizer)
    losses = []
    for _ in range(epochs):
        of_epoch = [(step(x, y).item(), len(x)) for x, y in batches]
        losses.append(sum(a * b for a, b in of_epoch) / sum(rows for _, rows in of_epoch))
    return results(problem, torch.tensor(losses, dtype=torch.float64), batches)


def results(problem: Problem, losses: Tensor, batches: Any) -> Results:
    found = {"losses": losses, "random": torch.get_rng_state(), **problem.state()}
    if generator := getattr(batches, "generator", None):
        found["generator"] = generator.get_state()
    return found


@pytest.mark.parametrize("kind", LOADERS)
def test_batches_and_draws_are_the_eager_loops(kind: str) -> None:
    """Dropout and the loader draw from the same generator, in turn."""
    epochs = 2 if kind == "workers" else 4
    eager, ours = Problem(dropout=0.3), Problem(dropout=0.3)
    batches = LOADERS[kind](eager.rows)
    torch.manual_seed(3)
    expected = of_eager(eager, batches, epochs)
    batches = LOADERS[kind](ours.rows)
    torch.manual_seed(3)
    losses = ours.step.fit(batches, epochs=epochs)
    torch.testing.assert_close(results(ours, losses, batches), expected)


def test_batches_of_a_loader_are_those_of_tensors() -> None:
    tensors, ours = Problem(), Problem()
    expected = tensors.fit(5)
    losses = ours.step.fit(loader(ours.rows), epochs=5)
    assert torch.equal(losses, expected)
    torch.testing.assert_close(ours.state(), tensors.state(), rtol=0, atol=0)


def test_early_stopping_from_loaders() -> None:
    tensors, ours = Problem(), Problem()
    expected = tensors.fit(validation=tensors.held_out, patience=2)
    held_out = loader(ours.held_out)
    found = ours.step.fit(loader(ours.rows), epochs=40, validation=held_out, patience=2)
    assert found[3:] == expected[3:]
    assert torch.equal(found.losses, expected.losses)
    torch.testing.assert_close(found.validation_losses, expected.validation_losses)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_are_those_of_tensors(dtype: torch.dtype, reduction: str) -> None:
    part = training("3-17-5@100", "classes", "momentum", dtype, reduction)
    copy = part.to(dtype)
    expected = TrainStep(*copy[:3]).fit(*copy[3:], epochs=3, batch_size=30)
    batches = [*zip(*(t.split(30) for t in part[3:]), strict=True)]
    losses = TrainStep(*part[:3]).fit(batches, epochs=3)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)


def test_many_batches() -> None:
    problem, plain = Problem(), Problem()
    batches = [(torch.randn(1, 10).double(), torch.randn(1, 1).double()) for _ in range(700)]
    expected = sum(plain.step(x, y).item() for x, y in batches) / 700
    assert problem.step.fit(batches, epochs=1).item() == pytest.approx(expected, rel=1e-12)


def test_groups_go_on_over_epochs() -> None:
    tensors, ours = Problem(), Problem()
    found = []
    for problem in (tensors, ours):
        parts = (problem.model, problem.criterion, problem.optimizer)
        problem.step = TrainStep(*parts, accumulate=3)
        if problem is ours:
            losses = problem.step.fit(loader(problem.rows), epochs=5)
        else:
            losses = problem.fit(5)
        found.append({"losses": losses, **problem.state()})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_one_epoch_of_an_iterator() -> None:
    problem, plain = Problem(), Problem()
    losses = problem.step.fit(iter(loader(problem.rows)), epochs=1)
    assert torch.equal(losses, plain.fit(1))


def test_no_batches_are_an_error() -> None:
    """Also where a loader ends after its first epoch, with the steps of that one done."""
    problem, plain = Problem(), Problem()
    with pytest.raises(ValueError, match=r"^TrainStep.fit: input has no batches; "):
        problem.step.fit(loader((problem.rows[0][:0], problem.rows[1][:0])), epochs=2)
    torch.testing.assert_close(problem.state(), plain.state(), rtol=0, atol=0)

    class Once:
        batches = iter([problem.rows])

        def __iter__(self) -> Iterator[Any]:
            return self.batches

    with pytest.raises(ValueError, match=r"has no batches; each epoch iterates over it anew$"):
        problem.step.fit(Once(), epochs=2)
    plain.step.fit([plain.rows], epochs=1)
    torch.testing.assert_close(problem.state(), plain.state(), rtol=0, atol=0)


def test_loss_of_a_batch_without_rows_is_the_eager_loops() -> None:
    eager, ours = Problem(), Problem()
    batch = tuple(t[:0] for t in eager.rows)
    loss = sgd_step(eager.model, eager.criterion, eager.optimizer)(*batch)
    losses = ours.step.fit([batch], epochs=1)
    torch.testing.assert_close(losses[0], loss, equal_nan=True)
    torch.testing.assert_close(ours.state(), eager.state())


def test_error_in_the_loader_leaves_the_finished_steps() -> None:
    problem, plain = Problem(), Problem()
    batches = LOADERS["list"](problem.rows)
    expected = [plain.step(*batch) for batch in batches[:2]]
    batches[2] = (*batches[2], 3)
    message = r"^TrainStep.fit: each batch must be \(input, target\), got 3 values$"
    with pytest.raises(TypeError, match=message):
        problem.step.fit(batches)
    assert len(expected) == 2
    torch.testing.assert_close(problem.state(), plain.state(), rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pinned", [False, True])
def test_batches_are_copied_to_the_gpu(pinned: bool) -> None:
    problem, plain = Problem(), Problem()
    problem.model.cuda()
    held_out = loader(problem.held_out, pin_memory=pinned)
    batches = loader(problem.rows, pin_memory=pinned)
    found = problem.step.fit(batches, epochs=20, validation=held_out)
    expected = plain.fit(20, validation=plain.held_out)
    torch.testing.assert_close(found.losses, expected.losses)
    torch.testing.assert_close(found.validation_losses, expected.validation_losses)
