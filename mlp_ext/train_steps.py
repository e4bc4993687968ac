"""TrainSteps: training steps of many networks in one call; fit runs their epochs.

Each model and its optimizer are read into a Trainer with guards, as TrainStep's are. The Trainers'
networks are then trained by one operator. A call reads again what has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlp_ext import _C
from mlp_ext.errors import CAUGHT, check_input, check_target, check_tensor, kind, rename
from mlp_ext.networks import (
    ALONE,
    GROUPS,
    Look,
    check_alike,
    check_distinct,
    check_options,
    flattened,
    listed,
    look,
    of_network,
)
from mlp_ext.nn import type_name
from mlp_ext.progress import progress_bar
from mlp_ext.reading import LOSSES, Reading, criterion_module, read, read_model
from mlp_ext.step_text import criterion_text, model_text, optimizer_text, positive
from mlp_ext.train_step import TrainStep

NAME, FIT = "TrainSteps", "TrainSteps.fit"


class TrainSteps:
    """Training steps of many networks in one call, each with its own optimizer.

    `steps(input, target)` equals

        [step(input, target) for step in map(TrainStep, models, criterions, optimizers)]

    with `criterion` for all, and takes far less time where networks are small. The models have the
    same layers; their optimizers are of one type, and each has its own hyperparameters: a sweep of
    learning rates and seeds, an ensemble, the folds of a cross-validation.

    The models' own Parameters are updated in place. LR schedulers, checkpoints and ordinary eager
    steps keep working, `.grad` is not written, and changes of a model, the criterion or an
    optimizer take effect in the next call, all as with `TrainStep`. The results of a network do not
    depend on which others are trained with it or on their order, nor on the number of threads,
    unless networks are so large that threads share them. A network that diverges changes no other.

    Args:
        models (sequence of nn.Module): models as `TrainStep` takes them, with the same widths,
            activations, biases, dtype and device, of which the same parameters learn. They share no
            Parameters. `DistributedDataParallel` is not supported.
        criterion (nn.Module or function): the loss of each, as `TrainStep` takes it.
        optimizers (sequence of torch.optim.Optimizer): one for each model, as `TrainStep` takes
            them, all of one type.
        **unsupported: `max_norm` and `accumulate`, which only `TrainStep` has.

    Raises:
        TypeError: a module, the criterion or an optimizer is of a type that is not supported, or an
            option is not.
        ValueError: models or optimizers are not alike, or have options, hooks, shared Parameters or
            the like that are not supported.

    Examples:
        >>> rates = [0.01, 0.03, 0.1, 0.3]
        >>> models = [nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1)) for _ in rates]
        >>> optimizers = [torch.optim.SGD(m.parameters(), lr) for m, lr in zip(models, rates)]
        >>> mlp_ext.TrainSteps(models, nn.MSELoss(), optimizers)
        TrainSteps(4 x 10-5-1 relu identity, MSELoss(), SGD(lr=[0.01, 0.03, 0.1, 0.3]))
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        criterion: nn.Module | Callable[..., Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        **unsupported: Any,
    ) -> None:
        check_options(NAME, TrainSteps, TrainStep, unsupported)
        self._parts = (
            listed(NAME, "models", models),
            criterion,
            listed(NAME, "optimizers", optimizers),
        )
        _check_lists(*self._parts)
        self._set_unread()
        self._read()

    def _set_unread(self) -> None:
        count = len(self._parts[0])
        self._trainers: Any = _Unread(count)
        self._of_each: list[Any] = [None] * count  # a Trainer each
        self._looks: list[Look] = [{}] * count

    def _read(self) -> None:
        """Reads the networks that have changed, or were not read yet."""
        models, criterion, optimizers = self._parts
        for i in self._trainers.stale():
            try:
                found = read(models[i], criterion, optimizers[i])
            except CAUGHT as error:
                raise of_network(NAME, error, i) from None
            self._of_each[i] = found.trainer
            self._looks[i] = look(found.reading, optimizers[i])
        check_alike(NAME, self._looks)
        _check_shared(models)
        self._trainers = _C.Trainers(self._of_each)
        if self._trainers.stale():
            what = "a model, the criterion or an optimizer changed while being read"
            raise RuntimeError(f"{NAME}: {what}")

    def __repr__(self) -> str:
        models, criterion, optimizers = self._parts
        texts = model_text(models[0]), criterion_text(criterion), optimizer_text(optimizers)
        return f"{NAME}({len(models)} x {', '.join(texts)})"

    def __getstate__(self) -> dict[str, Any]:
        return {"_parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Read later: a model that holds its own TrainSteps may not be complete yet.
        self.__dict__.update(state)
        self._set_unread()

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        """Runs one step of each of the E networks.

        Args:
            input (Tensor): a batch for all networks, or one for each, of the dtype and device of
                the Parameters.
            target (Tensor): its targets, of the same dtype and device, or classes of int64 or
                uint8. For all networks or for each, whichever the input is.

        Shape:
            - input: `(M, K)` or `(E, M, K)`, or what the models' `nn.Flatten` makes these.
            - target: `(M, N)` or `(E, M, N)`; or classes `(M)` or `(E, M)` from 0 to N - 1.
            - Output: `(E)`.

        Returns:
            Tensor: the detached loss of each network before its update, as of `TrainStep`.

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: as `TrainStep`, before anything has
                changed; or the models or optimizers are no longer alike.
            RuntimeError: with `nn.BCELoss`, values of some networks are not in [0, 1]. These have
                not changed, the others have made their step. The message names the first.

        Examples:
            >>> models = [nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in "ab"]
            >>> optimizers = [torch.optim.Adam(model.parameters()) for model in models]
            >>> steps = mlp_ext.TrainSteps(models, nn.CrossEntropyLoss(), optimizers)
            >>> steps(torch.randn(64, 10), torch.randint(3, (64,))).shape
            torch.Size([2])
        """
        try:
            while (losses := self._trainers.step(input, target)) is None:
                self._read()
        except CAUGHT as error:
            self._explain(NAME, error, input, target)
            raise
        found: Tensor = losses
        return found

    def fit(
        self,
        input: Tensor,
        target: Tensor | None = None,
        epochs: int = 50,
        batch_size: int | None = None,
        shuffle: bool = False,
        generators: Sequence[torch.Generator] | None = None,
        rows: Sequence[Any] | None = None,
        progress: bool = False,
        **unsupported: Any,
    ) -> Tensor:
        """Trains all networks for a number of epochs, without Python between the steps.

        Each network trains as by its own

            TrainStep(model, criterion, optimizer).fit(
                input[rows], target[rows], epochs, batch_size, shuffle, generator
            )

        Ctrl-C raises KeyboardInterrupt within about 50 ms, or one step of 16 networks per thread.
        After it or any other error all completed steps remain in effect, and some networks may have
        completed more of them than others.

        Args:
            input (Tensor): all rows, as in a call of the steps.
            target (Tensor): the target of each row, as in a call of the steps.
            epochs (int): number of passes over the rows. Default: 50.
            batch_size (int, optional): rows per step; the last batch may be smaller. None takes all
                rows of a network.
            shuffle (bool): whether to shuffle the rows in each epoch. Default: False.
            generators (sequence of torch.Generator, optional): E random generators for `shuffle`,
                on the CPU: the batches of each network are those that it would see alone with its
                own. None uses PyTorch's default generator, which draws one permutation per epoch
                for all networks, or for all that have the same number of rows.
            rows (sequence, optional): E tensors, arrays or lists of integers, the indices of the
                rows that each network trains on, such as the folds of a cross-validation or
                bootstrap samples. Their lengths may differ. None takes all rows.
            progress (bool): whether to show a progress bar with the lowest loss of all networks, in
                a terminal or notebook, with tqdm if installed. Default: False.
            **unsupported: `validation` and the others that only `TrainStep.fit` has. Loaders too
                are not supported.

        Shape:
            - input: `(n, K)` or `(E, n, K)`.
            - target: `(n, N)` or `(E, n, N)`; or classes `(n)` or `(E, n)`.
            - rows: `(n_e)` for each network.
            - Output: `(epochs, E)`.

        Returns:
            Tensor: the loss of each epoch and network, on the CPU, as of `TrainStep.fit`.

        Raises:
            TypeError, ValueError, IndexError: an argument is of another type or out of range, or is
                not supported.
            RuntimeError: as in a call of the steps. Where values of some networks are not in [0, 1]
                with `nn.BCELoss`, these stop before that step, and the others are trained to the
                end.

        Examples:
            >>> models = [nn.Sequential(nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in "ab"]
            >>> optimizers = [torch.optim.Adam(model.parameters()) for model in models]
            >>> steps = mlp_ext.TrainSteps(models, nn.MSELoss(), optimizers)
            >>> x, y = torch.randn(300, 10), torch.rand(300, 1)
            >>> halves = torch.arange(300).chunk(2)
            >>> losses = steps.fit(x, y, epochs=20, batch_size=32, shuffle=True, rows=halves)
            >>> losses.shape
            torch.Size([20, 2])
        """
        check_options(FIT, self.fit, TrainStep.fit, unsupported)
        count = len(self._parts[0])
        if target is None and not isinstance(input, Tensor):
            what = f"pass tensors of all rows, input and target, not a loader, got {kind(input)}"
            raise TypeError(f"{FIT}: {what}; or {ALONE}")
        check_tensor(FIT, "input", input)
        check_tensor(FIT, "target", target)
        if not isinstance(shuffle, bool):
            raise TypeError(f"{FIT}: shuffle must be True or False, got {kind(shuffle)}")
        generators = _check_generators(generators, count)
        epochs = positive(FIT, "epochs", epochs)
        batch_size = 2**62 if batch_size is None else positive(FIT, "batch_size", batch_size)
        try:
            reading = read_model(self._parts[0][0])
        except CAUGHT as error:
            raise of_network(NAME, error, 0) from None
        n = self._flattened(FIT, input, reading).shape[-2]
        if not n:
            raise ValueError(f"{FIT}: input has no rows")
        rows = _check_rows(rows, count, n)
        with progress_bar(epochs) if progress else nullcontext() as after_epoch:
            options = (epochs, batch_size, shuffle, generators, rows, after_epoch)
            try:
                while (losses := self._trainers.fit(input, target, *options)) is None:
                    self._read()
            except CAUGHT as error:
                self._explain(FIT, error, input, target)
                raise
        found: Tensor = losses.to(torch.promote_types(input.dtype, torch.float32))
        return found

    def _flattened(self, name: str, input: Tensor, reading: Reading) -> Tensor:
        K = reading.layers[0].parameters[0].shape[-1]
        return flattened(name, input, K, reading.flattened, len(self._parts[0]))

    def _explain(self, name: str, error: Exception, input: Any, target: Any) -> None:
        """Raises `error` in terms of the arguments; returns if it already is."""
        check_tensor(name, "input", input)
        check_tensor(name, "target", target)
        message = str(error)
        if message.startswith(f"{NAME}: "):
            return
        models, criterion, optimizers = self._parts
        for i, trainer in enumerate(self._of_each):
            try:
                trainer.check_optimizer()
            except CAUGHT as error_of_one:
                raise of_network(name, error_of_one, i) from None
        readings = [*map(read_model, models)]
        check_alike(name, [*map(look, readings, optimizers)])  # after model.to()
        first, last = (readings[0].layers[index].parameters[0] for index in (0, -1))
        loss = LOSSES[type(criterion_module(criterion, Reading()))]
        x = self._flattened(name, input, readings[0])
        check_input(name, x, first)
        x = x[0] if x.dim() == 3 else x
        own = target.dim() > _target_dims(loss.name, target) and len(target) == len(models)
        try:
            y = target[0] if own else target
            check_target(name, loss.name, x, y, last, loss.promotes)
        except RuntimeError as wrong:
            advice = f", or [E={len(models)}, ...] for each its own" * ("must be [" in str(wrong))
            raise RuntimeError(f"{wrong}{advice}") from None
        if "an optimizer state must be" in message and "to match" in message:  # after model.to()
            message += "; call optimizer.load_state_dict(optimizer.state_dict()) of each optimizer"
        if message.startswith("TrainStep: "):
            raise type(error)(message.replace("TrainStep", name, 1)) from None
        rename(type(error)(message), name)


class _Unread:
    """In place of Trainers, so that the first call reads all networks."""

    def __init__(self, count: int) -> None:
        self._count = count

    def stale(self) -> Iterable[int]:
        return range(self._count)

    def step(self, input: Tensor, target: Tensor) -> None:
        return None

    def fit(self, *arguments: Any) -> None:
        return None


def _check_lists(models: list[Any], criterion: Any, optimizers: list[Any]) -> None:
    if len(models) != len(optimizers):
        what = f"{len(models)} models and {len(optimizers)} optimizers"
        raise ValueError(f"{NAME}: got {what}; pass one optimizer for each model")
    check_distinct(NAME, "models", models)
    check_distinct(NAME, "optimizers", optimizers)
    for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        if type(model) is DistributedDataParallel:
            what = f"models[{i}] is a DistributedDataParallel, which would average gradients"
            raise TypeError(f"{NAME}: {what}; use TrainStep, or pass its .module")
        if type(optimizer) is not type(optimizers[0]):
            types = f"a {type_name(optimizer)}, optimizers[0] a {type_name(optimizers[0])}"
            raise TypeError(f"{NAME}: optimizers[{i}] is {types}; {GROUPS}")


def _check_shared(models: list[nn.Module]) -> None:
    owners: dict[int, int] = {}
    for i, model in enumerate(models):
        for path, p in model.named_parameters():
            if (other := owners.setdefault(id(p), i)) != i:
                what = f"models[{i}] shares its {path} with models[{other}]"
                raise ValueError(f"{NAME}: {what}; give it its own, as by copy.deepcopy")


def _target_dims(loss: str, target: Tensor) -> int:
    """The dimensions of a target for all networks."""
    is_probabilities = loss == "cross_entropy" and target.is_floating_point()
    return 1 if loss in ("nll", "cross_entropy") and not is_probabilities else 2


def _one_for_each(argument: str, given: Any, count: int) -> list[Any]:
    """The list; an empty one for None."""
    if given is None:
        return []
    if isinstance(given, (str, torch.Generator)) or not isinstance(given, Iterable):
        what = f"{argument} must be a list, one for each network, or None"
        raise TypeError(f"{FIT}: {what}, got {kind(given)}")
    found = [*given]
    if len(found) != count:
        raise ValueError(f"{FIT}: {argument} must be {count}, one for each, got {len(found)}")
    return found


def _check_generators(generators: Any, count: int) -> list[torch.Generator]:
    found = _one_for_each("generators", generators, count)
    for i, generator in enumerate(found):
        if not isinstance(generator, torch.Generator):
            what = f"generators[{i}] must be a torch.Generator, got {kind(generator)}"
            raise TypeError(f"{FIT}: {what}")
        if generator.device.type != "cpu":
            what = f"generators[{i}] must be on the cpu, as for torch.randperm"
            raise ValueError(f"{FIT}: {what}, got {generator.device}")
    check_distinct(FIT, "generators", found)
    return found


def _check_rows(rows: Any, count: int, n: int) -> list[Tensor]:
    """Indices of n rows, for each network."""
    found = _one_for_each("rows", rows, count)
    for i, given in enumerate(found):
        try:
            each = torch.as_tensor(given, device="cpu").to_dense()
        except (TypeError, ValueError, RuntimeError):
            what = f"rows[{i}] must be a tensor, array or list of integers, got {kind(given)}"
            raise TypeError(f"{FIT}: {what}") from None
        if each.dim() != 1 or not len(each):
            what = f"rows[{i}] must be [n] with at least one row, got {list(each.shape)}"
            raise ValueError(f"{FIT}: {what}")
        if each.dtype == torch.bool or each.is_floating_point() or each.is_complex():
            advice = f"; pass torch.as_tensor(rows[{i}]).nonzero().squeeze(1)"
            what = f"rows[{i}] must be integers, got {each.dtype}"
            raise TypeError(f"{FIT}: {what}{advice if each.dtype == torch.bool else ''}")
        found[i] = each = each.long().contiguous()
        if not 0 <= int(each.min()) <= int(each.max()) < n:
            what = (
                f"rows[{i}] must be from 0 to {n - 1}, got {int(each.min())} to {int(each.max())}"
            )
            raise IndexError(f"{FIT}: {what}")
    return found
