"""transformers: small models with random weights, whose feed-forward blocks are code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from clients import NATIVE, at, close, levels
from torch import Tensor, nn

import mlp_ext

SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(**SMALL, intermediate_size=32, hidden_act="relu")
    ),
    "opt": lambda: transformers.OPTModel(
        transformers.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16)
    ),
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=30, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8)
    ),
    "llama": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(**SMALL, intermediate_size=32)
    ),
}


def results(model: nn.Module, training: bool) -> dict[str, Any]:
    model.train(training)
    model.zero_grad()
    torch.manual_seed(2)
    output: Tensor = model(input_ids=torch.arange(12).view(2, 6)).last_hidden_state
    output.square().sum().backward()
    return {"output": output, **{name: p.grad for name, p in model.named_parameters()}}


@levels
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:fuse changed nothing")
def test_model(level: str, name: str, tmp_path: Any) -> None:
    models = []
    for kind in (NATIVE, level):
        torch.manual_seed(0)
        models.append(at(kind, MODELS[name]()))
    native, fused = models
    assert type(fused).__name__ == type(native).__name__
    assert [*fused.state_dict()] == [*native.state_dict()]
    for training in (True, False):
        close(results(fused, training), results(native, training), rtol=1e-4, atol=1e-5)
    fused.save_pretrained(tmp_path)
    loaded = type(native).from_pretrained(tmp_path)
    close(results(loaded, False), results(native, False), rtol=1e-4, atol=1e-5)


@levels
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer(level: str, tmp_path: Any) -> None:
    data = [{"input_ids": torch.arange(6) + i, "labels": torch.tensor(i % 2)} for i in range(8)]
    trained = []
    for kind in (NATIVE, level):
        torch.manual_seed(0)
        config = transformers.BertConfig(**SMALL, intermediate_size=32, hidden_act="relu")
        model = transformers.BertForSequenceClassification(config)
        model.classifier = at(kind, nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)))
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        transformers.Trainer(model, arguments, train_dataset=data).train()
        trained.append({name: p.detach() for name, p in model.named_parameters()})
    close(trained[1], trained[0], rtol=1e-4, atol=1e-5)
    assert [site for site in mlp_ext.fusion_report(model, level) if site.status == "fused"]
