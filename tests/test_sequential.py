"""mlp_ext.Sequential is nn.Sequential in everything but how its runs of layers are computed."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from references import assert_as_accurate_as_native
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

import mlp_ext

pytestmark = pytest.mark.usefixtures("one_thread")

close = torch.testing.assert_close


def children() -> list[nn.Module]:
    return [nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3), nn.Sigmoid()]


def twins(*modules: nn.Module) -> tuple[mlp_ext.Sequential, nn.Sequential]:
    modules = modules or (*children(),)
    return mlp_ext.Sequential(*modules), copy.deepcopy(nn.Sequential(*modules))


class Operators(TorchDispatchMode):
    """Which operators of mlp_ext run, and with how many layers each."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("mlp_ext::mlp", "mlp_ext::_mlp_forward"):
            self.runs.append(len(args[1]))
        if func.name() in ("mlp_ext::linear_act", "mlp_ext::_linear_act_forward"):
            self.runs.append(1)
        return func(*args, **(kwargs or {}))


def runs(model: nn.Module, *sizes: int) -> list[int]:
    with Operators() as operators:
        model(torch.randn(*(sizes or (6, 10))))
    return operators.runs


def results(model: nn.Module, x: Tensor) -> dict[str, Any]:
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    return {"output": output.detach(), "x": x.grad} | {
        name: p.grad for name, p in model.named_parameters()
    }


# ---- how it computes ----

X = (6, 10)
SPLITS: dict[str, tuple[Callable[[], list[nn.Module]], list[int]]] = {
    "all in one": (children, [3]),
    "one linear": (lambda: [nn.Linear(10, 3)], [1]),
    "no linear": (lambda: [nn.ReLU(), nn.Tanh()], []),
    "empty": (lambda: [], []),
    "activation first": (lambda: [nn.Tanh(), *children()], [3]),
    "two activations": (lambda: [nn.Linear(10, 3), nn.ReLU(), nn.Tanh(), nn.Linear(3, 2)], [1, 1]),
    "another between": (
        lambda: [nn.Linear(10, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh()],
        [1, 1],
    ),
    "dropout": (lambda: [nn.Linear(10, 5), nn.ReLU(), nn.Dropout(0.0), nn.Linear(5, 4)], [1, 1]),
    "batch norm": (lambda: [nn.Linear(10, 5), nn.BatchNorm1d(5), nn.ReLU()], [1]),
    "unknown activation": (lambda: [nn.Linear(10, 5), nn.Softsign(), nn.Linear(5, 4)], [1, 1]),
    "own layers": (
        lambda: [
            mlp_ext.LinearReLU(10, 5),
            nn.Linear(5, 4),
            nn.Tanh(),
            mlp_ext.LinearSigmoid(4, 3),
        ],
        [3],
    ),
    "own layer and activation": (lambda: [mlp_ext.LinearReLU(10, 5), nn.ReLU()], [1]),
    "identity": (lambda: [nn.Linear(10, 5), nn.Identity(), nn.ReLU(), nn.Linear(5, 4)], [2]),
    "nested": (lambda: [nn.Linear(10, 5), mlp_ext.Sequential(nn.Linear(5, 4))], [1, 1]),
    "nested empty": (lambda: [nn.Linear(10, 5), nn.Sequential(), nn.Linear(5, 4)], [1, 1]),
    "no bias": (lambda: [nn.Linear(10, 5, bias=False), nn.ReLU(), nn.Linear(5, 4)], [2]),
}


@pytest.mark.parametrize("make, expected", SPLITS.values(), ids=SPLITS)
def test_runs_are_one_operator_and_results_are_native(
    make: Callable[[], list[nn.Module]], expected: list[int]
) -> None:
    model, native = mlp_ext.Sequential(*make()), nn.Sequential()
    native.extend(copy.deepcopy([*model]))
    assert runs(model) == expected
    for x in (torch.randn(6, 10), torch.randn(6, 10)):
        close(results(model, x), results(native, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_ten_sgd_steps_match_native(dtype: torch.dtype) -> None:
    def trained(model: nn.Module) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        to = next(model.parameters()).dtype
        losses = []
        for _ in range(10):
            loss = nn.functional.mse_loss(model(x.to(to)), y.to(to))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return {"losses": torch.stack(losses), **model.state_dict()}

    model, native = (m.to(dtype) for m in twins())
    x, y = torch.randn(40, 10, dtype=dtype), torch.rand(40, 3, dtype=dtype)
    exact = trained(copy.deepcopy(native).double())
    found, expected = trained(model), trained(native)
    assert found["losses"][-1] < found["losses"][0]
    assert list(found) == list(expected)
    for name in expected:
        terms = 4 * (exact[name].abs() + exact["losses"][0])
        assert_as_accurate_as_native(found[name], expected[name], exact[name], terms, name)


@pytest.mark.parametrize("shape", [(10,), (0, 10), (2, 3, 10)], ids=str)
def test_any_leading_sizes(shape: tuple[int, ...]) -> None:
    model, native = twins()
    x = torch.randn(shape)
    close(results(model, x), results(native, x))


def test_frozen_layer_gets_no_gradient() -> None:
    model, native = twins()
    for m in (model, native):
        m[0].requires_grad_(False)
        m[2].bias.requires_grad_(False)
    x = torch.randn(6, 10)
    close(results(model, x), results(native, x))
    assert model[0].weight.grad is None


# ---- what is an obstacle, then and later ----


class SameLinear(nn.Linear):
    """Computes what nn.Linear does."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class MyLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class MyTensor(Tensor):
    pass


def hook(*_: Any) -> None:
    return None


# What is done to the Linear(5, 4) in the middle, and the runs that are left.
CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "forward hook": lambda m: m[2].register_forward_hook(hook),
    "forward pre hook": lambda m: m[2].register_forward_pre_hook(hook),
    "backward hook": lambda m: m[2].register_full_backward_hook(hook),
    "backward pre hook": lambda m: m[2].register_full_backward_pre_hook(hook),
    "own forward": lambda m: setattr(
        m[2], "forward", lambda x: nn.functional.linear(x, m[2].weight)
    ),
    "parametrization": lambda m: parametrizations.weight_norm(m[2]),
    "spectral norm": lambda m: parametrizations.spectral_norm(m[2].eval()),
    "pruning": lambda m: prune.l1_unstructured(m[2], "weight", 3),
    "subclass": lambda m: m.__setitem__(2, MyLinear(5, 4)),
    "class": lambda m: setattr(m[2], "__class__", MyLinear),
    "tensor subclass": lambda m: setattr(
        m[2], "weight", nn.Parameter(torch.ones(4, 5).as_subclass(MyTensor))
    ),
    "sparse": lambda m: setattr(
        m[2], "weight", nn.Parameter(torch.ones(4, 5).to_sparse_csr(), requires_grad=False)
    ),
}


@pytest.mark.filterwarnings("ignore:.*[sS]parse CSR.*:UserWarning")
@pytest.mark.parametrize("later", [False, True], ids=["before", "after a call"])
@pytest.mark.parametrize("change", CHANGES)
def test_child_that_was_given_something_is_called_as_it_is(change: str, later: bool) -> None:
    torch.manual_seed(1)
    model, native = twins()
    if later:
        assert runs(model) == [3]
    torch.manual_seed(2)
    CHANGES[change](model)
    torch.manual_seed(2)
    CHANGES[change](native)
    assert runs(model) == [1, 1]
    x = torch.randn(6, 10)
    close(model(x), native(x))


HARMLESS: dict[str, Callable[[nn.Sequential], Any]] = {
    "attribute": lambda m: setattr(m[2], "qconfig", 1),
    "child": lambda m: m[2].add_module("lora", nn.Linear(5, 4)),
    "buffer": lambda m: m[2].register_buffer("mask", torch.ones(4)),
    "class that computes the same": lambda m: setattr(m[2], "__class__", SameLinear),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_child_whose_forward_reads_nothing_of_it_stays_in_the_run(change: str) -> None:
    model, native = twins()
    HARMLESS[change](model)
    HARMLESS[change](native)
    assert runs(model) == [3]
    x = torch.randn(6, 10)
    close(model(x), native(x))


def test_hook_on_an_activation_fires_and_may_change_the_output() -> None:
    model, native = twins()
    model(torch.randn(6, 10))
    x = torch.randn(6, 10)
    for m in (model, native):
        handle = m[1].register_forward_hook(lambda module, args, output: 2 * output)
    assert runs(model) == [1, 2]
    close(model(x), native(x))
    model[1]._forward_hooks.clear()
    assert handle and runs(model) == [3]


def test_hooks_of_its_own_go_on_firing() -> None:
    model, native = twins()
    model.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(6, 10)
    close(model(x), native(x) + 1)


REGISTER = ["register_module_forward_hook", "register_module_forward_pre_hook"]
REGISTER += ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"]


@pytest.mark.parametrize("register", REGISTER)
def test_hook_for_all_modules_sees_each_child(register: str) -> None:
    model, _ = twins()
    seen: list[str] = []
    assert runs(model) == [3]
    handle = getattr(torch_module, register)(lambda m, *_: seen.append(type(m).__name__))
    try:
        model(torch.randn(6, 10).requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert [*map(seen.count, ("Linear", "ReLU", "Sigmoid", "Sequential"))] == [3, 1, 1, 1]
    assert runs(model) == [3]


EDITS: dict[str, Callable[[nn.Sequential], Any]] = {
    "set": lambda m: m.__setitem__(1, nn.Tanh()),
    "set linear": lambda m: m.__setitem__(2, nn.Linear(5, 4)),
    "append": lambda m: m.append(nn.Linear(3, 2)),
    "insert": lambda m: m.insert(1, nn.Softsign()),
    "extend": lambda m: m.extend([nn.Linear(3, 3), nn.Tanh()]),
    "delete": lambda m: m.__delitem__(1),
    "pop": lambda m: m.pop(-1),
    "new weight": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(5, 10))),
    "no bias": lambda m: setattr(m[0], "bias", None),
    "weight changed": lambda m: m[0].weight.data.mul_(2),
    "another dtype of data": lambda m: m.double().float(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_change_of_the_children_holds_from_the_next_call(edit: str) -> None:
    model, native = twins()
    x = torch.randn(6, 10)
    close(results(model, x), results(native, x))
    for m in (model, native):
        torch.manual_seed(7)
        EDITS[edit](m)
    close(results(model, x), results(native, x))
    assert list(model.state_dict()) == list(native.state_dict())


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
def test_conversion_to_a_dtype_that_no_operator_takes() -> None:
    model, native = twins(nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 4))
    assert runs(model) == [2]
    x = torch.randn(6, 10, dtype=torch.complex64)
    close(model.to(torch.complex64)(x), native.to(torch.complex64)(x))


def test_missing_weight_is_native_error() -> None:
    model, _ = twins()
    model(torch.randn(6, 10))
    del model[0].weight
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        model(torch.randn(6, 10))


def test_shapes_that_do_not_fit_are_named() -> None:
    model = mlp_ext.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(6, 1))
    message = r"^Sequential: weights\[1\] must be \[N, K=5\].*got \[1, 6\]"
    with pytest.raises(RuntimeError, match=message):
        model(torch.randn(64, 10))


def test_errors_of_other_children_are_their_own() -> None:
    model = mlp_ext.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.BatchNorm1d(6))
    with pytest.raises(RuntimeError, match="running_mean"):
        model(torch.randn(64, 10))


# ---- it is an nn.Sequential ----


def test_it_looks_like_an_nn_sequential() -> None:
    model, native = twins()
    model(torch.randn(6, 10))
    assert isinstance(model, nn.Sequential)
    assert repr(model) == repr(native) and len(model) == 5
    assert [*map(type, model)] == [*map(type, native)]
    assert list(model.state_dict()) == list(native.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in native.named_modules()]


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_checkpoints_load_in_both_directions(assign: bool) -> None:
    x = torch.randn(6, 10)
    for first, second in (twins(), twins()[::-1]):
        first(x), second(x)
        with torch.no_grad():
            for p in first.parameters():
                p.add_(1)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        close(second(x), first(x))


def test_slices_are_of_its_kind_and_share_the_children() -> None:
    model, native = twins()
    x = torch.randn(6, 10)
    head, tail = model[:3], model[3:]
    assert type(head) is type(tail) is mlp_ext.Sequential
    assert head[0] is model[0] and runs(head) == [2]
    close(tail(head(x)), native(x))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_carry_no_plan(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, native = twins()
    x = torch.randn(6, 10)
    expected = model(x)
    twin = copied(model)
    assert vars(twin).keys() == vars(native).keys()
    close(twin(x), expected)
    assert type(twin) is mlp_ext.Sequential
    assert list(model.state_dict()) == list(native.state_dict())


def test_copy_learns_by_itself() -> None:
    model, _ = twins()
    x = torch.randn(6, 10)
    model(x)
    twin = copy.deepcopy(model)
    twin(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())


def test_train_and_eval_reach_the_children() -> None:
    model = mlp_ext.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Dropout(0.9), nn.Linear(5, 4))
    x = torch.randn(6, 10)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_moving_to_a_dtype_or_device_and_back() -> None:
    model, native = twins()
    x = torch.randn(6, 10)
    model(x)
    close(model.double()(x.double()), native.double()(x.double()))
    assert model.to("meta")(x.double().to("meta")).shape == (6, 3)
    model.to_empty(device="cpu").load_state_dict(native.state_dict())
    close(model(x.double()), native(x.double()))


def test_lazy_layers_are_called_once_and_then_run() -> None:
    model = mlp_ext.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 4))
    assert runs(model) == [1]
    assert runs(model) == [2]


# ---- a citizen of torch ----


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_has_no_graph_break(backend: str) -> None:
    torch.compiler.reset()
    modules = [*children(), nn.Dropout(0.0), nn.Linear(3, 2), nn.Softplus()]
    model, native = twins(*modules)
    x = torch.randn(6, 10)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    close(compiled(x), native(x))
    expected = results(native, x)
    found = {name.removeprefix("_orig_mod."): t for name, t in results(compiled, x).items()}
    close(found, expected)


QUICK_EDITS = ("set", "delete", "new weight", "no bias")


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [pytest.param(e, marks=[] if e in QUICK_EDITS else [pytest.mark.slow]) for e in EDITS],
)
def test_compiled_model_follows_a_change_of_the_children(edit: str) -> None:
    torch.compiler.reset()
    model, native = twins()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(6, 10)
    close(compiled(x), native(x))
    for m in (model, native):
        torch.manual_seed(7)
        EDITS[edit](m)
    close(compiled(x), native(x))


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_exported_programs_have_pytorchs_operators(strict: bool) -> None:
    model, native = twins()
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(
        model, (torch.randn(6, 10),), strict=strict, dynamic_shapes=(rows,)
    )
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    linear, relu, sigmoid = (
        getattr(torch.ops.aten, name).default for name in ("linear", "relu", "sigmoid")
    )
    assert called == [linear, relu, linear, linear, sigmoid]
    x = torch.randn(3, 10)
    close(program.module()(x), native(x))


class Counting(nn.Module):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return input


def test_fx_traces_each_child_once() -> None:
    model, native = twins(nn.BatchNorm1d(10), *children())
    traced = torch.fx.symbolic_trace(model)
    modules = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert modules == [*"012345"]
    x = torch.randn(6, 10)
    close(traced(x), native(x))
    close(model.state_dict(), native.state_dict())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_children_before_a_nested_input_run_once() -> None:
    model, native = twins(Counting(), nn.Linear(10, 5), nn.ReLU())
    rows = [torch.randn(2, 10), torch.randn(3, 10)]
    found = model(torch.nested.nested_tensor(rows))
    close(torch.cat(found.unbind()), native(torch.cat(rows)))
    assert model[0].calls == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_records_the_layers() -> None:
    model, native = twins()
    traced = torch.jit.trace(model, torch.randn(6, 10))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count("mlp_ext::linear_act") == 3
    x = torch.randn(3, 10)
    close(traced(x), native(x))


def test_functional_call_under_vmap_of_grad() -> None:
    model, native = twins()
    x = torch.randn(6, 10)

    def per_sample(model: nn.Module) -> Any:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Any:
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    model(x)
    close(per_sample(model), per_sample(native))
    close(results(model, x), results(native, x))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    made: list[int] = []
    find = mlp_ext.sequential.find_steps
    with monkeypatch.context() as patched:
        patched.setattr(mlp_ext.sequential, "find_steps", lambda *a: made.append(1) or find(*a))
        yield made


def test_plan_is_made_once_for_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = twins()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with counted(monkeypatch) as made:
        for _ in range(3):
            model(torch.randn(6, 10)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(made) == 1
