"""Lightning: the Trainer, its checkpoints and callbacks, with a fused module."""

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from clients import NATIVE, classes, close, levels, net, parameters, rows
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import mlp_ext

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(lightning.LightningModule):
    def __init__(self, level: str = NATIVE, automatic: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net(level)
        self.automatic_optimization = automatic

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(rows(40), classes(40)), batch_size=10)


def trainer(folder: Path, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        **{"max_epochs": 3, "default_root_dir": folder, "accelerator": "cpu", **options},
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipping": {"gradient_clip_val": 0.1},
    "accumulation": {"accumulate_grad_batches": 2},
    "bfloat16": {"precision": "bf16-mixed"},
    "anomalies": {"detect_anomaly": True},
    "weight_averaging": {"callbacks": lambda: [WeightAveraging(avg_fn=get_ema_avg_fn(0.9))]},
    "swa": {"callbacks": lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1)]},
}


@levels
@pytest.mark.parametrize("name", OPTIONS)
def test_trainer(level: str, name: str, tmp_path: Path) -> None:
    trained = []
    for kind in (NATIVE, level):
        module = Module(kind)
        options = {k: v() if callable(v) else v for k, v in OPTIONS[name].items()}
        trainer(tmp_path, enable_checkpointing=False, **options).fit(module, loader())
        trained.append(parameters(module))
    tolerance = 2e-2 if name == "bfloat16" else 1e-4
    close(trained[1], trained[0], rtol=tolerance, atol=tolerance / 10)


@levels
def test_manual_optimization(level: str, tmp_path: Path) -> None:
    trained = []
    for kind in (NATIVE, level):
        module = Module(kind, automatic=False)
        trainer(tmp_path, enable_checkpointing=False).fit(module, loader())
        trained.append(parameters(module))
    close(trained[1], trained[0], rtol=1e-4, atol=1e-5)


@levels
def test_checkpoints_in_both_directions(level: str, tmp_path: Path) -> None:
    for first, second in ((NATIVE, level), (level, NATIVE)):
        checkpoint = ModelCheckpoint(tmp_path / first, save_last=True)
        module = Module(first)
        trainer(tmp_path, callbacks=[checkpoint], max_epochs=1).fit(module, loader())
        path = checkpoint.last_model_path
        loaded = Module.load_from_checkpoint(path, level=second, weights_only=False)
        close(loaded(rows()), module(rows()))
        resumed = Module(second)
        trainer(tmp_path, enable_checkpointing=False).fit(resumed, loader(), ckpt_path=path)
        whole = Module(NATIVE)
        trainer(tmp_path, enable_checkpointing=False).fit(whole, loader())
        close(parameters(resumed), parameters(whole), rtol=1e-4, atol=1e-5)


def test_step_with_the_trainers_optimizer(tmp_path: Path) -> None:
    """A step takes the optimizer out of Lightning's wrapper, or names the wrapper."""

    class Stepped(Module):
        def training_step(self, batch: list[Tensor], index: int) -> None:
            optimizer = self.optimizers()
            try:
                step = mlp_ext.TrainStep(self.net, nn.CrossEntropyLoss(), optimizer)
            except (TypeError, ValueError) as error:
                assert "LightningAdamW" in str(error)
                raise KeyboardInterrupt from None
            step(*batch)

    module, native = Stepped(automatic=False), Module()
    options = {"enable_checkpointing": False, "callbacks": [], "max_epochs": 2}
    try:
        trainer(tmp_path, **options).fit(module, loader())
    except (KeyboardInterrupt, SystemExit):
        return
    trainer(tmp_path, **options).fit(native, loader())
    close(parameters(module), parameters(native), rtol=1e-4, atol=1e-5)
