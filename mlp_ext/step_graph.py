"""A training step as a CUDA graph: its many kernels in one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlp_ext import _C

Step = Callable[[Tensor, Tensor], Tensor]  # input [M, K], target [M, ...] -> loss []

WARM_UPS = 3  # as torch's notes on CUDA graphs ask
KEPT = 4  # graphs, such as those of a full batch and of the last, short one; each keeps its memory
# Bytes of input and target that a graph copies, at most. A step on more takes a GPU longer than the
# host needs to launch it; on an H100 copying 33 MB took 22 of its 500 us.
COPIED = 8 << 20
DECIDED = 1024  # numbers of rows whose way is kept


def capture(step: Step, input: Tensor, target: Tensor) -> Step:
    """The same step as a graph, on copies of its arguments. Nothing is computed yet."""
    inputs, targets = input.clone(), target.clone()
    graph = torch.cuda.CUDAGraph()
    # Thread-local: other threads, such as a DataLoader's that pins memory, may use CUDA meanwhile.
    mode = "thread_local"
    with torch.cuda.device(input.device), torch.cuda.graph(graph, capture_error_mode=mode):
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
        try:
            with torch.cuda.stream(side):
                loss = step(input, target)
        finally:
            here.wait_stream(side)  # also for the parameters, where the step is interrupted
        loss.record_stream(here)  # whose memory is the side stream's, to take back only after this
        return loss


class Graphs:
    """graphs(step, key, input, target) does step(input, target), from the fifth call with the same
    key on by replaying a graph of it.

    step: does a whole training step on the current stream, with no wait for the GPU, and updates
        parameters in place.
    key: what a graph of it depends on beside the shapes and dtypes of its arguments, such as the
        hyperparameters, which are constants of the captured kernels, and whose memory it updates.
        Where this changes at every call, as with a scheduler that does a step for each batch, no
        graph is made.

    If a capture fails, this warns once, and all steps from then on run without graphs.
    """

    def __init__(
        self,
        capture: Callable[[Step, Tensor, Tensor], Step] = capture,
        warm_up: Callable[[Step, Tensor, Tensor], Tensor] = warm_up,
    ) -> None:
        self._capture, self._warm_up = capture, warm_up
        self._failed = False
        self._calls: dict[Hashable, int] = {}  # of each key, the oldest first
        self.kept: dict[Hashable, Step] = {}
        self._lock = Lock()  # a graph has one input: threads take turns

    def __call__(self, step: Step, key: Hashable, input: Tensor, target: Tensor) -> Tensor:
        with self._lock:
            return self._run(step, (_layout(input), _layout(target), key), input, target)

    def _run(self, step: Step, key: Hashable, input: Tensor, target: Tensor) -> Tensor:
        if graph := self.kept.get(key):
            return graph(input, target)
        if self._failed:
            return step(input, target)
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
        try:
            graph = self.kept[key] = self._capture(step, input, target)
        except RuntimeError as error:  # nothing was computed
            self._failed = True
            what = "a step could not be captured as a CUDA graph, so steps run without graphs"
            warnings.warn(f"TrainStep: {what}: {error}", UserWarning, stacklevel=2)
            return step(input, target)
        return graph(input, target)


class _Way(NamedTuple):
    """How steps run on a GPU."""

    one_launch: bool
    by_graph: bool


class GraphTrainer:
    """A Trainer whose steps go through graphs where they are many launches and a copy is cheap."""

    def __init__(self, trainer: _C.Trainer, widths: list[int]) -> None:
        self._trainer, self._widths = trainer, widths
        self._ways: dict[tuple[int, torch.dtype, torch.device, bool], _Way] = {}
        self.graphs = Graphs()

    def step(self, input: Tensor, target: Tensor) -> Tensor | None:
        way = self._way(input, target)
        return self._trainer.step(input, target, self._graphs_for(way))

    def fit(
        self, input: Tensor, target: Tensor, epochs: int, batch_size: int, *options: Any
    ) -> list[float] | None:
        way = self._way(input, target, batch_size)
        settings = (epochs, batch_size, *options, self._graphs_for(way), way.one_launch)
        return self._trainer.fit(input, target, *settings)

    def _graphs_for(self, way: _Way) -> Graphs | None:
        capturing = way.by_graph and torch.cuda.is_current_stream_capturing()
        return self.graphs if way.by_graph and not capturing else None

    def _way(self, input: Tensor, target: Tensor, batch_size: int | None = None) -> _Way:
        """How steps of batch_size rows, or of all, run. Decided once for each number of rows."""
        if not (_is_dense_on_gpu(input) and _is_dense_on_gpu(target)):
            return _Way(one_launch=False, by_graph=False)
        size = len(input) if batch_size is None else min(batch_size, len(input))
        rows_of_one = input.numel() // max(1, len(input) * self._widths[0])
        rows, autocast = size * rows_of_one, torch.is_autocast_enabled("cuda")
        key = rows, input.dtype, input.device, autocast
        if way := self._ways.get(key):
            return way
        if len(self._ways) == DECIDED:
            self._ways.clear()
        copied = (input.nbytes + target.nbytes) * size // max(1, len(input))
        one_launch = not autocast and _is_one_launch(self._widths, *key[:3])
        way = self._ways[key] = _Way(one_launch, not one_launch and copied <= COPIED)
        return way


def graphed(trainer: _C.Trainer, widths: list[int] | None) -> _C.Trainer | GraphTrainer:
    """The trainer, on a GPU by graphs where that pays; widths: see read."""
    if torch.version.cuda is None or widths is None:
        return trainer
    return GraphTrainer(trainer, widths)


def _is_dense_on_gpu(t: object) -> bool:
    return isinstance(t, Tensor) and t.is_cuda and t.layout is torch.strided and t.dim() > 0


def _is_one_launch(widths: list[int], rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    here: Any = torch.cuda.get_device_properties(device)
    name = str(dtype).removeprefix("torch.")
    arch = 10 * here.major + here.minor
    shared = here.shared_memory_per_block_optin
    return _C.cuda_step_plan(widths, rows, name, arch, shared)["path"] == "one_block"


def _layout(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device
