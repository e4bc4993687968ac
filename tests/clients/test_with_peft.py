"""peft: adapters wrap the Linear layers, also of a fused model."""

from typing import Any

import peft
import pytest
import torch
from clients import NATIVE, Body, classes, close, levels, net, parameters, rows
from torch import Tensor, nn

HIDDEN = ["body.0", "body.2"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=HIDDEN, init_lora_weights=False),
    "lora_and_a_saved_layer": lambda: peft.LoraConfig(
        r=2, target_modules=HIDDEN, modules_to_save=["body.4"], init_lora_weights=False
    ),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=HIDDEN, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=HIDDEN, feedforward_modules=["body.2"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["body.0"], init_weights=False),
}


def adapted(level: str, name: str) -> nn.Module:
    model = Body(net(level))
    model(rows())
    torch.manual_seed(5)
    return peft.get_peft_model(model, CONFIGS[name]())


@levels
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_train_and_merge(level: str, name: str) -> None:
    results: list[tuple[Tensor, dict[str, Tensor], Tensor, Tensor]] = []
    for kind in (NATIVE, level):
        model = adapted(kind, name)
        before = model(rows())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(rows()), classes()).backward()
            optimizer.step()
        trained = parameters(model)
        after = model.eval()(rows())
        results.append((before, trained, after, model.merge_and_unload()(rows())))
    close(results[1], results[0], rtol=1e-4, atol=1e-5)
    close(results[1][3], results[1][2], rtol=1e-4, atol=1e-5)


@levels
def test_disabled_and_unloaded_adapters_leave_the_model(level: str) -> None:
    model = adapted(level, "lora")
    with model.disable_adapter():
        close(model(rows()), net()(rows()))
    base = model.unload()
    close(base(rows()), net()(rows()))
    assert [type(child) for child in base.body] == [type(child) for child in net()]
