"""What two processes of torchrun check together for test_distributed.py.

Each check trains with both processes what `expected` trains in one, in float64. Process 0 writes
{check: error of a process, or ""} to results.json.
"""

import json
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode

from mlp_ext import LinearReLU, LinearSigmoid, TrainStep, fuse
from mlp_ext.bench.training import Step, make_mlp, sgd_step

Make = Callable[[], nn.Module]
Change = Callable[[nn.Module], nn.Module]

CHANGES: dict[str, Change] = {
    "native": lambda model: model,
    "layers": lambda model: fuse(model, level="layers"),
    "stack": lambda model: fuse(model, level="stack"),
}
HALF = 2  # steps before and after a checkpoint
STEPS = 2 * HALF


def network() -> nn.Sequential:
    """Two blocks, as bigger models have them."""
    first, second = make_mlp([10, 6, 8], 1, last=nn.ReLU), make_mlp([8, 6, 2], 2)
    return nn.Sequential(first, nn.LayerNorm(8), second).double()


def mlp() -> nn.Sequential:
    return make_mlp([10, 6, 2]).double()


def written() -> nn.Sequential:
    """mlp(), written with layers of mlp_ext."""
    model = nn.Sequential(LinearReLU(10, 6), LinearSigmoid(6, 2)).double()
    for layer, linear in zip(model, mlp()[::2], strict=True):
        layer.load_state_dict(linear.state_dict())
    return model


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 10, generator=generator, dtype=torch.float64)
    return x, torch.rand(12, 2, generator=generator, dtype=torch.float64)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def eager(model: nn.Module) -> Step:
    return sgd_step(model, nn.MSELoss(), adam(model))


def losses(step: Step, steps: int = STEPS) -> list[float]:
    """Of steps on all rows."""
    return [step(*data()).item() for _ in range(steps)]


def shared_losses(step: Step, steps: int = STEPS) -> list[float]:
    """Of steps in which each process takes its half of the rows."""
    x, y = (t.chunk(2)[dist.get_rank()] for t in data())
    mine = torch.stack([step(x, y) for _ in range(steps)])
    dist.all_reduce(mine)
    return (mine / 2).tolist()


def expected(make: Make = network) -> list[float]:
    return losses(eager(make()))


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


def mesh() -> Any:
    return init_device_mesh("cpu", (2,))


def shard(model: nn.Module) -> nn.Module:
    """Each block is a unit, and so is the rest."""
    for child in model.children():
        fully_shard(child, mesh=mesh())
    fully_shard(model, mesh=mesh())
    return model


def shard_layers(model: nn.Module) -> nn.Module:
    """Each Linear is a unit too."""
    for module in [*model.modules()]:
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh())
    return shard(model)


class Operators(TorchDispatchMode):
    """Notes whether an operator of mlp_ext is called."""

    fused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused |= func.namespace == "mlp_ext"
        return func(*args, **(kwargs or {}))


def check_training(*changes: Change, fused: bool = True) -> None:
    """Changed in this order, it trains as in one process, and with fused operators if `fused`."""
    model: nn.Module = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fuse: that it found nothing
        for change in changes:
            model = change(model)
    assert_equal(shared_losses(eager(model)), expected())
    with Operators() as operators:
        model(data()[0])
    assert operators.fused or not fused, "not fused"


def check_step() -> None:
    model = DDP(mlp())
    step = TrainStep(model, nn.MSELoss(), adam(model))
    assert_equal(shared_losses(step), expected(mlp))


def check_tensor_parallel(make: Make, *names: str) -> None:
    """All rows in both processes; the first weight is cut by columns, the second by rows."""
    plan = dict(zip(names, (ColwiseParallel(), RowwiseParallel()), strict=True))
    model = parallelize_module(make(), mesh(), plan)
    shapes = [model.get_parameter(f"{name}.weight").to_local().shape for name in names]
    assert shapes == [(3, 10), (2, 3)]
    assert_equal(losses(eager(model)), expected(mlp))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def save_by_one(path: Path) -> None:
    model = network()
    optimizer = adam(model)
    losses(sgd_step(model, nn.MSELoss(), optimizer), HALF)
    dcp.save(state_of(model, optimizer), checkpoint_id=path, no_dist=True)


def save(path: Path, change: Change) -> None:
    model = shard(change(network()))
    optimizer = adam(model)
    shared_losses(sgd_step(model, nn.MSELoss(), optimizer), HALF)
    dcp.save(state_of(model, optimizer), checkpoint_id=path)


def load(path: Path, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Into the model and the optimizer returned."""
    optimizer = adam(model)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=path, **options)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return optimizer


def check_checkpoint(saved_by: str, loaded_by: str) -> None:
    """Training goes on as if nothing had been saved and loaded."""
    path = Path(saved_by)
    if saved_by in CHANGES:
        save(path, CHANGES[saved_by])
    elif dist.get_rank() == 0:
        save_by_one(path)
    dist.barrier()
    model = shard(CHANGES[loaded_by](network()))
    optimizer = load(path, model)
    rest = shared_losses(sgd_step(model, nn.MSELoss(), optimizer), HALF)
    assert_equal(rest, expected()[HALF:])


layers, stack = CHANGES["layers"], CHANGES["stack"]
CHECKS: dict[str, Callable[[], None]] = {
    "layers, then DDP": partial(check_training, layers, DDP),
    "stack, then DDP": partial(check_training, stack, DDP),
    "DDP, then layers": partial(check_training, DDP, layers),
    "DDP, then stack": partial(check_training, DDP, stack),
    "layers, then FSDP": partial(check_training, layers, shard),
    "stack, then FSDP": partial(check_training, stack, shard),
    "layers, then FSDP of each layer": partial(check_training, layers, shard_layers, fused=False),
    "stack, then FSDP of each layer": partial(check_training, stack, shard_layers, fused=False),
    "FSDP, then layers": partial(check_training, shard, layers, fused=False),
    "FSDP, then stack": partial(check_training, shard, stack, fused=False),
    "FSDP of each layer, then layers": partial(check_training, shard_layers, layers, fused=False),
    "FSDP of each layer, then stack": partial(check_training, shard_layers, stack, fused=False),
    "TrainStep of DDP": check_step,
    "tensor parallel native": partial(check_tensor_parallel, mlp, "0", "2"),
    "tensor parallel layers": partial(check_tensor_parallel, lambda: layers(mlp()), "0", "2"),
    "tensor parallel stack": partial(check_tensor_parallel, lambda: stack(mlp()), "0", "2"),
    "tensor parallel LinearReLU": partial(check_tensor_parallel, written, "0", "1"),
    "layers loads native's checkpoint": partial(check_checkpoint, "native", "layers"),
    "stack loads native's checkpoint": partial(check_checkpoint, "native", "stack"),
    "native loads layers' checkpoint": partial(check_checkpoint, "layers", "native"),
    "native loads stack's checkpoint": partial(check_checkpoint, "stack", "native"),
    "stack loads one process's checkpoint": partial(check_checkpoint, "one process", "stack"),
}


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            error = ""
        except Exception:
            error = traceback.format_exc()
        errors: list[Any] = [None, None]
        dist.all_gather_object(errors, error)
        results[name] = errors[0] or errors[1]
    if dist.get_rank() == 0:
        Path("results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
