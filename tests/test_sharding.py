"""Tensor parallel and DTensor: two processes compute as native ones do, with the same traffic."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import mlp_ext

close = torch.testing.assert_close


def whole(tensor: Any) -> Tensor:
    result: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return result.detach()


def models(activation: type[nn.Module]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The network in PyTorch's modules, in layers and as a stack, each with its own parameters."""
    torch.manual_seed(0)
    widths = [(8, 16), (16, 12), (12, 4)]
    modules = [m for K, N in widths for m in (nn.Linear(K, N), activation())][:-1]
    plain = nn.Sequential(*modules)
    kind = mlp_ext.nn.LinearAct.by_module[activation]
    first, _, second, _, last = copy.deepcopy(modules)
    layers = nn.Sequential(kind.from_linear(first), nn.Identity(), kind.from_linear(second))
    layers.extend([nn.Identity(), last])  # the names of the parameters are those of the others
    return plain, layers, mlp_ext.Sequential(*copy.deepcopy(modules))


def results(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], list[Any]]:
    """Output, gradients, and the collectives of forward and backward."""
    from torch.distributed.tensor.debug import CommDebugMode

    x = x.detach().requires_grad_()
    with CommDebugMode() as traffic:
        y = model(x)
        y.square().sum().backward()
    found = {"y": y, "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    counts = sorted((str(op), count) for op, count in traffic.get_comm_counts().items())
    return {name: whole(t) for name, t in found.items()}, counts


def check_tensor_parallel(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plans: list[dict[str, Any]] = [
        {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel()},
        {"0": RowwiseParallel(input_layouts=Replicate()), "2": ColwiseParallel()},
    ]
    for plan in plans:
        last = max(plan)
        plan[last].output_layouts = (Replicate(),)
        for activation in (nn.ReLU, nn.GELU):
            x = torch.randn(3, 6, 8)
            expected, _ = results(models(activation)[0], x)
            networks = [
                parallelize_module(m, mesh, copy.deepcopy(plan)) for m in models(activation)
            ]
            (native, native_traffic), *others = (results(model, x) for model in networks)
            close(native, expected)
            for found, traffic in others:
                close(found, native)
                assert traffic == native_traffic


def check_batch(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    for activation in (nn.ReLU, nn.GELU):
        networks = models(activation)
        x = torch.randn(6, 8)
        expected, _ = results(models(activation)[0], x)
        for model in networks:
            distribute_module(model, mesh)
            found, _ = results(model, distribute_tensor(x, mesh, [Shard(0)]))
            close(found, expected)
        layer = networks[1][0]
        y = layer(distribute_tensor(x, mesh, [Shard(0)]))
        assert y.placements == (Shard(0),)
        assert y.grad_fn.name() == "LinearActBackward"


def check_operators(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, w, b = torch.randn(6, 8), torch.randn(4, 8), torch.randn(4)
    expected = mlp_ext.linear_act(x, w, b, "gelu")
    for placements in [
        (Shard(0), Replicate(), Replicate()),
        (Replicate(), Shard(0), Shard(0)),
        (Shard(1), Shard(1), Replicate()),
        (Shard(0), Shard(0), Replicate()),  # one of the two is gathered
    ]:
        sharded = [
            distribute_tensor(t, mesh, [p]) for t, p in zip((x, w, b), placements, strict=True)
        ]
        close(whole(mlp_ext.linear_act(*sharded, "gelu")), expected)
        x_, w_, b_ = sharded
        stack = torch.ops.mlp_ext.mlp(x_, [w_], [b_], ["gelu"])
        close(whole(stack), expected)


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for check in (check_tensor_parallel, check_batch, check_operators):
        torch.manual_seed(1)
        check(mesh)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_compute_as_native(tmp_path: Path) -> None:
    mp.spawn(process, args=(tmp_path,), nprocs=2)
