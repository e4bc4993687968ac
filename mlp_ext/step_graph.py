"""A training step as a CUDA graph: its many kernels in one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor

from mlp_ext import _C

Step = Callable[[Tensor, Tensor], Tensor]  # input [M, K], target [M, ...] -> loss []

WARM_UPS = 3  # as torch's notes on CUDA graphs ask
KEPT = 4  # graphs, such as those of a full batch and of the last, short one; each keeps its memory


def capture(step: Step, input: Tensor, target: Tensor) -> Step:
    """The same step as a graph, on copies of its arguments. Nothing is computed yet."""
    inputs, targets = input.clone(), target.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(input.device), torch.cuda.graph(graph):
        loss = step(inputs, targets)

    def replay(input: Tensor, target: Tensor) -> Tensor:
        inputs.copy_(input)
        targets.copy_(target)
        graph.replay()
        return loss.clone()  # the next replay writes to it

    return replay


def warm_up(step: Step, input: Tensor, target: Tensor) -> Tensor:
    """The step on a side stream, as it must have run before it is captured."""
    with torch.cuda.device(input.device):
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            loss = step(input, target)
        here.wait_stream(side)
        loss.record_stream(here)  # whose memory is the side stream's, to take back only after this
        return loss


class StepGraph:
    """step(input, target), from its fifth call with the same key on by replaying a graph.

    step: does a whole training step on the current stream, with no wait for the GPU, and updates
        parameters in place.
    key: what a graph of it depends on beside the shapes and dtypes of its arguments, such as the
        hyperparameters, which are constants of the captured kernels, and whose memory it updates.
        Where this changes at every call, as with a scheduler that does a step for each batch, no
        graph is made. None where this call must do the step itself, as the one that begins
        momentum.
    """

    def __init__(
        self,
        step: Step,
        key: Callable[[], Hashable],
        capture: Callable[[Step, Tensor, Tensor], Step] = capture,
        warm_up: Callable[[Step, Tensor, Tensor], Tensor] = warm_up,
    ) -> None:
        self._step, self._key = step, key
        self._capture, self._warm_up = capture, warm_up
        self._calls: dict[Hashable, int] = {}  # of each key, the oldest first
        self._graphs: dict[Hashable, Step] = {}
        self._lock = Lock()  # a graph has one input: threads take turns

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        with self._lock:
            return self._run(input, target)

    def _run(self, input: Tensor, target: Tensor) -> Tensor:
        own = self._key()
        if own is None:
            return self._step(input, target)
        key = (_layout(input), _layout(target), own)
        if graph := self._graphs.get(key):
            return graph(input, target)
        calls = self._calls[key] = self._calls.pop(key, 0) + 1
        if len(self._calls) > KEPT:
            del self._calls[next(iter(self._calls))]
        if calls == 1:
            return self._step(input, target)
        if calls <= 1 + WARM_UPS:
            return self._warm_up(self._step, input, target)
        del self._calls[key]
        if len(self._graphs) == KEPT:
            del self._graphs[next(iter(self._graphs))]
        graph = self._graphs[key] = self._capture(self._step, input, target)
        return graph(input, target)


def graphed(
    stepper: _C.Stepper, widths: list[int], optimizer: torch.optim.Optimizer
) -> Callable[[Tensor, Tensor], Tensor | None]:
    """stepper.step; on a GPU as graphs where it is many launches and nothing speaks against it."""
    if torch.version.cuda is None:
        return stepper.step
    graph = StepGraph(cast(Step, stepper.step), stepper.key)  # a stale one is not asked

    def step(input: Tensor, target: Tensor) -> Tensor | None:
        if not (isinstance(input, Tensor) and isinstance(target, Tensor) and input.is_cuda):
            return stepper.step(input, target)
        settings = [v for group in optimizer.param_groups for v in group.values()]
        if (
            torch.cuda.is_current_stream_capturing()
            or any(isinstance(v, Tensor) and v.is_cuda for v in settings)  # read by waiting for it
            or not stepper.is_current()
            or _is_one_launch(widths, input)
        ):
            return stepper.step(input, target)
        stepper.check(input, target)
        return graph(input, target)

    return step


def _is_one_launch(widths: list[int], input: Tensor) -> bool:
    device: Any = torch.cuda.get_device_properties(input.device)
    dtype = str(input.dtype).removeprefix("torch.")
    arch = 10 * device.major + device.minor
    shared = device.shared_memory_per_block_optin
    return _C.cuda_step_plan(widths, len(input), dtype, arch, shared)["path"] == "one_block"


def _layout(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device
