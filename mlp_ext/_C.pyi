from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

def activations() -> dict[str, dict[str, float]]: ...
def losses() -> dict[str, dict[str, float]]: ...
def optimizers() -> dict[str, dict[str, float]]: ...
def build_info() -> dict[str, Any]: ...
def cuda_plan(
    M: int,
    K: int,
    N: int,
    dtype: str,
    activation: str,
    arch: int,
    tf32: bool = ...,
    aligned: bool = ...,
    cutlass: bool = ...,
    shared: int = ...,
    path: str | None = ...,
) -> dict[str, str]: ...
def cuda_step_plan(
    widths: list[int], batch: int, dtype: str, arch: int, shared: int, many: bool = ...
) -> dict[str, str]: ...
def dot_mode(dtype: str) -> str: ...
def force_dot_mode(mode: str | None) -> None: ...
def force_cuda_path(path: str | None) -> None: ...
def instruction_set() -> str: ...
def parallel_for_threads() -> int: ...
def peak_flops(seconds: float, threads: int, dtype: str) -> float: ...
def plan(
    M: int,
    K: int,
    N: int,
    item_size: int,
    threads: int,
    mode: str = ...,
    library: bool = ...,
    update: bool = ...,
    machine: str | None = ...,
    forward: str | None = ...,
    backward: str | None = ...,
) -> dict[str, Any]: ...
def step_plan(
    widths: list[int],
    batch: int,
    item_size: int,
    threads: int,
    mode: str = ...,
    machine: str | None = ...,
) -> dict[str, Any]: ...
def many_plan(
    widths: list[int], batch: int, item_size: int, mode: str = ..., machine: str | None = ...
) -> str: ...
def machines() -> list[str]: ...
def machine(name: str | None = ...) -> dict[str, Any]: ...
def use_machine(limits: dict[str, Any] | None) -> None: ...
def force_paths(forward: str | None, backward: str | None) -> None: ...
def cached_bytes() -> int: ...
def scratch_bytes() -> int: ...
def empty_cache() -> None: ...

class Guards:
    # A container is a dict, a list, or an object (or a weakref of it) and the name of a dict among
    # its attributes, or None for all attributes.
    def __init__(
        self,
        items: Iterable[tuple[Any, Any, object]] = ...,
        sizes: Iterable[tuple[Any, int]] = ...,
        types: Iterable[tuple[object, type]] = ...,
        tensors: Iterable[tuple[Any, Any]] = ...,
        class_items: Iterable[tuple[object, str, object]] = ...,
    ) -> None: ...
    def holds(self) -> bool: ...

class MlpCall:
    def __init__(
        self,
        layers: Sequence[ReferenceType[nn.Module]],
        activations: Sequence[str],
        parameters: Sequence[float],
        function: Callable[[Any, Any, Any], Any],
    ) -> None: ...
    @property
    def weights(self) -> list[Tensor]: ...
    def __call__(self, input: Any) -> Any: ...

_Graph = Callable[[Callable[[Tensor, Tensor], Tensor], bytes, Tensor, Tensor], Tensor]

class Gradients:
    def __init__(self, max_norm: float | None, accumulate: int) -> None: ...

class Trainer:
    def __init__(
        self,
        parameters: Sequence[Tensor],
        groups: Sequence[int],
        activations: Sequence[str],
        activation_parameters: Sequence[float],
        dropout: Sequence[float],
        flattened: Sequence[tuple[int, int]],
        loss: str,
        reduction: str,
        loss_weight: Tensor | None,
        loss_parameters: Sequence[float],
        promotes: bool,
        optimizer: torch.optim.Optimizer,
        optimizer_name: str,
        optimizer_defaults: dict[str, float],
        guards: Guards,
        gradients: Gradients,
        average: Callable[[Tensor], None] | None,
    ) -> None: ...
    def is_current(self) -> bool: ...
    def by_gradients(self) -> bool: ...
    def check_optimizer(self) -> None: ...
    def step(self, input: Tensor, target: Tensor, graph: _Graph | None = ...) -> Tensor | None: ...
    def fit(
        self,
        input: Tensor,
        target: Tensor,
        epochs: int,
        batch_size: int,
        shuffle: bool,
        generator: torch.Generator | None,
        after_epoch: Callable[[int, float], None] | None,
        graph: _Graph | None = ...,
        at_once: bool = ...,
    ) -> list[float] | None: ...

class Trainers:
    def __init__(self, trainers: Sequence[Trainer]) -> None: ...
    def stale(self) -> list[int]: ...
    def step(self, input: Tensor, target: Tensor) -> Tensor | None: ...
    def fit(
        self,
        input: Tensor,
        target: Tensor,
        epochs: int,
        batch_size: int,
        shuffle: bool,
        generators: Sequence[torch.Generator],
        rows: Sequence[Tensor],
        after_epoch: Callable[[int, float], None] | None,
    ) -> Tensor | None: ...
