"""torch.ao.quantization: eager, FX and dynamic, which torch still ships."""

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.ao.quantization as quantization
from clients import NATIVE, Body, close, levels, net, rows
from torch import nn
from torch.ao.quantization import quantize_fx

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated",
    "ignore:Please use quant_min",
    "ignore::UserWarning",
)


@pytest.fixture(autouse=True)
def engine() -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    yield
    torch.backends.quantized.engine = before


def kinds(model: nn.Module) -> list[str]:
    return [f"{type(m).__module__}.{type(m).__name__}" for m in model.modules()]


def assert_same(results: list[nn.Module]) -> None:
    native, fused = results
    close(fused(rows()), native(rows()))
    assert kinds(fused)[1:] == kinds(native)[1:]
    assert any("quantized" in kind for kind in kinds(fused))


@levels
@pytest.mark.parametrize("ran_before", [False, True])
def test_quantize_dynamic(level: str, ran_before: bool) -> None:
    models = [net(kind).eval() for kind in (NATIVE, level)]
    if ran_before:
        models[1](rows())
    assert_same([quantization.quantize_dynamic(model, {nn.Linear}) for model in models])


@levels
@pytest.mark.parametrize("qat", [False, True])
def test_eager_mode(level: str, qat: bool) -> None:
    results = []
    for kind in (NATIVE, level):
        model = quantization.QuantWrapper(net(kind))
        model(rows())
        if qat:
            model.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
            prepared = quantization.prepare_qat(model)
        else:
            model.eval().qconfig = quantization.get_default_qconfig("fbgemm")
            prepared = quantization.prepare(model)
        prepared(rows())
        results.append(quantization.convert(prepared.eval()))
    assert_same(results)


@levels
@pytest.mark.parametrize("qat", [False, True])
def test_fx_mode(level: str, qat: bool) -> None:
    results = []
    for kind in (NATIVE, level):
        model = Body(net(kind))
        if qat:
            mapping = quantization.get_default_qat_qconfig_mapping("fbgemm")
            prepared = quantize_fx.prepare_qat_fx(model.train(), mapping, (rows(),))
        else:
            mapping = quantization.get_default_qconfig_mapping("fbgemm")
            prepared = quantize_fx.prepare_fx(model.eval(), mapping, (rows(),))
        prepared(rows())
        results.append(quantize_fx.convert_fx(prepared.eval()))
    assert_same(results)


@levels
def test_eager_fusion_of_modules(level: str) -> None:
    results = []
    for kind in (NATIVE, level):
        model = net(kind).eval()
        model(rows())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(quantization.fuse_modules(model, [["0", "1"], ["2", "3"]]))
    close(results[1](rows()), results[0](rows()))
    assert [type(child) for child in results[1]] == [type(child) for child in results[0]]
