"""ONNX: both exporters of torch, run by onnxruntime."""

import io

import onnx
import onnxruntime
import pytest
import torch
from clients import Body, close, levels, net, rows
from torch import Tensor, nn

import mlp_ext

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:You are using the legacy"
)

ACTIVATIONS = [nn.ReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Softplus]


def exported(model: nn.Module, dynamo: bool, dynamic: bool = False) -> bytes:
    file = io.BytesIO()
    names = {"input_names": ["x"], "output_names": ["y"]}
    shapes: dict[str, object] = {}
    if dynamic and dynamo:
        shapes = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    elif dynamic:
        shapes = {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
    torch.onnx.export(model, (rows(),), file, dynamo=dynamo, verbose=False, **names, **shapes)
    return file.getvalue()


def run(program: bytes, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(result)


exporters = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])


@levels
@exporters
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.__name__)
def test_runtime_gives_pytorchs_values(
    level: str, dynamo: bool, activation: type[nn.Module]
) -> None:
    program = exported(Body(net(level, activation=activation)).eval(), dynamo)
    expected = net(activation=activation)(rows()).detach()
    close(run(program, rows()), expected, rtol=1e-5, atol=1e-6)
    domains = {node.domain for node in onnx.load_from_string(program).graph.node}
    assert domains <= {"", "ai.onnx", "pkg.onnxscript.torch_lib"}


@levels
@exporters
def test_batch_may_vary(level: str, dynamo: bool) -> None:
    program = exported(net(level).eval(), dynamo, dynamic=True)
    for count in (1, 3, 10, 33):
        expected = net()(rows(count)).detach()
        close(run(program, rows(count)), expected, rtol=1e-5, atol=1e-6)


@exporters
def test_layer_written_as_fused(dynamo: bool) -> None:
    torch.manual_seed(0)
    layer = mlp_ext.LinearReLU(8, 4).eval()
    expected = layer(rows()).detach()
    close(run(exported(layer, dynamo), rows()), expected, rtol=1e-5, atol=1e-6)
