"""PyTorch's tools on layers and stacks: export, ONNX, quantization, FLOPs, jagged tensors."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mlp_ext
from mlp_ext.nn import LinearAct

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
close = torch.testing.assert_close
OPS = torch.ops.mlp_ext
LAYERS = [*LinearAct.by_module.values()]


class Layers(nn.Module):
    """Every activation, options, a function, and layers without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(8, 8) for kind in LAYERS)
        self.layers.append(mlp_ext.LinearGELU(8, 8, approximate="tanh"))
        self.layers.append(mlp_ext.LinearLeakyReLU(8, 8, bias=False, negative_slope=0.3))
        self.layers.append(mlp_ext.LinearSoftplus(8, 8, beta=1.0, threshold=10.0))
        self.layers.append(mlp_ext.LinearHardtanh(8, 8, min_val=-0.5, max_val=0.25))

    def forward(self, input: Tensor) -> Tensor:
        outputs = [layer(input) for layer in self.layers]
        outputs.append(mlp_ext.linear_tanh(input, self.layers[0].weight))
        return torch.stack(outputs, 1)


class Operators(nn.Module):
    """The operators called directly: a program keeps them until it is decomposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 4, bias=False)

    def forward(self, input: Tensor) -> Any:
        layers = [self.first.weight, self.last.weight], [self.first.bias, None]
        y = OPS.mlp(input, *layers, ["gelu", "leaky_relu"], [0.2])
        return OPS.linear_act(y, y, None, "elu", [0.5])


def targets(program: torch.export.ExportedProgram) -> set[str]:
    nodes = program.graph.nodes
    return {str(node.target) for node in nodes if node.op == "call_function"}


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    rows = ({0: torch.export.Dim("rows")},)
    return torch.export.export(model.eval(), (torch.randn(5, 8),), dynamic_shapes=rows)


# ---- torch.export ----


@pytest.mark.slow
def test_a_program_consists_of_pytorchs_operators() -> None:
    model = Layers()
    program = exported(model)
    assert "aten.linear.default" in targets(program)
    for step in (program, program.run_decompositions()):
        assert all(target.startswith("aten.") for target in targets(step))
        x = torch.randn(3, 8)
        close(step.module()(x), model(x))


@pytest.mark.slow
def test_a_program_on_disk_loads_without_mlp_ext(tmp_path: Path) -> None:
    model, x = Layers(), torch.randn(3, 8)
    torch.export.save(exported(model), tmp_path / "model.pt2")
    torch.save((x, model(x)), tmp_path / "data.pt")
    code = f"""
import sys, torch
x, y = torch.load({str(tmp_path / "data.pt")!r})
torch.testing.assert_close(torch.export.load({str(tmp_path / "model.pt2")!r}).module()(x), y)
assert "mlp_ext" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_operators_decompose_to_core_aten() -> None:
    model = Operators()
    program = exported(model)
    table = torch.export.default_decompositions()
    table.update(torch._decomp.get_decompositions([OPS.linear_act, OPS.mlp]))
    program = program.run_decompositions(table)
    assert all(target.startswith("aten.") for target in targets(program))
    x = torch.randn(3, 8)
    close(program.module()(x), model(x))


@pytest.mark.slow
def test_inductor_keeps_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """In CI too, where it refuses other operators that have decompositions."""
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setenv("CI", "true")
    torch.compiler.reset()
    compiled = torch.compile(nn.Sequential(mlp_ext.LinearReLU(8, 8), Operators()), fullgraph=True)
    no_graphs = torch._inductor.config.patch(fx_graph_cache=False)
    no_aot = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch.no_grad(), no_graphs, no_aot:
        _, (code,) = run_and_get_code(compiled, torch.randn(5, 8))
    assert code.count("ops.mlp_ext.linear_act.default(") == 2
    assert code.count("ops.mlp_ext.mlp.default(") == 1


# ---- ONNX ----


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("make", [Layers, Operators])
def test_onnxruntime_computes_the_same_on_any_batch(
    make: Callable[[], nn.Module], dynamo: bool
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, file = make().eval(), torch.randn(5, 8), io.BytesIO()
    how: dict[str, Any] = {"dynamic_axes": {"input": {0: "rows"}}, "input_names": ["input"]}
    if dynamo:
        how = {"dynamic_shapes": ({0: torch.export.Dim("rows")},), "verbose": False}
    torch.onnx.export(model, (x,), file, dynamo=dynamo, **how)
    session = onnxruntime.InferenceSession(file.getvalue())
    name = session.get_inputs()[0].name
    for rows in (5, 3):
        x = torch.randn(rows, 8)
        (found,) = session.run(None, {name: x.numpy()})
        close(torch.from_numpy(found), model(x), rtol=1e-5, atol=1e-6)


# ---- quantization and other special weights ----


def written() -> tuple[nn.Module, nn.Module]:
    """Layers in a Sequential, and the same network in PyTorch's modules."""
    plain = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )
    relu = mlp_ext.LinearReLU.from_linear(plain[0])
    tanh = mlp_ext.LinearTanh.from_linear(plain[2])
    return nn.Sequential(relu, tanh, plain[4]).eval(), plain.eval()


class Int8(Tensor):
    """A weight stored as int8. It implements F.linear alone, as quantization libraries do."""

    @staticmethod
    def of(weight: Tensor) -> Tensor:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        stored = (weight.detach() / scale).round().to(torch.int8).as_subclass(Int8)
        stored.scale = scale  # type: ignore[attr-defined]
        return stored

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is nn.functional.linear:
            input, weight, *bias = args
            values = weight.as_subclass(Tensor) * weight.scale
            return function(input, values, *bias)
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_special_weight_is_given_to_linear(kind: Any) -> None:
    layer = kind(8, 4)
    linear, activation = nn.Linear(8, 4), layer.torch_module()
    weight = Int8.of(layer.weight)
    for module in (layer, linear):
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.weight.scale = weight.scale
        module.bias = layer.bias
    x = torch.randn(3, 8)
    close(layer(x), activation(linear(x)), rtol=0, atol=0)
    close(mlp_ext.Sequential(layer)(x), activation(linear(x)), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_fx_quantizes_layers_as_native() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    outputs, x = [], torch.randn(32, 8)
    for model in written():
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        quantized = convert_fx(prepared)
        assert sum("quantized" in type(m).__module__ for m in quantized.modules()) or any(
            "quantized" in str(node.target) for node in quantized.graph.nodes
        )
        outputs.append(quantized(x))
    close(outputs[0], outputs[1])


def test_fx_traces_pytorchs_operators() -> None:
    model, plain = written()
    graph = torch.fx.symbolic_trace(model)
    assert nn.functional.linear in [node.target for node in graph.graph.nodes]
    x = torch.randn(3, 8)
    close(graph(x), plain(x))


# ---- FLOPs ----


def flops(model: nn.Module, *inputs: Tensor, backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        y = model(*inputs)
        if backward:
            y.square().sum().backward()
    return counter.get_total_flops()


FROZEN: dict[str, list[str]] = {
    "all learn": [],
    "first weight frozen": ["0.weight"],
    "first layer frozen": ["0.weight", "0.bias"],
    "last weight frozen": ["4.weight"],
    "last bias alone learns": ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight"],
}


@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_flops_of_a_stack_are_those_of_native(
    activation: type[nn.Module], frozen: str, needs_dx: bool
) -> None:
    modules = [nn.Linear(8, 16), activation(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4)]
    stack, plain = mlp_ext.Sequential(*modules), nn.Sequential(*copy.deepcopy(modules))
    for model in (stack, plain):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in FROZEN[frozen])
    x = torch.randn(2, 5, 8, requires_grad=needs_dx)
    assert flops(stack, x) == flops(plain, x)
    assert flops(stack, x, backward=False) == flops(plain, x, backward=False)


@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_flops_of_layers_are_those_of_native(learns: bool, needs_dx: bool) -> None:
    models = written()
    for model in models:
        model[0].weight.requires_grad_(learns)
    x = torch.randn(10, 8, requires_grad=needs_dx)
    assert flops(models[0], x) == flops(models[1], x) > 0


# ---- jagged tensors ----


def jagged() -> Tensor:
    rows = [torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("kind", ["layers", "stack"])
def test_jagged_tensors_as_native(kind: str) -> None:
    modules = [nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4)]
    plain = nn.Sequential(*modules).double()
    gelu = mlp_ext.LinearGELU.from_linear(plain[0])
    relu = mlp_ext.LinearReLU.from_linear(plain[2])
    model = nn.Sequential(gelu, relu, plain[4])
    if kind == "stack":
        model = mlp_ext.Sequential(*plain)
    x = jagged()
    found, expected = model(x), plain(x)
    assert found.is_nested and found.shape[1] == x.shape[1]
    close(found.values(), expected.values())
    wanted = [x, *plain.parameters()]
    found, expected = (
        torch.autograd.grad(y.values().square().sum(), wanted) for y in (found, expected)
    )
    close(
        [t.values() if t.is_nested else t for t in found],
        [t.values() if t.is_nested else t for t in expected],
    )


def test_a_nested_tensor_with_strides_as_native() -> None:
    layer = mlp_ext.LinearReLU(8, 4)
    rows = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    for found, row in zip(layer(rows).unbind(), rows.unbind(), strict=True):
        close(found, layer(row))


# ---- torch.jit.script ----


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp_ext.LinearReLU(8, 4),
        lambda: nn.Sequential(mlp_ext.LinearReLU(8, 4)),
        lambda: mlp_ext.Sequential(nn.Linear(8, 4)),
    ],
)
def test_script_is_refused_in_one_line(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(
        NotImplementedError,
        match=r"^\w+ does not support torch.jit.script; use torch.export.export$",
    ):
        torch.jit.script(make())


# ---- imports ----


@pytest.mark.slow
def test_tools_are_not_imported_before_they_are_used() -> None:
    code = """
import importlib.util, sys, torch
before = set(sys.modules)
import mlp_ext
new = sorted(set(sys.modules) - before)
slow = ("torch.onnx", "onnx", "torch.distributed.tensor", "torch._inductor", "torch._dynamo")
assert not [name for name in new if name.startswith(slow)], new
assert importlib.util.find_spec("torch.onnx")  # which does not import it
import torch.distributed.tensor, torch.onnx
from torch.onnx._internal.torchscript_exporter.registration import registry
assert "mlp_ext::linear_act" in registry.all_functions()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
