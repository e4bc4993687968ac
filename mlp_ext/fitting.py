"""What fit does between its epochs: validation, early stopping, a scheduler and a callback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mlp_ext.batches import FIT, check_loader, is_pair, of_loader, on_device
from mlp_ext.errors import check_input, check_target, kind
from mlp_ext.predict import outputs
from mlp_ext.reading import LOSSES, Reading, average, criterion_module, read_model
from mlp_ext.step_text import positive

VALIDATION = f"{FIT}: validation"
Loader = Iterable[Any]
Reason = Literal["epochs", "patience", "on_epoch"]


class FitResult(NamedTuple):
    """What `TrainStep.fit` returns with `validation`.

    Attributes:
        losses (Tensor): the loss of each epoch that ran, as `fit` returns it without validation.
        validation_losses (Tensor): the criterion on the validation rows after each epoch, of the
            same dtype.
        metrics (Tensor or None): the metric after each epoch, in float64; None without `metric`.
        best_epoch (int or None): the epoch with the highest metric, or without `metric` the lowest
            validation loss; the first of equal ones. None if all of them are NaN.
        reason (str): what ended the training: "epochs", "patience" or "on_epoch".

    Examples:
        >>> x, y = torch.randn(1000, 10), torch.rand(1000, 1)
        >>> model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())
        >>> step = mlp_ext.TrainStep(model, nn.MSELoss(), torch.optim.Adam(model.parameters()))
        >>> result = step.fit(x[:800], y[:800], epochs=5, validation=(x[800:], y[800:]))
        >>> result.best_epoch == int(result.validation_losses.argmin()), result.reason
        (True, 'epochs')
    """

    losses: Tensor
    validation_losses: Tensor
    metrics: Tensor | None
    best_epoch: int | None
    reason: Reason


class Best:
    """The best epoch so far, and the parameters after it."""

    def __init__(self, model: nn.Module, patience: int | None, restore: bool) -> None:
        self._model, self._patience, self._restore = model, patience, restore
        self.epoch: int | None = None
        self._value = math.nan
        self._parameters: list[tuple[nn.Parameter, Tensor]] = []

    def update(self, epoch: int, value: float) -> bool:
        """value: lower is better, NaN is none. Whether patience is exhausted."""
        is_first = self.epoch is None and not math.isnan(value)
        if is_first or value < self._value:
            self.epoch, self._value = epoch, value
            self._parameters.clear()
            if self._restore:
                self._parameters = [(p, p.detach().clone()) for p in self._model.parameters()]
            return False
        last = -1 if self.epoch is None else self.epoch
        return self._patience is not None and epoch - last >= self._patience

    @torch.no_grad()
    def put_back(self) -> None:
        if self._parameters:
            parameters, best = zip(*self._parameters, strict=True)
            torch._foreach_copy_(parameters, best)  # one call: Ctrl-C does not come in between


class DataCheck:
    """Whether rows fit the model and the criterion as they are now."""

    def __init__(self, model: nn.Module, criterion: Any) -> None:
        reading = read_model(model)
        self._flattened = reading.flattened
        self._first, self._last = (reading.layers[index].parameters[0] for index in (0, -1))
        criterion = criterion_module(criterion, Reading())
        self._loss = LOSSES[type(criterion)]
        self._ignored = getattr(criterion, "ignore_index", None)

    def __call__(self, name: str, input: Any, target: Any) -> None:
        for dimensions in self._flattened:
            try:
                input = input.flatten(*dimensions)
            except (IndexError, RuntimeError) as error:
                what = f"input {list(input.shape)} does not fit the model's Flatten{dimensions}"
                raise type(error)(f"{name}: {what}: {error}") from None
        loss = self._loss
        check_input(name, input, self._first)
        check_target(name, loss.name, input, target, self._last, loss.promotes)

    def classes(self, name: str, target: Tensor) -> None:
        """On a GPU torch's own error would end the process's use of CUDA."""
        if self._ignored is None or target.is_floating_point():
            return
        known = target[target != self._ignored]
        low, high = (int(t) for t in known.aminmax()) if known.numel() else (0, 0)
        if low < 0 or high >= len(self._last):
            what = f"target must be classes from 0 to {len(self._last) - 1}"
            raise IndexError(f"{name}: {what}, got {low if low < 0 else high}")


class Validation:
    """The loss on the validation rows, and the metric if there is one."""

    def __init__(
        self, model: nn.Module, criterion: Any, rows: Any, metric: Any, epochs: int
    ) -> None:
        self._model, self._criterion, self._metric = model, criterion, metric
        self._rows, self._is_pair = rows, is_pair(rows)
        if not self._is_pair:
            check_loader("validation", rows, epochs)
        check = DataCheck(model, criterion)
        known = [rows] if self._is_pair else rows if isinstance(rows, (tuple, list)) else []
        is_copied = next(model.parameters()).is_cuda and not self._is_pair
        for x, y in of_loader(VALIDATION, known):
            check.classes(VALIDATION, y)
            if not is_copied:
                check(VALIDATION, x, y)
        if self._is_pair and not len(rows[0]):
            raise ValueError(f"{VALIDATION} has no rows")

    def __call__(self) -> list[float]:
        learning = [module for module in self._model.modules() if module.training]
        try:
            self._model.eval()
            with torch.no_grad():
                y, target = self._outputs()
                found = [float(self._criterion(y, target))]
                if self._metric is not None:
                    found.append(_number("metric", self._metric(y, target)))
        finally:
            for module in learning:
                module.training = True
        return mean_of_processes(self._model, found)

    def _outputs(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets of all rows."""
        if self._is_pair:
            return outputs(self._model, self._rows[0]), self._rows[1]
        check = DataCheck(self._model, self._criterion)

        def checked() -> Any:
            for x, y in of_loader(VALIDATION, self._rows):
                check.classes(VALIDATION, y)
                yield x, y

        found, targets = [], []
        for x, y in on_device(checked(), next(self._model.parameters()).device):
            check(VALIDATION, x, y)
            found.append(outputs(self._model, x))
            targets.append(y)
        if not found:
            raise ValueError(f"{VALIDATION} has no batches")
        return torch.cat(found), torch.cat(targets)


def mean_of_processes(model: nn.Module, values: list[float]) -> list[float]:
    """With DistributedDataParallel, so that all processes decide alike."""
    if type(model) is not DistributedDataParallel:
        return values
    device = next(model.parameters()).device
    found = torch.tensor(values, dtype=torch.float64, device=device)
    average(model.process_group, found)
    means: list[float] = found.tolist()
    return means


class Between:
    """The options of fit for what happens between epochs, checked."""

    def __init__(
        self,
        parts: tuple[nn.Module, Any, torch.optim.Optimizer],
        epochs: int,
        validation: Any,
        metric: Callable[[Tensor, Tensor], Any] | None,
        patience: int | None,
        scheduler: LRScheduler | None,
        on_epoch: Callable[..., Any] | None,
        restore_best: bool,
    ) -> None:
        self._model, criterion, optimizer = parts
        self._epochs = epochs
        _check_function("metric", metric, ["outputs", "targets"])
        of_validation = ["validation loss"] * (validation is not None)
        of_metric = ["metric"] * (metric is not None)
        _check_function("on_epoch", on_epoch, ["epoch", "loss", *of_validation, *of_metric])
        for name, needs in (("metric", metric), ("patience", patience)):
            if needs is not None and validation is None:
                raise ValueError(f"{FIT}: {name} needs validation=(input, target)")
        if patience is not None:
            patience = positive(FIT, "patience", patience)
        if not isinstance(restore_best, bool):
            what = f"restore_best must be True or False, got {kind(restore_best)}"
            raise TypeError(f"{FIT}: {what}")
        if scheduler is not None:
            _check_scheduler(scheduler, optimizer, metric)
        self._scheduler, self._on_epoch, self._metric = scheduler, on_epoch, metric
        self._validate = self._best = None
        if validation is not None:
            self._validate = Validation(self._model, criterion, validation, metric, epochs)
            self._best = Best(self._model, patience, restore_best)

    def run(
        self,
        train: Callable[[], float],
        finish: Callable[[], object],
        dtype: torch.dtype,
        show: Callable[..., None] | None,
    ) -> Tensor | FitResult:
        """train: an epoch; returns its loss. finish: after the last one."""
        losses: list[float] = []
        validated: list[list[float]] = []
        reason: Reason = "epochs"
        for epoch in range(self._epochs):
            losses.append(train())
            of_epoch = [losses[-1]]
            if self._validate and self._best:
                validated.append(self._validate())
                of_epoch += validated[-1]
                value = of_epoch[-1] if self._metric is None else -of_epoch[-1]
                if self._best.update(epoch, value):
                    reason = "patience"
            self._schedule(of_epoch)
            if show:
                show(epoch, *of_epoch)
            if self._on_epoch and _stops(self._on_epoch(epoch, *of_epoch)):
                reason = "on_epoch"
            if reason != "epochs":
                break
        finish()
        found = torch.tensor(losses, dtype=dtype, device="cpu")
        if not self._best:
            return found
        self._best.put_back()
        of_validation, *of_metric = torch.tensor(validated, dtype=torch.float64, device="cpu").T
        metrics = of_metric[0].contiguous() if of_metric else None
        return FitResult(found, of_validation.to(dtype), metrics, self._best.epoch, reason)

    def _schedule(self, of_epoch: list[float]) -> None:
        if isinstance(self._scheduler, ReduceLROnPlateau):
            if not self._validate:
                of_epoch = mean_of_processes(self._model, of_epoch)
            highest = self._scheduler.mode == "max"
            self._scheduler.step(of_epoch[-1] if highest else of_epoch[:2][-1])
        elif self._scheduler:
            self._scheduler.step()


def _check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer, metric: Any) -> None:
    if not isinstance(scheduler, LRScheduler):
        what = "scheduler must be one of torch.optim.lr_scheduler or None"
        raise TypeError(f"{FIT}: {what}, got {kind(scheduler)}")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(f"{FIT}: scheduler is that of another optimizer")
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode == "max" and metric is None:
        what = "scheduler has mode='max', and lower losses are better"
        raise ValueError(f"{FIT}: {what}; pass a metric, or use mode='min'")


def _check_function(name: str, function: Any, arguments: Sequence[str]) -> None:
    """Raises unless it can be called with these, as far as its signature is known."""
    if function is None:
        return
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{FIT}: {name} must be a function or None, got {kind(function)}")
    try:
        known = signature(function)
    except (TypeError, ValueError):  # of some functions in C
        return
    try:
        known.bind(*arguments)
    except TypeError as error:
        what = f"{name} must take {len(arguments)} arguments: {', '.join(arguments)}"
        raise TypeError(f"{FIT}: {what} ({error})") from None


def _stops(returned: Any) -> bool:
    """What on_epoch returned."""
    if returned is None or type(returned).__name__ in ("bool", "bool_"):  # also NumPy's
        return bool(returned)
    what = f"on_epoch must return True to stop, or False or None, got {kind(returned)}"
    raise TypeError(f"{FIT}: {what}")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{FIT}: {name} must return a number, got {kind(value)}") from None
