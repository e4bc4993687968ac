"""The errors of fit's options between epochs, and of its loaders."""

from typing import Any

import pytest
import torch
from overfitting import Problem, mean_error
from steps import Training, training
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from mlp_ext import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")


def held_out(**changed: Any) -> tuple[Any, Any]:
    rows = {"input": torch.zeros(4, 10), "target": torch.zeros(4, 1)}
    return tuple({**rows, **changed}.values())


WITHOUT_LAYERS = {
    "loader": lambda step, x, y: step.fit([(x, y)]),
    "on_epoch": lambda step, x, y: step.fit(x, y, on_epoch=print),
    "validation": lambda step, x, y: step.fit(x, y, validation=(x, y)),
}


@pytest.mark.parametrize("call", WITHOUT_LAYERS.values(), ids=WITHOUT_LAYERS)
def test_a_model_that_lost_its_layers_is_an_error(call: Any, part: Training) -> None:
    step = TrainStep(*part[:3])
    layers = [*part.model]
    del part.model[:]
    with pytest.raises(TypeError, match=r"^TrainStep: model has no Linear"):
        call(step, *part[3:])
    part.model.extend(layers)


PAIR = "must be a pair of tensors or a loader of \\(input, target\\)"
ERRORS = [
    ({"metric": mean_error}, ValueError, r"metric needs validation=\(input, target\)"),
    ({"patience": 3}, ValueError, r"patience needs validation=\(input, target\)"),
    (
        {"validation": held_out(), "metric": 3},
        TypeError,
        "metric must be a function or None, got 3",
    ),
    ({"on_epoch": "print"}, TypeError, "on_epoch must be a function or None, got 'print'"),
    (
        {"validation": held_out(), "patience": 0},
        ValueError,
        "patience must be at least 1, got 0",
    ),
    ({"validation": held_out(), "patience": 1.5}, TypeError, "patience must be an int, got 1.5"),
    ({"validation": held_out(), "patience": True}, TypeError, "patience must be an int, got True"),
    ({"restore_best": 1}, TypeError, "restore_best must be True or False, got 1"),
    (
        {"scheduler": "cosine"},
        TypeError,
        "scheduler must be one of torch.optim.lr_scheduler or None, got 'cosine'",
    ),
    ({"validation": 0.2}, TypeError, f"validation {PAIR}, got 0.2"),
    ({"validation": torch.zeros(4, 10)}, TypeError, f"validation {PAIR}, got torch.Tensor"),
    (
        {"validation": TensorDataset(*held_out())},
        TypeError,
        r"validation is a Dataset; pass DataLoader\(validation, batch_size=...\)",
    ),
    (
        {"validation": iter([held_out()])},
        ValueError,
        "validation is an iterator, which ends after one of 50 epochs; pass a list or a DataLoader",
    ),
    ({"validation": []}, ValueError, "validation has no batches"),
    (
        {"validation": [held_out(), torch.zeros(3)]},
        TypeError,
        r"validation: each batch must be \(input, target\), got torch.Tensor",
    ),
    (
        {"validation": [(*held_out(), 3)]},
        TypeError,
        r"validation: each batch must be \(input, target\), got 3 values",
    ),
    (
        {"validation": held_out(target=3.0)},
        TypeError,
        "validation: target must be a tensor, got 3.0",
    ),
    (
        {"validation": held_out(input=torch.zeros(10))},
        ValueError,
        r"validation: input must be \[n, \*, K\], got \[10\]",
    ),
    (
        {"validation": held_out(input=torch.zeros(3, 10))},
        ValueError,
        "validation: input has 3 rows, target 4",
    ),
    (
        {"validation": held_out(input=torch.zeros(0, 10), target=torch.zeros(0, 1))},
        ValueError,
        "validation has no rows",
    ),
    (
        {"validation": held_out(input=torch.zeros(4, 9))},
        RuntimeError,
        r"validation: input must be \[\*, K=10\], got \[4, 9\]",
    ),
    (
        {"validation": held_out(input=torch.zeros(4, 10).double())},
        RuntimeError,
        r"validation: input is float64, the model float32; pass input.float\(\)",
    ),
    (
        {"validation": held_out(target=torch.zeros(4))},
        RuntimeError,
        r"validation: target must be \[M=4, N=1\] as the output, got \[4\]; pass .*",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS, ids=[e[-1][:40] for e in ERRORS])
def test_wrong_argument_is_an_error_before_anything(
    wrong: dict[str, Any], error: type[Exception], message: str, part: Training
) -> None:
    with pytest.raises(error, match=f"^TrainStep.fit: {message}$"):
        TrainStep(*part[:3]).fit(*part[3:], **wrong)


def test_scheduler_must_be_the_optimizers(part: Training) -> None:
    step, plateau = TrainStep(*part[:3]), lr_scheduler.ReduceLROnPlateau
    other = lr_scheduler.StepLR(torch.optim.SGD(part.model.parameters(), lr=0.1), 3)
    with pytest.raises(
        ValueError, match=r"^TrainStep.fit: scheduler is that of another optimizer$"
    ):
        step.fit(*part[3:], scheduler=other)
    message = "scheduler has mode='max', and lower losses are better; pass a metric, or use mode="
    with pytest.raises(ValueError, match=f"^TrainStep.fit: {message}'min'$"):
        step.fit(*part[3:], validation=part[3:], scheduler=plateau(part.optimizer, "max"))


@pytest.mark.parametrize("as_loader", [False, True])
def test_class_out_of_range_is_an_error(as_loader: bool) -> None:
    part = training("3-17-5@100", "classes-weight-smoothing", "plain", torch.float32)
    target = part.target.clone()
    target[7] = 5
    rows: Any = (part.input, target)
    before = part.state()
    message = "^TrainStep.fit: validation: target must be classes from 0 to 4, got 5$"
    with pytest.raises(IndexError, match=message):
        TrainStep(*part[:3]).fit(*part[3:], validation=[rows] if as_loader else rows)
    torch.testing.assert_close(part.state(), before, rtol=0, atol=0)
    part.criterion.ignore_index = 5
    TrainStep(*part[:3]).fit(*part[3:], epochs=1, validation=rows)


@pytest.mark.parametrize("value", [None, "high", torch.zeros(2)], ids=str)
def test_metric_must_return_a_number(value: object) -> None:
    problem = Problem()
    message = "^TrainStep.fit: metric must return a number, got "
    with pytest.raises(TypeError, match=message):
        problem.fit(validation=problem.held_out, metric=lambda *_: value)
    assert problem.model.training


# --- Loaders ---

BATCH = held_out()
OF_LOADERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"input": [BATCH], "batch_size": 3},
        ValueError,
        r"batch_size is for tensors; with a loader, set it in DataLoader\(..., batch_size=...\)",
    ),
    (
        {"input": [BATCH], "shuffle": True},
        ValueError,
        r"shuffle is for tensors; with a loader, set it in DataLoader\(..., shuffle=...\)",
    ),
    (
        {"input": [BATCH], "generator": torch.Generator()},
        ValueError,
        r"generator is for tensors; with a loader, set it in DataLoader\(..., generator=...\)",
    ),
    (
        {"input": DataLoader(TensorDataset(*BATCH)), "target": 10},
        TypeError,
        "target must be None with a loader, got 10; options such as epochs= are keywords",
    ),
    ({"input": BATCH[0]}, TypeError, "target must be a tensor, got None"),
    (
        {"input": BATCH[0].numpy()},
        TypeError,
        r"input must be a tensor, got numpy.ndarray; pass torch.from_numpy\(input\)",
    ),
    (
        {"input": 3},
        TypeError,
        r"input must be a tensor or a loader of \(input, target\), got 3",
    ),
    (
        {"input": TensorDataset(*BATCH)},
        TypeError,
        r"input is a Dataset; pass DataLoader\(input, batch_size=...\)",
    ),
    ({"input": []}, ValueError, "input has no batches"),
    (
        {"input": iter([BATCH])},
        ValueError,
        "input is an iterator, which ends after one of 50 epochs; pass a list or a DataLoader",
    ),
    ({"input": [BATCH], "epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
    (
        {"input": [{"x": BATCH[0]}]},
        TypeError,
        r"each batch must be \(input, target\), got dict",
    ),
    (
        {"input": [(BATCH[0][0], BATCH[1])]},
        ValueError,
        r"input must be \[n, \*, K\], got \[10\]",
    ),
    ({"input": [(BATCH[0][:3], BATCH[1])]}, ValueError, "input has 3 rows, target 4"),
    (
        {"input": BATCH},
        TypeError,
        r"input is a pair; pass input and target",
    ),
]


@pytest.mark.parametrize(
    ("wrong", "error", "message"), OF_LOADERS, ids=[e[-1][:40] for e in OF_LOADERS]
)
def test_wrong_loader_is_an_error_before_anything(
    wrong: dict[str, Any], error: type[Exception], message: str, part: Training
) -> None:
    with pytest.raises(error, match=f"^TrainStep.fit: {message}$"):
        TrainStep(*part[:3]).fit(**wrong)
