from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

def activations() -> list[str]: ...
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
) -> dict[str, str]: ...
def instruction_set() -> str: ...
def parallel_for_threads() -> int: ...
def peak_flops(seconds: float, threads: int) -> float: ...
def plan(M: int, K: int, N: int, item_size: int, threads: int) -> dict[str, Any]: ...
def waiting_bytes() -> int: ...

class Stepper:
    def __init__(
        self,
        parameters: Sequence[Tensor],
        groups: Sequence[int],
        activations: Sequence[str],
        loss: str,
        reduction: str,
        loss_weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        optimizer: torch.optim.Optimizer,
        watched: Sequence[tuple[dict[Any, Any] | list[Any], Any, object]],
        sizes: Sequence[tuple[dict[Any, Any] | list[Any], int]],
    ) -> None: ...
    def is_current(self) -> bool: ...
    def step(self, input: Tensor, target: Tensor) -> Tensor | None: ...
    def fit(
        self,
        input: Tensor,
        target: Tensor,
        epochs: int,
        batch_size: int,
        shuffle: bool,
        generator: torch.Generator | None,
        after_epoch: Callable[[int, float], None] | None,
    ) -> list[float] | None: ...
