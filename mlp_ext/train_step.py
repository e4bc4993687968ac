"""TrainStep: forward, loss, backward and the optimizer's update in one call; fit runs epochs.

Model, criterion and optimizer are read once into a Trainer, which runs the steps in C++, with
guards on everything read: children, Parameters, hooks, settings, groups. Each step checks the
guards; if one fails, the three are read and checked again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from mlp_ext import _C, batches
from mlp_ext.batches import FIT
from mlp_ext.errors import CAUGHT, as_float, check_tensor, kind, rename
from mlp_ext.fitting import Between, DataCheck, FitResult, Loader
from mlp_ext.progress import AfterEpoch, progress_bar
from mlp_ext.reading import Reading, criterion_module, read
from mlp_ext.step_graph import graphed
from mlp_ext.step_text import criterion_text, model_text, optimizer_text, positive

DEFAULTS = (None, None, None, None, None, True)  # of fit's options from validation on


class TrainStep:
    """Forward, loss, backward and the optimizer's update in one call.

    `step(input, target)` equals

        loss = criterion(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    It updates the model's own Parameters in place, with the optimizer's own settings and state. LR
    schedulers, checkpoints and ordinary eager steps keep working. `.grad` is not written. Under
    `torch.autocast` it follows [autocast](train-step.md#autocast).

    Changes of the model, criterion or optimizer take effect in the next call, which raises what the
    constructor would raise. After `model.to(dtype)`, convert the optimizer's state with
    `optimizer.load_state_dict(optimizer.state_dict())`. A copy or pickle is a step on copies of the
    three, which are read at its first call, so a model may hold its own step.

    Args:
        model (nn.Module): an `nn.Sequential` (may be nested or fused), a single layer, a module
            whose forward only calls its children one after another, or `DistributedDataParallel`
            of one. Its modules: `nn.Linear`, the layers of mlp_ext, the activations that have such
            a layer, each after a Linear, `nn.Identity`, `nn.Dropout`, and `nn.Flatten` at the
            start. All Parameters have the same dtype: float32, float64, bfloat16 or float16.
        criterion (nn.Module or function): `nn.MSELoss`, `L1Loss`, `SmoothL1Loss`, `HuberLoss`,
            `BCELoss`, `BCEWithLogitsLoss` (with pos_weight), `CrossEntropyLoss` (with weight,
            ignore_index, label_smoothing) or `NLLLoss` (with weight, ignore_index), with the
            reduction mean or sum. Or the function in `torch.nn.functional`, or a
            `functools.partial` of it.
        optimizer (torch.optim.Optimizer): `SGD`, `Adam`, `AdamW`, `RMSprop` or `Adagrad`, with any
            options except differentiable and capturable. Its settings are read at each call.
            Parameters that it does not have, or that do not require a gradient, are not updated.
        max_norm (float, optional): clips the norm of all gradients, as
            `torch.nn.utils.clip_grad_norm_` does. None does not clip.
        accumulate (int): number of calls per update. An update uses the mean of their gradients, as
            if each loss was divided by it. Default: 1.

    Raises:
        TypeError: a module, the criterion or the optimizer is of a type that is not supported. The
            message names it, and what to use instead.
        ValueError: they have options, hooks, shared Parameters or the like that are not supported.

    Examples:
        >>> model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mlp_ext.TrainStep(model, nn.MSELoss(), optimizer, max_norm=1.0)
        TrainStep(10-5-1 relu sigmoid, MSELoss(), SGD(lr=0.1), max_norm=1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        accumulate: int = 1,
    ) -> None:
        self._parts = (model, criterion, optimizer)
        if max_norm is not None and (isinstance(max_norm, bool) or as_float(max_norm) is None):
            raise TypeError(f"TrainStep: max_norm must be a number or None, got {kind(max_norm)}")
        self._settings = (max_norm, positive("TrainStep", "accumulate", accumulate))
        self._gradients = _C.Gradients(*self._settings)
        self._read()

    def _read(self) -> None:
        trainer, widths, _ = read(*self._parts, self._gradients)
        if not trainer.is_current():
            raise RuntimeError("TrainStep: model, criterion or optimizer changed while being read")
        self._trainer: Any = graphed(trainer, widths)
        self._step = self._trainer.step

    def __repr__(self) -> str:
        model, criterion, optimizer = self._parts
        max_norm, accumulate = self._settings
        return "TrainStep({}, {}, {}{}{})".format(
            model_text(model),
            criterion_text(criterion),
            optimizer_text([optimizer]),
            f", {max_norm=}" if max_norm is not None else "",
            f", {accumulate=}" if accumulate != 1 else "",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_parts": self._parts, "_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Read later: a model that holds its own TrainStep may not be complete yet.
        self.__dict__.update(state)
        self._gradients = _C.Gradients(*self._settings)
        self._trainer = _Unread()
        self._step = self._trainer.step

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        """Runs one step.

        Args:
            input (Tensor): a batch, of the dtype and device of the Parameters.
            target (Tensor): its targets, of the same dtype and device, or classes of int64 or
                uint8.

        Shape:
            - input: `(*, K)`, or what the model's `nn.Flatten` makes `(M, K)`. With classes, only
              `(M, K)`.
            - target: `(*, N)`, as the output; or classes `(M)` from 0 to N - 1.
            - Output: `()`.

        Returns:
            Tensor: the detached loss before the update. It may not be finite. Its dtype is the
                model's, or float64 where PyTorch promotes a float64 target of a float32 model.

        Raises:
            TypeError: input or target is not a tensor, or classes are not int64 or uint8; also, as
                ValueError, if the model, criterion or optimizer was changed to something that is
                not supported.
            IndexError: a class is out of range. On a GPU this, and values outside [0, 1] with
                `nn.BCELoss`, are a device-side assertion, as in PyTorch.
            RuntimeError: a shape, dtype or device does not match; input or target requires a
                gradient; values are not in [0, 1] with `nn.BCELoss`; no Parameter learns; the
                storage of a tensor was freed; memory runs out; or PyTorch is in a state that a step
                does not support, such as no_grad or inference_mode ([full
                list](train-step.md#pytorchs-global-state)).

        After any of these errors nothing has changed, except in [a few
        cases](train-step.md#when-a-step-fails) on GPUs and with `accumulate` or `max_norm`.

        Examples:
            >>> model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3))
            >>> optimizer = torch.optim.Adam(model.parameters())
            >>> step = mlp_ext.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
            >>> step(torch.randn(64, 10), torch.randint(3, (64,))).shape
            torch.Size([])
        """
        try:
            while (loss := self._step(input, target)) is None:
                self._read()
        except CAUGHT as error:
            self._explain(error, input, target)
            raise
        return loss

    @overload
    def fit(
        self,
        input: Tensor | Loader,
        target: Tensor | None = None,
        epochs: int = 50,
        batch_size: int | None = None,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        progress: bool = False,
        *,
        validation: None = None,
        metric: None = None,
        patience: None = None,
        restore_best: bool = True,
        scheduler: LRScheduler | None = None,
        on_epoch: Callable[[int, float], Any] | None = None,
    ) -> Tensor: ...

    @overload
    def fit(
        self,
        input: Tensor | Loader,
        target: Tensor | None = None,
        epochs: int = 50,
        batch_size: int | None = None,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        progress: bool = False,
        *,
        validation: tuple[Tensor, Tensor] | Loader,
        metric: Callable[[Tensor, Tensor], Any] | None = None,
        patience: int | None = None,
        restore_best: bool = True,
        scheduler: LRScheduler | None = None,
        on_epoch: Callable[..., Any] | None = None,
    ) -> FitResult: ...

    def fit(
        self,
        input: Tensor | Loader,
        target: Tensor | None = None,
        epochs: int = 50,
        batch_size: int | None = None,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        progress: bool = False,
        *,
        validation: tuple[Tensor, Tensor] | Loader | None = None,
        metric: Callable[[Tensor, Tensor], Any] | None = None,
        patience: int | None = None,
        restore_best: bool = True,
        scheduler: LRScheduler | None = None,
        on_epoch: Callable[..., Any] | None = None,
    ) -> Tensor | FitResult:
        """Trains for a number of epochs, without Python between the steps.

        Each epoch runs the same steps, in the same order, as

            order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
            for rows in order.split(batch_size or n):
                step(input[rows], target[rows])

        and `fit(loader)`, where Python runs between the steps, as

            for input, target in loader:
                step(input, target)

        The optimizer's settings are read once, at the start; with any option after `progress`, in
        each epoch. An incomplete group of `accumulate` calls is applied at the end. Ctrl-C raises
        KeyboardInterrupt within 50 ms or one step. After any error, all completed steps remain in
        effect.

        Args:
            input (Tensor or iterable): all rows, of the dtype and device of the Parameters. Or a
                loader, such as a `DataLoader`: each epoch iterates over its batches of input and
                target, and copies those on the CPU to the Parameters' GPU.
            target (Tensor, optional): the target of each row, as in a call of the step. None with a
                loader.
            epochs (int): number of passes over the rows. Default: 50.
            batch_size (int, optional): rows per step; the last batch may be smaller. None takes all
                rows.
            shuffle (bool): whether to shuffle the rows in each epoch. Default: False.
            generator (torch.Generator, optional): random generator for `shuffle`, on the CPU. None
                uses PyTorch's default generator.
            progress (bool): whether to show a progress bar in a terminal or notebook, with tqdm if
                installed. Default: False.
            validation (tuple of Tensor or iterable, optional): input and target of the validation
                rows, or a loader of them. After each epoch, computes the criterion on all of them,
                without gradients and with the model in eval mode.
            metric (callable, optional): called with the outputs and targets of all validation rows;
                returns a number, higher is better. The metric decides which epoch is best; without
                one, the validation loss does.
            patience (int, optional): number of epochs without improvement after which training
                stops. None runs all epochs.
            restore_best (bool): whether the model gets the Parameters of the best epoch at the end.
                The optimizer's state stays that of the last epoch. After an error or Ctrl-C nothing
                is restored. Default: True.
            scheduler (LRScheduler, optional): stepped after each epoch. `ReduceLROnPlateau` gets
                the validation loss, the metric if its mode is "max", or without `validation` the
                loss.
            on_epoch (callable, optional): called after each epoch with its number and loss, then
                the validation loss and the metric if there are any. Training stops if it returns
                True.

        Shape:
            - input: `(n, *, K)`.
            - target: `(n, *, N)`, or classes `(n)`.
            - Output: `(epochs)`, fewer if training stopped early.

        Returns:
            Tensor: the loss of each epoch, on the CPU: the mean over its rows, or the sum with the
                reduction "sum". Its dtype is the model's, or float32 if that is 16-bit. With
                `validation`, a `FitResult` that has them as `losses`.

        Raises:
            TypeError, ValueError: an argument is of another type or out of range, or as in a call.
            IndexError, RuntimeError: as in a call of the step.

        Examples:
            >>> x, y = torch.randn(1000, 10), torch.rand(1000, 1)
            >>> model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> step = mlp_ext.TrainStep(model, nn.MSELoss(), optimizer)
            >>> losses = step.fit(x, y, epochs=20, batch_size=32, shuffle=True)
            >>> losses.shape
            torch.Size([20])
            >>> loader = torch.utils.data.DataLoader([*zip(x[200:], y[200:])], batch_size=32)
            >>> held_out = x[:200], y[:200]
            >>> result = step.fit(loader, epochs=20, validation=held_out, patience=3)
            >>> len(result.losses) == len(result.validation_losses)
            True
        """
        is_loader = target is None and not isinstance(input, Tensor)
        if is_loader:
            batches.check_unset(batch_size=batch_size, shuffle=shuffle, generator=generator)
        else:
            batches.check_no_loader(input, target)
            _check_fit(input, target, shuffle, generator)
        epochs = positive(FIT, "epochs", epochs)
        if is_loader:
            batches.check_loader("input", input, epochs)
        rows = 1 if is_loader else len(input)  # type: ignore[arg-type]
        if batch_size is not None:
            batch_size = min(positive(FIT, "batch_size", batch_size), rows)
        options: Any = (batch_size or rows, shuffle, generator)
        given = (validation, metric, patience, scheduler, on_epoch, restore_best)
        between = None
        if is_loader or not all(map(operator.is_, given, DEFAULTS)):
            between = Between(self._parts, epochs, *given)
        with progress_bar(epochs) if progress else nullcontext() as show:
            if between:
                return self._fit_between(between, input, target, options, show)
            losses = self._epochs(input, target, epochs, *options, show)
        dtype = torch.promote_types(input.dtype, torch.float32)  # type: ignore[union-attr]
        return torch.tensor(losses, dtype=dtype, device="cpu")

    def _epoch(self, input: Tensor, target: Tensor, batch_size: int) -> float:
        """fit of one epoch with valid arguments: with half the overhead."""
        options = (1, batch_size, False, None, None)
        while (losses := self._trainer.fit(input, target, *options)) is None:
            self._read()
        loss: float = losses[0]
        return loss

    def _epochs(self, input: Any, target: Any, *options: Any) -> Any:
        """The losses of whole epochs in one call."""
        try:
            while (losses := self._trainer.fit(input, target, *options)) is None:
                self._read()
        except CAUGHT as error:
            self._explain(error, input, target)
            raise
        return losses

    def _fit_between(
        self, between: Between, input: Any, target: Any, options: Any, show: AfterEpoch | None
    ) -> Tensor | FitResult:
        model, criterion, _ = self._parts
        weight = next(model.parameters(), torch.empty(0))  # without one the first step raises
        mean = criterion_module(criterion, Reading()).reduction == "mean"
        may_be_pending = self._settings[1] > 1
        last: tuple[Tensor, Tensor] | None = None

        def step(x: Tensor, y: Tensor) -> Tensor:
            nonlocal last
            last = (x[:0], y[:0]) if may_be_pending else None
            return self(x, y)

        def of_batches() -> float:
            if target is None:
                found = batches.on_device(batches.of_loader(FIT, input), weight.device)
            else:
                found = batches.of_tensors(input, target, *options)
            return batches.train(step, found, mean)

        def in_one_call() -> float:
            loss: float = self._epochs(input, target, 1, *options, None)[0]
            return loss

        def finish() -> None:
            if last:  # with no rows, fit only applies an incomplete group
                self._epochs(*last, 1, 1, False, None, None)

        # A call would apply an incomplete group at the end of each epoch.
        train = of_batches if target is None or may_be_pending else in_one_call
        return between.run(train, finish, torch.promote_types(weight.dtype, torch.float32), show)

    def _explain(self, error: Exception, input: Any, target: Any) -> None:
        """Raises `error` in terms of TrainStep's arguments; returns if it already is."""
        check_tensor("TrainStep", "input", input)
        check_tensor("TrainStep", "target", target)
        if str(error).startswith("TrainStep"):
            return
        DataCheck(*self._parts[:2])("TrainStep", input, target)
        message = str(error)
        if "an optimizer state must be" in message and "to match" in message:  # after model.to()
            advice = "call optimizer.load_state_dict(optimizer.state_dict())"
            error = type(error)(f"{message}; {advice}")
        rename(error, "TrainStep")


class _Unread:
    """Placeholder for the Trainer of a copy: never current, so that the first call reads."""

    def step(self, input: Tensor, target: Tensor) -> None:
        return None

    def fit(self, *arguments: Any) -> None:
        return None


def _check_fit(input: Any, target: Any, shuffle: Any, generator: Any) -> None:
    batches.check_rows(FIT, input, target)
    if not len(input):
        raise ValueError(f"{FIT}: input has no rows")
    if not isinstance(shuffle, bool):
        raise TypeError(f"TrainStep.fit: shuffle must be True or False, got {kind(shuffle)}")
    if not isinstance(generator, (torch.Generator, type(None))):
        what = f"generator must be a torch.Generator or None, got {kind(generator)}"
        raise TypeError(f"TrainStep.fit: {what}")
    if generator is not None and generator.device.type != "cpu":
        what = f"generator must be on the cpu, as for torch.randperm, got {generator.device}"
        raise ValueError(f"TrainStep.fit: {what}")
