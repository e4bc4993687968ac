"""The batches of fit from a loader, or from tensors where Python runs between the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mlp_ext.errors import check_tensor, kind

Batch = tuple[Tensor, Tensor]
FIT = "TrainStep.fit"
KEPT = 256  # losses on the device before they are read


def is_pair(value: object) -> bool:
    """Whether this is (input, target) rather than a loader of such."""
    is_two = isinstance(value, (tuple, list)) and len(value) == 2
    return is_two and not any(isinstance(each, (tuple, list)) for each in value)  # type: ignore[attr-defined]


def check_rows(name: str, input: Any, target: Any) -> None:
    for argument, tensor in (("input", input), ("target", target)):
        check_tensor(name, argument, tensor)
        if tensor.dim() < (2 if argument == "input" else 1):
            shape = "[n, *, K]" if argument == "input" else "[n, ...]"
            raise ValueError(f"{name}: {argument} must be {shape}, got {list(tensor.shape)}")
    if len(input) != len(target):
        raise ValueError(f"{name}: input has {len(input)} rows, target {len(target)}")


def check_loader(argument: str, loader: Any, epochs: int) -> None:
    check = f"{FIT}: {argument}"
    if is_pair(loader):
        raise TypeError(f"{check} is a pair; pass input and target")
    if type(loader).__name__ in ("ndarray", "DataFrame"):
        check_tensor(FIT, argument, loader)
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(f"{check} is a Dataset; pass DataLoader({argument}, batch_size=...)")
    is_one_batch = isinstance(loader, (Tensor, str, dict))
    if is_one_batch or not (isinstance(loader, Iterable) or hasattr(loader, "__getitem__")):
        tensors = "a tensor" if argument == "input" else "a pair of tensors"
        what = f"must be {tensors} or a loader of (input, target)"
        raise TypeError(f"{check} {what}, got {kind(loader)}")
    if epochs > 1 and isinstance(loader, Iterator):
        what = f"is an iterator, which ends after one of {epochs} epochs"
        raise ValueError(f"{check} {what}; pass a list or a DataLoader")
    if isinstance(loader, (tuple, list)) and not loader:
        raise ValueError(f"{check} has no batches")


def check_unset(**options: Any) -> None:
    """Refuses options that are the loader's."""
    for option, value in options.items():
        if value:
            where = f"DataLoader(..., {option}=...)"
            raise ValueError(f"{FIT}: {option} is for tensors; with a loader, set it in {where}")


def check_no_loader(loader: Any, target: Any) -> None:
    if isinstance(loader, DataLoader) and target is not None:
        what = f"target must be None with a loader, got {kind(target)}"
        raise TypeError(f"{FIT}: {what}; options such as epochs= are keywords")


def of_loader(name: str, loader: Iterable[Any]) -> Iterator[Batch]:
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            is_sequence = isinstance(batch, (tuple, list))
            got = f"{len(batch)} values" if is_sequence else kind(batch)
            raise TypeError(f"{name}: each batch must be (input, target), got {got}")
        check_rows(name, *batch)
        yield batch[0], batch[1]


def of_tensors(
    input: Tensor,
    target: Tensor,
    batch_size: int,
    shuffle: bool,
    generator: torch.Generator | None,
) -> Iterator[Batch]:
    """Those of an epoch, as the Trainer makes them."""
    if not shuffle:
        yield from zip(input.split(batch_size), target.split(batch_size), strict=True)
        return
    order = torch.randperm(len(input), generator=generator, device="cpu").to(input.device)
    for rows in order.split(batch_size):
        yield input[rows], target[rows]


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the CPU are copied to a GPU while it does the step before: from pinned memory the
    host waits for neither."""
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    for batch in batches:
        if all(t.is_cuda for t in batch):
            yield batch
            continue
        here = torch.cuda.current_stream(device)
        with torch.cuda.stream(side):
            x, y = (t.to(device, non_blocking=True) for t in batch)
        here.wait_stream(side)
        for t in (x, y):
            t.record_stream(here)
        yield x, y


def train(step: Callable[[Tensor, Tensor], Tensor], batches: Iterator[Batch], mean: bool) -> float:
    """The loss of an epoch: the mean over its rows (NaN if there are none), or the sum."""
    total, rows, count = 0.0, 0, 0
    losses: list[Tensor] = []
    sizes: list[int] = []

    def read() -> float:
        found = torch.stack(losses).tolist() if losses else []
        weights = sizes if mean else repeat(1)
        return sum((a * b for a, b in zip(found, weights, strict=False)), total)

    for x, y in batches:
        losses.append(step(x, y))
        sizes.append(len(x))
        rows += len(x)
        count += 1
        if len(losses) == KEPT:
            total = read()
            losses.clear()
            sizes.clear()
    if not count:
        raise ValueError(f"{FIT}: input has no batches; each epoch iterates over it anew")
    total = read()
    return total / rows if mean and rows else torch.nan if mean else total
