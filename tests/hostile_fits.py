"""Hostile calls of fit, TrainSteps and predict."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from hostile import Row, Table, momentum, net, step, x, y
from hostile_layers import NAN, nested, parameter, put
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset

import mlp_ext

ROWS: Table = {}
FIT = "TrainStep.fit: "


class Loader:
    """Batches, and then an error."""

    def __init__(self, *batches: Any, error: type[Exception] | None = None) -> None:
        self.batches, self.error = batches, error

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches
        if self.error:
            raise self.error("of a user")


def epochs_of(library_step: Any, *data: Any, **options: Any) -> Any:
    """fit, or a plain loop over batches for torch's."""
    if isinstance(library_step, mlp_ext.TrainStep):
        return library_step.fit(*data, epochs=2, **options)
    rows = options.get("batch_size", 6)
    batches = (
        [*zip(data[0].split(rows), data[1].split(rows), strict=True)] if len(data) == 2 else data[0]
    )
    losses = []
    for _ in range(2):
        sums = [library_step(*batch) * len(batch[0]) for batch in batches]
        losses.append(torch.stack(sums).sum() / sum(len(batch[0]) for batch in batches))
    return torch.stack(losses)


def fit(*data: Callable[[], Any], may_train: bool = False, **options: Any) -> Any:
    """options: values, or functions of the parts that make them, as `late`."""

    def call(parts: Any) -> Any:
        given = {k: v(parts) if isinstance(v, Late) else v for k, v in options.items()}
        return epochs_of(parts.step, *(make() for make in data or (x, y)), **given)

    return step(call=call, may_train=may_train)


class Late(functools.partial):  # type: ignore[type-arg]
    pass


def add(name: str, call: Any, error: type[BaseException] | None = None, message: str = "") -> None:
    assert name not in ROWS
    ROWS[name] = Row(call, error, message)


# --- Computed as by a loop ---

add("flipped", fit(lambda: x().flip(0), lambda: y().flip(0), batch_size=4))
add("expanded", fit(lambda: x()[:1].expand(6, 4), lambda: y()[:1].expand(6, 3), batch_size=4))
add("NaN", fit(lambda: x() * NAN, y))
add("large batches", fit(batch_size=2**62))
add("batches of lists", fit(lambda: [[x(), y()], [x()[:2], y()[:2]]]))
add("inference tensors", fit(lambda: Loader((x(), y()), (x()[:0], y()[:0]), (x(), y()))))

# --- Arguments ---

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "no rows": (fit(lambda: x()[:0], lambda: y()[:0]), ValueError, "input has no rows"),
    "no batches": (
        fit(lambda: Loader()),
        ValueError,
        "input has no batches; each epoch iterates over it anew",
    ),
    "list": (
        fit(lambda: x().tolist(), y),
        TypeError,
        "input must be a tensor, got list; pass torch.as_",
    ),
    "array": (
        fit(lambda: x().numpy(), y),
        TypeError,
        "input must be a tensor, got numpy.ndarray; pass ",
    ),
    "nested": (
        fit(lambda: nested(x()), y),
        RuntimeError,
        "input must be dense, got a nested tensor; pad it",
    ),
    "text": (
        fit(lambda: "rows"),
        TypeError,
        "input must be a tensor or a loader of (input, target), got ",
    ),
    "class": (
        fit(lambda: DataLoader),
        TypeError,
        "input must be a tensor or a loader of (input, target), ",
    ),
    "batch of None": (fit(lambda: [(None, None)]), TypeError, "input must be a tensor, got None"),
    "tensors as batches": (
        fit(lambda: [x(), y(), x()]),
        TypeError,
        "each batch must be (input, target), ",
    ),
    "iterator": (
        fit(lambda: iter([(x(), y())])),
        ValueError,
        "input is an iterator, which ends after one ",
    ),
    "shuffle of 1": (fit(shuffle=1), TypeError, "shuffle must be True or False, got 1"),
    "class as generator": (
        fit(generator=torch.Generator),
        TypeError,
        "generator must be a torch.Generator or None, got the class Generator",
    ),
    "NumPy's generator": (
        fit(generator=np.random.default_rng(0)),
        TypeError,
        "generator must be a torch.Generator or None, got numpy.random",
    ),
    "batch size of 0": (fit(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    "batch size of NaN": (fit(batch_size=NAN), TypeError, "batch_size must be an int, got nan"),
    "huge batch size": (
        fit(batch_size=10**400),
        ValueError,
        "batch_size must be below 2**63, got an int of ",
    ),
    "patience of -1": (
        fit(patience=-1, validation=(x(), y())),
        ValueError,
        "patience must be at least 1, g",
    ),
    "class as on_epoch": (
        fit(on_epoch=dict),
        TypeError,
        "on_epoch must be a function or None, got the class",
    ),
    "class as metric": (
        fit(metric=nn.MSELoss, validation=(x(), y())),
        TypeError,
        "metric must be a function or None, got the class MSELoss",
    ),
    "scheduler of another": (
        fit(scheduler=lr_scheduler.StepLR(momentum(net().parameters()), 1)),
        ValueError,
        "scheduler is that of another optimizer",
    ),
    "lists to validate on": (
        fit(validation=(x().tolist(), y().tolist())),
        TypeError,
        "validation: each batch must be (input, target), got 6 values",
    ),
    "text to validate on": (
        fit(validation="rows"),
        TypeError,
        "validation must be a pair of tensors or a l",
    ),
    "width to validate on": (
        fit(validation=[(x(), y()), (x()[:, :2], y())]),
        RuntimeError,
        "validation: input must be [*, K=4], got [6, 2]",
    ),
    "nested rows to validate on": (
        fit(validation=(nested(x()), y())),
        RuntimeError,
        "validation: input must be dense, got a nested tensor; pad it by torch.nested",
    ),
}
for name, arity in {"none": 0, "one": 1, "three": 3}.items():
    function = eval(f"lambda {', '.join('abc'[:arity])}: None")
    what = "missing a required argument: 'c'" if arity == 3 else "too many positional arguments"
    ARGUMENTS |= {
        f"on_epoch of {name}": (
            fit(on_epoch=function),
            TypeError,
            f"on_epoch must take 2 arguments: epoch, loss ({what})",
        ),
        f"metric of {name}": (
            fit(metric=function, validation=(x(), y())),
            TypeError,
            f"metric must take 2 arguments: outputs, targets ({what})",
        ),
    }
ARGUMENTS |= {
    "on_epoch of two with validation": (
        fit(on_epoch=lambda epoch, loss: None, validation=(x(), y())),
        TypeError,
        "on_epoch must take 3 arguments: epoch, loss, validation loss (too many positional",
    ),
    "len as on_epoch": (
        fit(on_epoch=len),
        TypeError,
        "on_epoch must take 2 arguments: epoch, loss (too man",
    ),
    "partial as on_epoch": (
        fit(on_epoch=functools.partial(lambda epoch, loss: None, 1)),
        TypeError,
        "on_epoch must take 2 arguments: epoch, loss (too many positional arguments)",
    ),
    "on_epoch by keywords": (
        fit(on_epoch=lambda *, epoch, loss: None),
        TypeError,
        "on_epoch must take 2 arguments: epoch, loss (too many positional arguments)",
    ),
}
for name, (call, error, message) in ARGUMENTS.items():
    add(name, call, error, FIT + message)

# --- Errors while training: the steps before them stay ---


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 5:
            raise OSError("of a user")
        return x()[index], y()[index]


OK = (x(), y())
TRAINING: dict[str, tuple[Any, ...]] = {
    "loader that raises": (
        fit(lambda: Loader(OK, error=OSError), may_train=True),
        OSError,
        "of a user",
    ),
    "loader that raises at once": (fit(lambda: Loader(error=OSError)), OSError, "of a user"),
    "loader with a closed file": (fit(lambda: Loader(error=ValueError)), ValueError, "of a user"),
    "data set that raises": (
        fit(lambda: DataLoader(Broken(), batch_size=2), may_train=True),
        OSError,
        "of a user",
    ),
    "batch of another width": (
        fit(lambda: [OK, (x()[:, :2], y())], may_train=True),
        RuntimeError,
        "TrainStep: input must be [*, K=4], got [6, 2]",
    ),
    "batch that is None": (
        fit(lambda: [OK, None], may_train=True),
        TypeError,
        FIT + "each batch must be (input, target), got None",
    ),
    "on_epoch that raises": (
        fit(on_epoch=lambda epoch, loss: 1 / 0, may_train=True),
        ZeroDivisionError,
        "division by zero",
    ),
    "on_epoch that returns a number": (
        fit(on_epoch=lambda epoch, loss: 12, may_train=True),
        TypeError,
        FIT + "on_epoch must return True to stop, or False or None, got 12",
    ),
    "on_epoch that returns tensors": (
        fit(on_epoch=lambda epoch, loss: torch.ones(2), may_train=True),
        TypeError,
        FIT + "on_epoch must return True to stop, or False or None, got torch.Tensor",
    ),
    "on_epoch that replaces a layer": (
        fit(
            on_epoch=Late(lambda p: lambda epoch, loss: put(nn.Linear(9, 3), 2)(p.model)),
            may_train=True,
        ),
        RuntimeError,
        "TrainStep: the weight of layer 1 must be [N, K=5] to match the layer before, got [3, 9]",
    ),
    "metric of None": (
        fit(metric=lambda a, b: None, validation=OK, may_train=True),
        TypeError,
        FIT + "metric must return a number, got None",
    ),
    "huge metric": (
        fit(metric=lambda a, b: 10**400, validation=OK, may_train=True),
        TypeError,
        FIT + "metric must return a number, got an int of 1329 bits",
    ),
    "scheduler that raises": (
        fit(
            scheduler=Late(lambda p: lr_scheduler.LambdaLR(p.optimizer, lambda e: 1 / (1 - e))),
            may_train=True,
        ),
        ZeroDivisionError,
        "division by zero",
    ),
}
for name, (call, error, message) in TRAINING.items():
    add(name, call, error, message)

# --- TrainSteps ---


def networks() -> tuple[list[Any], Any, list[Any]]:
    models = [net() for _ in range(3)]
    return models, nn.MSELoss(), [momentum(model.parameters()) for model in models]


def many(call: Callable[..., object], change: Callable[..., object] | None = None) -> Any:
    """The call with TrainSteps. An error must leave all networks as they were.

    change: called with models, criterion and optimizers after a first step.
    """

    def run(_: Any) -> object:
        parts = networks()
        steps = mlp_ext.TrainSteps(*parts)
        steps(x(), y())
        parameters = [p for model in parts[0] for p in model.parameters()]
        if change:
            change(*parts)
        before = [p.detach().clone() for p in parameters]
        try:
            return call(steps)
        except BaseException:
            torch.testing.assert_close([p.detach() for p in parameters], before, rtol=0, atol=0)
            raise

    return run


STEPS, MANY_FIT = "TrainSteps: ", "TrainSteps.fit: "


def of_changed(
    change: Callable[..., object], error: type[Exception], message: str
) -> tuple[Any, ...]:
    return many(lambda steps: steps(x(), y()), change), error, STEPS + message


def of_fit(error: type[Exception], message: str, *data: Any, **options: Any) -> tuple[Any, ...]:
    call = many(lambda steps: steps.fit(*(data or (x(), y())), epochs=2, **options))
    return call, error, MANY_FIT + message


MANY: dict[str, tuple[Any, ...]] = {
    "steps of a list": (
        many(lambda steps: steps(x().tolist(), y())),
        TypeError,
        STEPS + "input must be a tensor, got list; pass torch.as_tensor(input)",
    ),
    "steps of nested rows": (
        many(lambda steps: steps(nested(x()), y())),
        RuntimeError,
        STEPS + "input must be dense, got a nested tensor; pad it by torch.nested",
    ),
    "steps for two networks": (
        many(lambda steps: steps(x().expand(2, 6, 4), y())),
        RuntimeError,
        STEPS
        + "input must be [M, K=4] for all networks or [E=3, M, K=4] for each its own, got [2, 6",
    ),
    "weight of one": of_changed(
        lambda m, c, o: parameter(None)(m[1]),
        TypeError,
        "models[1].0.weight is a builtins.NoneType",
    ),
    "lr of one": of_changed(
        lambda m, c, o: o[1].param_groups[0].update(lr="a"),
        TypeError,
        "optimizers[1].param_groups has lr ",
    ),
    "lr of one deleted": of_changed(
        lambda m, c, o: o[1].param_groups[0].pop("lr"),
        ValueError,
        "optimizers[1].param_groups has no lr",
    ),
    "group of one": of_changed(
        lambda m, c, o: o[1].param_groups.__setitem__(0, None),
        TypeError,
        "optimizers[1].param_groups[0] is",
    ),
    "memory of two": of_changed(
        lambda m, c, o: setattr(m[1][0].weight, "data", m[0][0].weight.data),
        RuntimeError,
        "a parameter that learns must not share memory with a parameter that learns; pass a ",
    ),
    "optimizers in another order": (
        lambda _: mlp_ext.TrainSteps(*networks()[:2], networks()[2][::-1]),
        ValueError,
        STEPS + "optimizers[0] has none of the model's parameters; make it with model.parameters()",
    ),
    "dict of models": (
        lambda _: mlp_ext.TrainSteps(dict(enumerate(networks()[0])), *networks()[1:]),  # type: ignore[arg-type]
        TypeError,
        STEPS + "models[0] is a builtins.int, which a step does not support",
    ),
    "many, no rows": of_fit(ValueError, "input has no rows", x()[:0], y()[:0]),
    "rows of numbers": of_fit(
        TypeError, "rows[0] must be a tensor, array or list of integers, got None", rows=[None] * 3
    ),
    "rows of text": of_fit(
        TypeError, "rows[0] must be a tensor, array or list of integers, got list", rows=[["a"]] * 3
    ),
    "rows of floats": of_fit(
        TypeError, "rows[0] must be integers, got torch.float32", rows=[[0.5]] * 3
    ),
    "masks as rows": of_fit(
        TypeError,
        "rows[0] must be integers, got torch.bool; pass torch.as_tensor(rows[0]).nonzero()",
        rows=[np.ones(6, bool)] * 3,
    ),
    "one network without rows": of_fit(
        ValueError, "rows[1] must be [n] with at least one row, got [0]", rows=[[1], [], [2]]
    ),
    "meta rows": of_fit(
        TypeError,
        "rows[0] must be a tensor, array or list of integers, got torch.Tensor",
        rows=[torch.arange(3, device="meta")] * 3,
    ),
    "huge row": of_fit(
        TypeError,
        "rows[0] must be a tensor, array or list of integers, got list",
        rows=[[2**70]] * 3,
    ),
    "row of -1": of_fit(
        IndexError, "rows[2] must be from 0 to 5, got -1 to -1", rows=[[0], [1], [-1]]
    ),
    "generator of all": of_fit(
        TypeError,
        "generators must be a list, one for each network, or None",
        generators=torch.Generator(),
    ),
}
for name, (call, error, message) in MANY.items():
    add(name, call, error, message)


def rows_of(make: Callable[[list[int]], Any]) -> Row:
    """TrainSteps.fit with rows of this kind, as with tensors of int64."""

    def call(lib: Any) -> Tensor:
        is_ours = lib.relu is mlp_ext.linear_relu
        kind = make if is_ours else torch.tensor
        rows = [kind(each) for each in ([0, 1], [5, 4, 3, 2], [2, 2, 2])]
        return mlp_ext.TrainSteps(*networks()).fit(x(), y(), epochs=2, batch_size=2, rows=rows)

    return Row(call)


ROWS |= {
    "rows in lists": rows_of(list),
    "rows in tuples": rows_of(tuple),
    "rows in arrays": rows_of(np.array),
    "rows of uint8": rows_of(lambda each: np.array(each, np.uint8)),
    "rows of int32": rows_of(lambda each: torch.tensor(each, dtype=torch.int32)),
    "sparse rows": rows_of(lambda each: torch.tensor(each).to_sparse()),
}

# --- predict ---


def predicted(
    input: Callable[[], Any], change: Callable[[Any], object] = len
) -> Callable[..., object]:
    def run(_: Any) -> Tensor:
        models = networks()[0]
        mlp_ext.predict(models, x())
        change(models)
        return mlp_ext.predict(models, input())

    return run


PREDICTED: dict[str, tuple[Any, ...]] = {
    "list to predict": (
        predicted(lambda: x().tolist()),
        TypeError,
        "input must be a tensor, got list; pass",
    ),
    "sparse to predict": (
        predicted(lambda: x().to_sparse()),
        RuntimeError,
        "input must be dense, got torch.s",
    ),
    "nested to predict": (
        predicted(lambda: nested(x())),
        RuntimeError,
        "input must be dense, got a nested te",
    ),
    "meta to predict": (
        predicted(lambda: x().to("meta")),
        RuntimeError,
        "input is on meta, the model on cpu;",
    ),
    "vector to predict": (
        predicted(lambda: x()[0]),
        RuntimeError,
        "input must be [M, K=4] for all networks ",
    ),
    "weight of None to predict": (
        predicted(x, lambda m: parameter(None)(m[1])),
        TypeError,
        "models[1].0.weight is a builtins.NoneType",
    ),
    "None as models": (
        lambda _: mlp_ext.predict(None, x()),
        TypeError,
        "models must be a list, got None",
    ),  # type: ignore[arg-type]
    "list of None": (
        lambda _: mlp_ext.predict([None], x()),  # type: ignore[list-item]
        TypeError,
        "models[0] is a builtins.NoneType, which a step does not support",
    ),
    "list of classes": (
        lambda _: mlp_ext.predict([nn.Linear], x()),  # type: ignore[list-item]
        TypeError,
        "models[0] is the class Linear, not an instance of it; pass Linear()",
    ),
}
for name, (call, error, message) in PREDICTED.items():
    add(name, call, error, f"predict: {message}")
