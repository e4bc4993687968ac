"""Training in several processes, started by torchrun. torch.distributed does the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlp_ext.commands.arguments import Fail

COMMAND = "torchrun --nproc_per_node 2 -m mlp_ext train --distributed"
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun

SLOWEST = timedelta(days=7)  # that the first process waits for the results of others


def _ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp(model: nn.Module) -> nn.Module:
    """The whole model is one unit: a layer with hooks of its own would not be fused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = "cuda" if next(model.parameters()).is_cuda else "cpu"
    fully_shard(model, mesh=init_device_mesh(kind, (dist.get_world_size(),)))
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": _ddp, "fsdp": _fsdp}


Found = TypeVar("Found")


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as one of them sees them."""

    rank: int = 0
    count: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model

    def part(self, batch: Tensor) -> Tensor:
        """The rows [M / count, ...] of this process in a batch [M, ...].

        DDP and FSDP average the gradients over the processes, which is right for equal parts only.
        So each process takes all rows of a batch that does not divide.
        """
        return batch if len(batch) % self.count else batch.chunk(self.count)[self.rank]

    def mean(self, loss: float) -> float:
        """The mean over the processes."""
        if self.count == 1:
            return loss
        losses: list[float] = [0.0] * self.count
        dist.all_gather_object(losses, loss)
        return sum(losses) / self.count

    def gather(self, results: list[Found]) -> list[Found]:
        """The results of all processes, in the first one; none in the others."""
        if self.count == 1:
            return results
        parts: list[list[Found]] | None = None if self.rank else [[] for _ in range(self.count)]
        dist.gather_object(results, parts)
        return [result for part in parts or [] for result in part]


ALONE = Processes()


@contextmanager
def joined(name: str | None, device: str, fail: Fail) -> Iterator[Processes]:
    """The processes of torchrun, joined in a process group while the body runs.

    name: in WRAPPERS, or None to train alone. device: "cpu" or "cuda", where each process of a
    machine has a GPU of its own, which becomes the current one.
    """
    if name is None:
        if dist.is_available() and dist.is_torchelastic_launched():
            fail(f"each process of torchrun would train alone; type: {COMMAND} ddp")
        yield ALONE
        return
    if not dist.is_available():
        fail("argument --distributed: this torch was built without torch.distributed")
    if missing := [variable for variable in LAUNCHED if variable not in os.environ]:
        what = f"the launcher has not set {', '.join(missing)}"
        fail(f"argument --distributed: {what}; type: {COMMAND} {name}")
    with _group(device, "nccl" if device == "cuda" else "gloo", "--distributed", fail) as found:
        yield replace(found, wrap=WRAPPERS[name])


@contextmanager
def sharing(device: str, fail: Fail) -> Iterator[Processes]:
    """The processes of torchrun, each with work of its own, or this process alone without it.

    device: as in `joined`. Results are objects on the CPU, so gloo gathers them.
    """
    if not dist.is_available() or any(name not in os.environ for name in LAUNCHED):
        yield ALONE
        return
    with _group(device, "gloo", "--device", fail, timeout=SLOWEST) as found:
        yield found


@contextmanager
def _group(
    device: str, backend: str, option: str, fail: Fail, timeout: timedelta | None = None
) -> Iterator[Processes]:
    """The processes of a launcher. Errors name `option`."""
    own = None
    if device == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if own.index >= torch.cuda.device_count():
            found = f"torch finds {torch.cuda.device_count()}"
            fail(f"argument {option}: process {own.index} needs a GPU of its own, {found}")
        torch.cuda.set_device(own)
    try:
        device_id = own if backend == "nccl" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    except (ValueError, RuntimeError) as error:
        fail(f"argument {option}: {str(error).splitlines()[0]}")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
