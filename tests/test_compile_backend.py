"""torch.compile(model, backend="mlp_ext"): native's values and gradients, by fused operators."""

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from mlp_ext import _C, compile_backend
from mlp_ext.compile_backend import compile_graph

LINEAR_ACT = torch.ops.mlp_ext.linear_act.default
Inner = Callable[[GraphModule, list[Any]], Any]


class Functional(nn.Module):
    """An activation as a function, method, module and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 16)
        self.third, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x), inplace=True)
        h = self.second(h).sigmoid()
        return torch.tanh(self.last(self.act(self.third(h))))


class Loop(nn.Module):
    """A ModuleList, residuals, one layer used twice, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0]):
            x = x + self.drop(F.silu(layer(x)))
        return x


class Branch(nn.Module):
    """A branch on data, where Dynamo breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x), 0.2)
        return F.elu(self.second(h)) if x.sum() > 0 else F.relu(self.second(h) + 1)


class Contexts(nn.Module):
    """no_grad between Linear and activation, a checkpoint, autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        with torch.no_grad():
            y = F.relu(z)
        h = checkpoint(lambda t: F.relu(self.second(t)), x, use_reentrant=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.softplus(self.second(h)) + y


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fused operators in each graph; AOTAutograd takes Inductor's place, which takes seconds."""
    return replace_inductor(monkeypatch, "aot_eager")


def replace_inductor(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[int]:
    torch.compiler.reset()
    counts: list[int] = []
    run: Inner = torch._dynamo.lookup_backend(backend)  # type: ignore[no-untyped-call]

    def inner(module: GraphModule, inputs: list[Any]) -> Any:
        graphs = [m.graph for m in module.modules() if isinstance(m, GraphModule)]
        counts.append(sum(n.target is LINEAR_ACT for graph in graphs for n in graph.nodes))
        return run(module, inputs)

    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", lambda *_, **__: inner)
    return counts


def results(function: Callable[..., Tensor], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients, with dropout's masks from the same seed."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = function(x)
    y.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **gradients}


def check(model: nn.Module, *inputs: Tensor, is_16_bit: bool = False, **options: Any) -> None:
    compiled = torch.compile(model, backend=compile_graph, **options)
    # Eager rounds between the two operations, too.
    close = {"rtol": 0.02, "atol": 0.02} if is_16_bit else {}
    for x in inputs:
        torch.testing.assert_close(results(compiled, model, x), results(model, model, x), **close)
        with torch.no_grad():
            torch.manual_seed(1)
            found = compiled(x)
            torch.manual_seed(1)
            torch.testing.assert_close(found, model(x), **close)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, pairs",
    [(Functional, [4, 4]), (Loop, [4, 4]), (Contexts, [2, 3]), (lambda: nn.Linear(8, 8), [0, 0])],
    ids=["functional", "loop", "contexts", "no-pair"],
)
def test_values_gradients_and_operators(
    counted: list[int], make: Callable[[], nn.Module], pairs: list[int]
) -> None:
    check(make(), torch.randn(6, 8), fullgraph=True, is_16_bit=make is Contexts)
    assert counted == pairs  # with gradients, and without, where no_grad changes nothing


def test_in_eval(counted: list[int]) -> None:
    check(Loop().eval(), torch.randn(2, 3, 8), fullgraph=True)
    assert counted == [4, 4]


@pytest.mark.slow
def test_dynamic_shapes(counted: list[int]) -> None:
    check(Functional(), torch.randn(6, 8), torch.randn(9, 8), dynamic=True, fullgraph=True)
    assert counted == [4, 4]


@pytest.mark.slow
def test_branches_on_data_break_the_graph(counted: list[int]) -> None:
    model, x = Branch().double(), torch.randn(6, 8, dtype=torch.float64)
    check(model, x, -x)
    assert sorted(counted) == [0, 0, 1, 1, 1, 1]  # the second branch: Linear, addition, ReLU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ambient_autocast(counted: list[int], dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype):
        check(Functional(), torch.randn(6, 8), fullgraph=True, is_16_bit=True)
    assert counted == [4, 4]


def test_float64(counted: list[int]) -> None:
    check(Functional().double(), torch.randn(6, 8, dtype=torch.float64))
    assert counted == [4, 4]


def test_what_the_operator_does_not_take_is_left_alone(
    counted: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, w, b))

    x, w, b = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    compiled = torch.compile(function, backend=compile_graph)
    complex_numbers = tuple(t.to(torch.complex64) for t in (x, w, b))
    with caplog.at_level("INFO", "mlp_ext"):
        for operands in [(x, w, b[:1]), complex_numbers]:
            torch.testing.assert_close(compiled(*operands), function(*operands))
    assert sum(counted) == 0
    reasons = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert reasons == [
        "weight must be [N, K] and bias [N]",
        "the layer computes in torch.complex64, its activation in torch.complex64",
    ]


def test_on_a_gpu_the_plan_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: Dynamo's graph with tensors said to be there."""
    reasons: dict[int, str] = {}

    def inspect(module: GraphModule, _: list[Any]) -> Any:
        for node in module.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor):
                value.fake_device = torch.device("cuda", 0)  # type: ignore[attr-defined]
        (pair,) = compile_backend.find_pairs(module.graph, compile_backend._is_linear)
        reasons[x.shape[0]] = compile_backend.why_not(pair)
        return module.forward

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compile_backend, "build_info", lambda: {"cuda": "13.0"})
    for M in (64, 65536):
        torch.compiler.reset()
        x = torch.randn(M, 128, dtype=torch.float64)
        linear = nn.Linear(128, 128, dtype=torch.float64)
        torch.compile(lambda x, linear=linear: F.relu(linear(x)), backend=inspect)(x)
    plan = _C.cuda_plan(65536, 128, 128, "float64", "relu", 90)
    assert plan["forward"] == "native"
    assert reasons == {64: "", 65536: plan["forward_reason"]}


def test_torch_finds_it_by_name() -> None:
    """The entry point in pyproject.toml; an installed package has it too, where it is current."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    value = f"{compile_graph.__module__}:{compile_graph.__name__}"
    assert f'[project.entry-points.torch_dynamo_backends]\nmlp_ext = "{value}"\n' in text
    for entry_point in entry_points(group="torch_dynamo_backends", name="mlp_ext"):
        assert entry_point.load() is compile_graph


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"options": {"max_autotune": False}}])
def test_inductor(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    with torch.profiler.profile() as profile:
        check(Functional(), torch.randn(6, 8), fullgraph=True, **options)
    names = {event.key for event in profile.key_averages()}
    assert {"mlp_ext::_linear_act_forward", "mlp_ext::_linear_act_backward"} <= names


@pytest.mark.slow
def test_inductor_under_autocast_and_in_checkpoints() -> None:
    torch.compiler.reset()
    check(Contexts(), torch.randn(6, 8), is_16_bit=True)
