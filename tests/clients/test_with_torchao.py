"""torchao: converts weights, wraps layers for QAT, and quantizes exported graphs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchao
from clients import NATIVE, Body, classes, close, levels, net, rows
from torch import nn
from torchao.quantization import qat

WIDTHS = (32, 64, 64, 32)


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(rows(width=32)), classes()).backward()
        optimizer.step()
    return model


CONFIGS: dict[str, Callable[[], Any]] = {
    "int8_weight_only": torchao.quantization.Int8WeightOnlyConfig,
    "int8_dynamic": torchao.quantization.Int8DynamicActivationInt8WeightConfig,
    "float8_weight_only": torchao.quantization.Float8WeightOnlyConfig,
}


@levels
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ran_before", [False, True])
def test_post_training_quantization(level: str, name: str, ran_before: bool) -> None:
    models = [net(kind, WIDTHS).eval() for kind in (NATIVE, level)]
    for model in models:
        if ran_before:
            model(rows(width=32))
        torchao.quantize_(model, CONFIGS[name]())
    close(models[1](rows(width=32)), models[0](rows(width=32)))
    assert [type(child) for child in models[1]] == [type(child) for child in models[0]]
    weights = [
        [type(child.weight) for child in model if hasattr(child, "weight")] for model in models
    ]
    assert weights[1] == weights[0]
    copies = [copy.deepcopy(model)(rows(width=32)) for model in models]
    close(copies[1], copies[0])


@levels
@pytest.mark.parametrize("name", ["int8_weight_only", "int8_dynamic"])
def test_quantization_aware_training(level: str, name: str) -> None:
    weight = qat.IntxFakeQuantizeConfig(torch.int8, granularity="per_channel")
    outputs = []
    for kind in (NATIVE, level):
        model = net(kind, WIDTHS)
        model(rows(width=32))
        torchao.quantize_(model, qat.QATConfig(weight_config=weight, step="prepare"))
        trained(model)
        outputs.append(model(rows(width=32)))
        torchao.quantize_(model, qat.QATConfig(CONFIGS[name](), step="convert"))
        outputs.append(model.eval()(rows(width=32)))
    close(outputs[2:], outputs[:2], rtol=1e-4, atol=1e-5)


@levels
def test_float8_training_layers_are_put_in(level: str) -> None:
    float8 = pytest.importorskip("torchao.float8")
    models = [
        float8.convert_to_float8_training(Body(net(kind, WIDTHS))) for kind in (NATIVE, level)
    ]
    assert [type(m).__name__ for m in models[1].modules()] == [
        type(m).__name__ for m in models[0].modules()
    ]
    assert any("Float8" in type(m).__name__ for m in models[1].modules())


@levels
def test_pt2e_quantization(level: str) -> None:
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    outputs, counts = [], []
    for kind in (NATIVE, level):
        program = torch.export.export(net(kind, WIDTHS).eval(), (rows(width=32),))
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        module = program.run_decompositions({}).module() if kind != NATIVE else program.module()
        prepared = quantize_pt2e.prepare_pt2e(module, quantizer)
        prepared(rows(width=32))
        converted = quantize_pt2e.convert_pt2e(prepared)
        outputs.append(converted(rows(width=32)))
        counts.append(sum("quantize_per" in str(node.target) for node in converted.graph.nodes))
    assert counts[0] > 0 and counts[1] == counts[0]
    close(outputs[1], outputs[0])
