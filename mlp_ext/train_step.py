"""TrainStep: forward, loss, backward and the optimizer's update in one call; fit runs epochs.

Model, criterion and optimizer are read once into a Trainer, which runs the steps in C++, with
guards on everything read: children, Parameters, hooks, settings, groups. Each step checks the
guards; if one fails, the three are read and checked again.
"""

from __future__ import annotations

import operator
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mlp_ext import _C
from mlp_ext.errors import CAUGHT, check_input, check_target, check_tensor, kind, rename
from mlp_ext.reading import LOSSES, Reading, criterion_module, read_model
from mlp_ext.reading import read as _read
from mlp_ext.step_graph import graphed


class TrainStep:
    """step(input, target) equals a training step of torch in one call:

        loss = criterion(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    It updates the model's own Parameters in place, with the optimizer's own settings and state. LR
    schedulers, checkpoints and ordinary eager steps keep working. One difference: .grad is not
    written. After model.to(dtype), convert the optimizer's state with
    optimizer.load_state_dict(optimizer.state_dict()).

    model: an nn.Sequential (may be nested or fused), a single layer, or a module whose forward only
        calls its children one after another. Supported modules are nn.Linear, the layers of
        mlp_ext, nn.Identity, activations that have such a layer, each after a Linear, nn.Dropout,
        and nn.Flatten at the start. All parameters are float32, float64, bfloat16 or float16.
        DistributedDataParallel of such a model: gradients are averaged over its process group.
    criterion: nn.MSELoss, nn.BCELoss, nn.BCEWithLogitsLoss (with pos_weight), nn.L1Loss,
        nn.SmoothL1Loss, nn.HuberLoss, nn.CrossEntropyLoss or nn.NLLLoss (with weight, ignore_index
        and label_smoothing), or its function of torch.nn.functional, also in a functools.partial
        with these as keywords; reduction mean or sum.
    optimizer: SGD, Adam, AdamW, RMSprop or Adagrad of torch.optim, with any options except
        differentiable and capturable, read at each call. Parameters that it does not have, or that
        do not require a gradient, are not updated.
    max_norm: clips the norm of all gradients that learn, as torch.nn.utils.clip_grad_norm_ does.
    accumulate: the optimizer updates at every accumulate-th call, with the mean of the gradients of
        these calls, as if each loss was divided by accumulate. fit applies an incomplete group at
        its end.

    Raises TypeError or ValueError, naming what is not supported: at construction, or at the next
    call after model, criterion or optimizer were changed. A copy (or pickle) is a TrainStep on
    copies of the three, which are read at its first call, so a model may hold its own TrainStep.
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
        if max_norm is not None and (
            isinstance(max_norm, bool) or not isinstance(max_norm, (int, float))
        ):
            raise TypeError(f"TrainStep: max_norm must be a number or None, got {kind(max_norm)}")
        self._settings = (max_norm, _count("TrainStep", "accumulate", accumulate))
        self._gradients = _C.Gradients(*self._settings)
        self._read()

    def _read(self) -> None:
        trainer, widths = _read(*self._parts, self._gradients)
        if not trainer.is_current():
            raise RuntimeError("TrainStep: model, criterion or optimizer changed while being read")
        self._trainer: Any = graphed(trainer, widths)
        self._step = self._trainer.step

    def __getstate__(self) -> dict[str, Any]:
        return {"_parts": self._parts, "_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Read later: a model that holds its own TrainStep may not be complete yet.
        self.__dict__.update(state)
        self._gradients = _C.Gradients(*self._settings)
        self._trainer = _Unread()
        self._step = self._trainer.step

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        """Runs one step; returns the detached loss [] before the update, which may not be finite.

        input: [*, K] before any Flatten, with the parameters' dtype and device; [M, K] for
            nn.CrossEntropyLoss and nn.NLLLoss.
        target: [*, N] like the output (for nn.CrossEntropyLoss probabilities), or classes [M] of
            int64 or uint8 for nn.CrossEntropyLoss and nn.NLLLoss. Where torch promotes a float64
            target of a float32 model, the loss is float64.

        Raises TypeError, ValueError, IndexError or RuntimeError, with nothing changed, if a shape,
        dtype or device does not match; a class is out of range; outputs or targets of nn.BCELoss
        are not in [0, 1]; input or target requires a gradient or has a tangent; no parameter
        learns; or torch's global state requires what a step does not support: no_grad,
        inference_mode, autocast, anomaly detection, saved-tensor hooks, a torch.func transform or a
        torch function mode (full list in docs/train-step.md).
        """
        try:
            while (loss := self._step(input, target)) is None:
                self._read()
        except CAUGHT as error:
            self._explain(error, input, target)
            raise
        return loss

    def fit(
        self,
        input: Tensor,
        target: Tensor,
        epochs: int = 50,
        batch_size: int | None = None,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Train for `epochs` passes over the rows of input [n, *, K] and target [n, ...].

        Each epoch runs the same steps, in the same order, as

            order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
            for rows in order.split(batch_size or n):
                step(input[rows], target[rows])

        The last batch may be smaller; without rows there are no steps. The optimizer's settings are
        read once, at the start. If stderr is a terminal, progress shows a bar, or plain text
        without tqdm.

        Returns the losses [epochs] on the CPU, in the input's dtype or float32 if that is 16-bit:
        the mean of each epoch over its rows, or the sum with the reduction "sum".

        Raises the same errors as a step. Ctrl-C raises KeyboardInterrupt within 50 ms or one step.
        After any error, all completed steps remain in effect.
        """
        _check_fit(input, target, shuffle, generator)
        rows = max(1, len(input))
        epochs = _count("TrainStep.fit", "epochs", epochs)
        if batch_size is not None:
            batch_size = min(_count("TrainStep.fit", "batch_size", batch_size), rows)
        batch_size = batch_size or rows
        with _progress(epochs) if progress else nullcontext() as after_epoch:
            options = (epochs, batch_size, shuffle, generator, after_epoch)
            try:
                while (losses := self._trainer.fit(input, target, *options)) is None:
                    self._read()
            except CAUGHT as error:
                self._explain(error, input, target)
                raise
        dtype = torch.promote_types(input.dtype, torch.float32)
        return torch.tensor(losses, dtype=dtype, device="cpu")

    def _explain(self, error: Exception, input: Any, target: Any) -> None:
        """Raises `error` in terms of TrainStep's arguments; returns if it already is."""
        check_tensor("TrainStep", "input", input)
        check_tensor("TrainStep", "target", target)
        if str(error).startswith("TrainStep"):
            return
        model, criterion, _ = self._parts
        reading = read_model(model)
        first, last = (reading.layers[index].parameters[0] for index in (0, -1))
        loss = LOSSES[type(criterion_module(criterion, Reading()))]
        for dimensions in reading.flattened:
            input = input.flatten(*dimensions)
        check_input("TrainStep", input, first)
        check_target("TrainStep", loss.name, input, target, last, loss.promotes)
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


def _check_fit(
    input: Tensor, target: Tensor, shuffle: bool, generator: torch.Generator | None
) -> None:
    def check(name: str, value: object, fits: bool, what: str) -> None:
        if not fits:
            raise TypeError(f"TrainStep.fit: {name} must be {what}, got {kind(value)}")

    for name, tensor in (("input", input), ("target", target)):
        check_tensor("TrainStep.fit", name, tensor)
        if tensor.dim() < (2 if name == "input" else 1):
            shape = "[n, *, K]" if name == "input" else "[n, ...]"
            raise ValueError(f"TrainStep.fit: {name} must be {shape}, got {list(tensor.shape)}")
    if len(input) != len(target):
        rows = f"input has {len(input)} rows, target {len(target)}"
        raise ValueError(f"TrainStep.fit: {rows}")
    check("shuffle", shuffle, isinstance(shuffle, bool), "True or False")
    if generator is not None:
        fits = isinstance(generator, torch.Generator)
        check("generator", generator, fits, "a torch.Generator or None")
        if generator.device.type != "cpu":
            what = f"generator must be on the cpu, as for torch.randperm, got {generator.device}"
            raise ValueError(f"TrainStep.fit: {what}")


def _count(caller: str, name: str, value: Any) -> int:
    """A positive int (or NumPy integer)."""
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        what = f"{name} must be an int, got {kind(value)}"
        raise TypeError(f"{caller}: {what}")
    if not 1 <= count < 2**63:
        raise ValueError(f"{caller}: {name} must be from 1 to {2**63 - 1}, got {count}")
    return count


AfterEpoch = Callable[[int, float], None]


@contextmanager
def _progress(epochs: int) -> Iterator[AfterEpoch | None]:
    """A callback that shows each epoch's loss; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
    elif find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(total=epochs, unit="epoch") as bar:

            def show(epoch: int, loss: float) -> None:
                bar.set_postfix_str(f"loss: {loss:.4f}", refresh=False)
                bar.update()

            yield show
    else:
        shown = 0.0

        def write(epoch: int, loss: float) -> None:
            nonlocal shown
            if epoch + 1 == epochs or time.monotonic() - shown > 0.1:
                shown = time.monotonic()
                print(f"\repoch: {epoch} loss: {loss:.4f}", end="", file=sys.stderr, flush=True)

        try:
            yield write
        finally:
            print(file=sys.stderr)
