"""accelerate: prepare, accumulate, clip, unwrap, save; and its optimizer in a step."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from clients import NATIVE, Body, classes, close, levels, net, parameters, rows
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mlp_ext


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(rows(40), classes(40)), batch_size=10)


def trained(
    level: str, accumulate: int, precision: str
) -> tuple[accelerate.Accelerator, nn.Module]:
    accelerate.state.AcceleratorState._reset_state(True)  # one for each process
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate
    )
    model = Body(net(level))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    model, optimizer, batches, scheduler = accelerator.prepare(
        model, optimizer, loader(), scheduler
    )
    for _ in range(2):
        for x, y in batches:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return accelerator, accelerator.unwrap_model(model)


@levels
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training(level: str, accumulate: int, precision: str) -> None:
    (_, native), (_, fused) = (trained(kind, accumulate, precision) for kind in (NATIVE, level))
    tolerance = 2e-2 if precision == "bf16" else 1e-4
    close(parameters(fused), parameters(native), rtol=tolerance, atol=tolerance / 10)
    assert type(fused) is Body


@levels
def test_saved_model_is_loaded_natively(level: str, tmp_path: Path) -> None:
    accelerator, model = trained(level, 1, "no")
    accelerator.save_model(model, tmp_path)
    native = Body(net())
    accelerate.load_checkpoint_in_model(native, str(tmp_path))
    close(native(rows()), model(rows()))


@levels
def test_empty_weights_and_dispatch(level: str, tmp_path: Path) -> None:
    accelerate.Accelerator(cpu=True).save_model(Body(net()), tmp_path)
    with accelerate.init_empty_weights():
        model = Body(net(level))
    model = accelerate.load_checkpoint_and_dispatch(model, str(tmp_path), device_map={"": "cpu"})
    close(model(rows()), net()(rows()))


@levels
def test_offloaded_layers(level: str) -> None:
    """Hooks bring the weights of each layer when it is called."""
    model = Body(net(level)).eval()
    expected = net()(rows())
    model(rows())
    accelerate.cpu_offload(model, torch.device("cpu"))
    close(model(rows()), expected)
    mlp_ext.unfuse(model)
    close(model(rows()), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    close(model(rows()), expected)


def test_step_with_a_prepared_optimizer() -> None:
    """A step takes the optimizer out of accelerate's wrapper, or names the wrapper."""
    models = net(), net()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    prepared = accelerator.prepare(optimizers[1])
    try:
        step = mlp_ext.TrainStep(models[1], nn.CrossEntropyLoss(), prepared)
    except (TypeError, ValueError) as error:
        assert "AcceleratedOptimizer" in str(error)
        return
    for _ in range(3):
        optimizers[0].zero_grad()
        nn.functional.cross_entropy(models[0](rows()), classes()).backward()
        optimizers[0].step()
        step(rows(), classes())
    close(parameters(models[1]), parameters(models[0]), rtol=1e-4, atol=1e-5)
