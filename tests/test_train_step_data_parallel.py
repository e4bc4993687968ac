"""TrainStep of DistributedDataParallel: two processes on halves of a batch equal one on all."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from once import Once
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlp_ext import FitResult, TrainStep

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

ROWS, STEPS = 12, 8
SETTINGS: list[dict[str, Any]] = [{}, {"max_norm": 0.1}, {"accumulate": 3, "max_norm": 0.2}]


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    return [(torch.randn(ROWS, 8), torch.rand(ROWS, 4)) for _ in range(STEPS)]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return [t.detach().clone() for t in (*model.parameters(), *kept)]


def trained(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], **settings: Any
) -> list[Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step = TrainStep(model, nn.MSELoss(), optimizer, **settings)
    for x, y in batches:
        step(x, y)
    return state_of(model, optimizer)


def fitted(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    TrainStep(model, nn.MSELoss(), optimizer, accumulate=2).fit(x, y, 3, batch_size)
    return state_of(model, optimizer)


def stopped(model: nn.Module, part: slice) -> tuple[FitResult, list[Tensor]]:
    """On a part of the rows and of the validation rows."""
    (x, y), held_out = data()[0], data()[1]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    found = TrainStep(model, nn.MSELoss(), optimizer).fit(
        x[part],
        y[part],
        epochs=30,
        validation=(held_out[0][part], held_out[1][part]),
        metric=lambda output, target: -(output - target).abs().mean(),
        patience=3,
        scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
    )
    return found, state_of(model, optimizer)


def refusals() -> dict[str, str]:
    """What a step says where DDP does more than average."""
    found = {}

    def attempt(name: str, model: DistributedDataParallel) -> None:
        try:
            trained(model, data()[:1])
        except ValueError as error:
            found[name] = str(error)

    model = DistributedDataParallel(model_of(0))
    with model.no_sync():
        attempt("no_sync", model)
    model.register_comm_hook(None, lambda state, bucket: torch.futures.Future())
    attempt("hook", model)
    return found


def rank_runs(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    found: dict[str, Any] = {}
    for index, settings in enumerate(SETTINGS):
        model = DistributedDataParallel(model_of(rank))  # DDP gives all ranks those of rank 0
        found[f"step {index}"] = trained(model, [(x[mine], y[mine]) for x, y in data()], **settings)
    x, y = data()[0]
    found["fit"] = fitted(DistributedDataParallel(model_of(rank)), x[mine], y[mine], 2)
    result, state = stopped(DistributedDataParallel(model_of(rank)), mine)
    found["stopped"] = tuple(result), state
    found["refused"] = refusals()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(once: Once) -> list[dict[str, Any]]:
    folder = once("ranks", lambda folder: mp.spawn(rank_runs, (str(folder),), nprocs=2))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_two_processes_equal_one(ranks: list[dict[str, Any]], index: int) -> None:
    expected = trained(model_of(0), data(), **SETTINGS[index])
    for found in ranks:
        torch.testing.assert_close(found[f"step {index}"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*[found[f"step {index}"] for found in ranks], rtol=0, atol=0)


@pytest.mark.slow
def test_fit_of_two_processes_equals_one(ranks: list[dict[str, Any]]) -> None:
    """Batches of two rows on each of two ranks are batches of four."""
    x, y = data()[0]
    halves = torch.arange(ROWS).view(2, ROWS // 2).split(2, dim=1)
    order = torch.cat([half.flatten() for half in halves])
    expected = fitted(model_of(0), x[order], y[order], 4)
    for found in ranks:
        torch.testing.assert_close(found["fit"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_ranks_stop_where_one_process_does(ranks: list[dict[str, Any]]) -> None:
    expected, state = stopped(model_of(0), slice(None))
    assert 0 < expected.best_epoch < len(expected.losses) - 1 < 29
    for rank in ranks:
        found = FitResult(*rank["stopped"][0])
        assert found[3:] == expected[3:]
        torch.testing.assert_close(found[1:3], expected[1:3])
        torch.testing.assert_close(rank["stopped"][1], state, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_what_else_ddp_does_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        said = found["refused"]
        assert said["no_sync"].startswith("TrainStep: model is in no_sync(); use TrainStep(...")
        assert said["hook"].startswith("TrainStep: model has communication hooks; use the eager")


def test_fsdp_is_refused() -> None:
    class FSDPModule:
        """As the base that fully_shard gives a module."""

    class FSDPSequential(FSDPModule, nn.Sequential):
        pass

    model = FSDPSequential(nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        TypeError, match=r"^TrainStep: model is sharded by FSDP, .* use Distributed"
    ):
        TrainStep(model, nn.MSELoss(), optimizer)
