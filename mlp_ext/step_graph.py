"""Training steps as CUDA graphs: many kernels in one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from mlp_ext import _C

Step = Callable[[Tensor, Tensor], Tensor]  # input [M, K], target [M, ...] -> loss []

WARM_UPS = 3  # as torch's notes on CUDA graphs recommend
KEPT = 4  # graphs, e.g. for full batches and for the last, smaller one; each keeps its memory
# Most bytes of input and target that a graph copies. With more data, a step takes longer on the GPU
# than the host needs to launch it, so a graph gains nothing.
COPIED = 8 << 20


def capture(step: Step, input: Tensor, target: Tensor) -> Step:
    """Captures the step as a graph on copies of its arguments. Computes nothing yet."""
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
    """Runs the step on a side stream, as needed before its capture."""
    with torch.cuda.device(input.device):
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side):
                loss = step(input, target)
        finally:
            here.wait_stream(side)  # also if the step is interrupted: parameters were updated
        loss.record_stream(here)  # its memory belongs to the side stream's pool
        return loss


class Graphs:
    """graphs(step, key, input, target) runs step(input, target); from the fifth call with the same
    key on, it replays a graph.

    step: a whole training step on the current stream, without synchronisation, that updates
        parameters in place.
    key: everything a graph depends on apart from the shapes and dtypes of its arguments, such as
        hyperparameters, which are constants in captured kernels, and addresses of parameters. If it
        changes at every call, as with a per-batch LR scheduler, no graph is captured.
    """

    def __init__(
        self,
        capture: Callable[[Step, Tensor, Tensor], Step] = capture,
        warm_up: Callable[[Step, Tensor, Tensor], Tensor] = warm_up,
    ) -> None:
        self._capture, self._warm_up = capture, warm_up
        self._calls: dict[Hashable, int] = {}  # per key, oldest first
        self.kept: dict[Hashable, Step] = {}
        self._lock = Lock()  # a graph has a single input buffer

    def __call__(self, step: Step, key: Hashable, input: Tensor, target: Tensor) -> Tensor:
        with self._lock:
            return self._run(step, (_layout(input), _layout(target), key), input, target)

    def _run(self, step: Step, key: Hashable, input: Tensor, target: Tensor) -> Tensor:
        if graph := self.kept.get(key):
            return graph(input, target)
        calls = self._calls[key] = self._calls.pop(key, 0) + 1
        if len(self._calls) > KEPT:
            del self._calls[next(iter(self._calls))]
        if calls == 1:
            return step(input, target)
        if calls <= 1 + WARM_UPS:
            return self._warm_up(step, input, target)
        del self._calls[key]
        if len(self.kept) == KEPT:
            del self.kept[next(iter(self.kept))]
        graph = self.kept[key] = self._capture(step, input, target)
        return graph(input, target)


class StepGraph:
    """Runs step(input, target) through Graphs, with key() as the key."""

    def __init__(self, step: Step, key: Callable[[], Hashable]) -> None:
        self._step, self._key, self._graphs = step, key, Graphs()

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        return self._graphs(self._step, self._key(), input, target)


class GraphTrainer:
    """A Trainer that uses graphs for steps of many launches whose inputs are cheap to copy."""

    def __init__(self, trainer: _C.Trainer, widths: list[int]) -> None:
        self._trainer, self._widths = trainer, widths
        self.graphs = Graphs()

    def step(self, input: Tensor, target: Tensor) -> Tensor | None:
        return self._trainer.step(input, target, self._graphs_for(input, target))

    def fit(
        self, input: Tensor, target: Tensor, epochs: int, batch_size: int, *options: Any
    ) -> list[float] | None:
        graphs = self._graphs_for(input, target, batch_size)
        at_once = _is_dense_on_gpu(input) and _is_one_launch(self._widths, input[:batch_size])
        settings = (epochs, batch_size, *options, graphs, at_once)
        return self._trainer.fit(input, target, *settings)

    def _graphs_for(self, input: Tensor, target: Tensor, rows: int | None = None) -> Graphs | None:
        """The graphs, if steps on `rows` rows (None: all) should use them, else None."""
        if not (_is_dense_on_gpu(input) and _is_dense_on_gpu(target)):
            return None
        input, target = input[:rows], target[:rows]
        pays = (
            input.nbytes + target.nbytes <= COPIED
            and not _is_one_launch(self._widths, input)
            and not torch.cuda.is_current_stream_capturing()
        )
        return self.graphs if pays else None


def graphed(trainer: _C.Trainer, widths: list[int]) -> _C.Trainer | GraphTrainer:
    """The trainer, with CUDA graphs if torch has CUDA."""
    return trainer if torch.version.cuda is None else GraphTrainer(trainer, widths)


def _is_dense_on_gpu(t: object) -> bool:
    return isinstance(t, Tensor) and t.is_cuda and t.layout is torch.strided and t.dim() > 0


def _is_one_launch(widths: list[int], input: Tensor) -> bool:
    device: Any = torch.cuda.get_device_properties(input.device)
    dtype = str(input.dtype).removeprefix("torch.")
    arch = 10 * device.major + device.minor
    shared = device.shared_memory_per_block_optin
    return _C.cuda_step_plan(widths, len(input), dtype, arch, shared)["path"] == "one_block"


def _layout(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device
