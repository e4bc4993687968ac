"""fuse changes how a model computes and nothing else; unfuse gives the very same model back."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch
from hypotheses import given, settings, st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import mlp_ext

pytestmark = pytest.mark.filterwarnings("ignore:fuse changed nothing")

WIDTH = 6


def linear(**kwargs: object) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, **{"dtype": torch.float64, **kwargs})


class Net(nn.Module):
    """Fusible Sequentials at two depths, and Linears that only code calls."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(
            linear(bias=False), nn.Tanh(), nn.LayerNorm(WIDTH, dtype=torch.float64)
        )
        self.body = nn.Sequential(linear(), nn.ReLU(inplace=True), inner, linear(), nn.Softsign())
        self.skips = nn.ModuleList([linear(), nn.ReLU()])
        self.head = nn.Sequential(linear(), nn.Sigmoid(), linear())

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        for skip in self.skips:
            h = h + skip(h)
        return self.head(h)


FUSIBLE = ["body.0", "body.2.0", "head.0"]  # in Net


def mlp() -> nn.Sequential:
    return nn.Sequential(linear(), nn.ReLU(), linear(), nn.Sigmoid())


def identities(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)]


def results(model: nn.Module) -> dict[str, Tensor | None]:
    """The output on fixed data, and every gradient by name."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
    model.zero_grad()
    output = model(x * 1)
    if output.requires_grad:
        output.backward(torch.randn(output.shape, dtype=output.dtype, generator=generator))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **gradients}


def sites(model: nn.Module) -> dict[str, tuple[str | None, str, str]]:
    return {s.name: (s.activation, s.status, s.reason) for s in mlp_ext.fusion_report(model)}


def fused_names(model: nn.Module) -> list[str]:
    return [name for name, (_, status, _) in sites(model).items() if status == "fused"]


# What fuse does


def test_fuse_changes_no_child_and_nothing_that_is_printed() -> None:
    model = Net()
    before, text = identities(model), repr(model)
    kinds = [type(m) for m in model.modules() if not isinstance(m, nn.Sequential)]
    assert mlp_ext.fuse(model) is model
    assert fused_names(model) == FUSIBLE
    assert identities(model) == before and repr(model) == text
    assert [type(m) for m in model.modules() if not isinstance(m, nn.Sequential)] == kinds
    assert isinstance(model.body, nn.Sequential) and type(model.body).__name__ == "Sequential"


def test_fuse_keeps_the_output_and_every_gradient() -> None:
    model = Net()
    expected = results(copy.deepcopy(model))
    torch.testing.assert_close(results(mlp_ext.fuse(model)), expected)
    torch.testing.assert_close(results(mlp_ext.unfuse(model)), expected)


def test_fuse_keeps_every_parameter_and_its_name() -> None:
    model = Net()
    before = [(name, id(p)) for name, p in model.named_parameters()]
    mlp_ext.fuse(model)
    assert [(name, id(p)) for name, p in model.named_parameters()] == before


def test_fuse_again_changes_nothing() -> None:
    model = mlp_ext.fuse(Net())
    once = identities(model)
    assert identities(mlp_ext.fuse(model)) == once


def test_unfuse_gives_back_the_very_same_modules() -> None:
    model = Net()
    before, text = identities(model), repr(model)
    mlp_ext.unfuse(mlp_ext.fuse(model))
    assert identities(model) == before
    assert repr(model) == text
    assert identities(mlp_ext.unfuse(model)) == before


@pytest.mark.parametrize(
    "model",
    [nn.Conv2d(1, 1, 1), nn.Sequential(), linear(), nn.Sequential(nn.ReLU(), linear())],
    ids=str,
)
def test_fuse_leaves_a_model_with_no_pair_as_it_is(model: nn.Module) -> None:
    before = identities(model)
    assert mlp_ext.fuse(model) is model
    assert mlp_ext.unfuse(model) is model
    assert identities(model) == before


def trees() -> st.SearchStrategy[nn.Module]:
    kinds = (linear, nn.ReLU, nn.Sigmoid, nn.GELU, nn.Softplus, nn.Softsign, nn.Identity)
    shared = [linear(), nn.LeakyReLU(0.3)]  # one object, wherever it is drawn
    leaves = st.one_of(st.sampled_from(kinds).map(lambda kind: kind()), st.sampled_from(shared))
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=6).map(lambda m: nn.Sequential(*m))
    )


@settings(max_examples=60, deadline=None)
@given(trees())
def test_fuse_and_back_on_any_tree(model: nn.Module) -> None:
    before, expected = identities(model), results(copy.deepcopy(model))
    keys = list(model.state_dict())
    planned = [s.name for s in mlp_ext.fusion_report(model) if s.status == "would fuse"]
    mlp_ext.fuse(model)
    done = [s.name for s in mlp_ext.fusion_report(model) if s.status == "fused"]
    assert done == planned
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(results(model), expected)
    assert identities(mlp_ext.unfuse(model)) == before


# What goes on working


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_optimizer_made_before_goes_on_through_fuse_and_unfuse(
    optimizer_class: type[torch.optim.Optimizer],
) -> None:
    native = Net()
    model = copy.deepcopy(native)
    momentum = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}

    def trained(model: nn.Module, *changes: Callable[[nn.Module], object]) -> dict[str, Tensor]:
        optimizer = optimizer_class(model.parameters(), lr=0.05, **momentum)  # type: ignore[call-arg]
        for change in changes:
            change(model)
            for _ in range(3):
                results(model)
                optimizer.step()
        return model.state_dict()

    nothing = nn.Module.train
    expected = trained(native, nothing, nothing, nothing)
    torch.testing.assert_close(trained(model, nothing, mlp_ext.fuse, mlp_ext.unfuse), expected)


def test_checkpoints_load_in_both_directions() -> None:
    native, fused = Net(), mlp_ext.fuse(Net())
    file = io.BytesIO()
    torch.save(native.state_dict(), file)
    file.seek(0)
    fused.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(results(fused), results(native))
    other = Net()
    other.load_state_dict(fused.state_dict())
    torch.testing.assert_close(results(other), results(native))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_of_a_fused_model_can_be_unfused(copied: Callable[[nn.Module], nn.Module]) -> None:
    native = Net()
    text, expected = repr(native), results(native)
    fused = mlp_ext.fuse(native)
    twin = copied(fused)
    assert fused_names(twin) == FUSIBLE
    mlp_ext.unfuse(twin)
    assert repr(twin) == text and fused_names(fused) == FUSIBLE
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in fused.parameters())
    torch.testing.assert_close(results(twin), expected)


def test_parameters_replaced_while_fused_are_the_unfused_models() -> None:
    model = mlp_ext.fuse(mlp())
    other = mlp()
    model.load_state_dict(other.state_dict(keep_vars=True), assign=True)
    mlp_ext.unfuse(model)
    assert model[0].weight is other[0].weight
    torch.testing.assert_close(results(model), results(other))


def test_conversion_while_fused_holds_after_unfuse() -> None:
    model = mlp_ext.unfuse(mlp_ext.fuse(mlp()).to("meta").to_empty(device="cpu").float())
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float32)}


def test_training_flags_follow_in_both_directions() -> None:
    model = mlp()
    model[0].eval()
    model[3].eval()
    flags = [m.training for m in model.modules()]
    assert [m.training for m in mlp_ext.fuse(model).modules()] == flags
    assert [m.training for m in mlp_ext.unfuse(model).modules()] == flags
    mlp_ext.unfuse(mlp_ext.fuse(model).eval())
    assert not any(m.training for m in model.modules())


def test_frozen_parameters_stay_frozen() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    expected = results(copy.deepcopy(model))
    mlp_ext.fuse(model)
    torch.testing.assert_close(results(model), expected)
    assert model[0].weight.grad is None
    model[0].bias.requires_grad_(False)
    mlp_ext.unfuse(model)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_one_parameter_of_two_layers_gets_both_gradients() -> None:
    model = mlp()
    model[2].weight = model[0].weight
    expected = results(copy.deepcopy(model))
    mlp_ext.fuse(model)
    assert fused_names(model) == ["0", "2"]
    torch.testing.assert_close(results(model), expected)


def test_another_model_with_the_same_modules_keeps_computing_the_same() -> None:
    first, relu = linear(), nn.ReLU()
    actor, critic = nn.Sequential(first, relu, linear()), nn.Sequential(first, nn.Tanh(), relu)
    expected = results(critic)
    mlp_ext.fuse(actor)
    torch.testing.assert_close(results(critic), expected)
    actor.load_state_dict(
        {k: torch.zeros_like(v) for k, v in actor.state_dict().items()}, assign=True
    )
    assert not first.weight.any()


def test_sequential_in_two_places_is_fused_inside() -> None:
    block = nn.Sequential(linear(), nn.ReLU())
    model = nn.Sequential(block, block)
    before, expected = identities(model), results(copy.deepcopy(model))
    mlp_ext.fuse(model)
    assert sites(model) == {"0.0": ("relu", "fused", "")}
    torch.testing.assert_close(results(model), expected)
    assert identities(mlp_ext.unfuse(model)) == before


def test_activation_in_two_places_is_no_obstacle() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(linear(), relu, linear(), relu)
    expected = results(copy.deepcopy(model))
    mlp_ext.fuse(model)
    assert fused_names(model) == ["0", "2"]
    torch.testing.assert_close(results(model), expected)
    mlp_ext.unfuse(model)
    assert model[1] is relu and model[3] is relu


def test_compiled_model_is_fused_inside_and_compiles_anew() -> None:
    model = mlp()
    expected = results(copy.deepcopy(model))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(results(compiled)["output"], expected["output"])
    assert mlp_ext.fuse(compiled) is compiled
    assert fused_names(model) == ["0", "2"]
    torch.testing.assert_close(results(compiled)["output"], expected["output"])
    mlp_ext.unfuse(compiled)
    torch.testing.assert_close(results(compiled)["output"], expected["output"])


# What is left alone, and the reason in the report


def pair(first: nn.Module | None = None, second: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(first or linear(), second or nn.ReLU())


def changed(module: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(module)
    return module


def with_attribute(module: nn.Module, name: str, value: object) -> nn.Module:
    setattr(module, name, value)
    return module


class Doubled(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(self._modules.values())


class Twice(nn.Module):
    """Reads what the layer computes before the activation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(pair())

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers[0](x)
        return self.layers[1](z) + z


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = linear()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) if x.sum() > 0 else x


class MyLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class MyReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class SameLinear(nn.Linear):
    """Another constructor and attributes of its own, which forward does not read."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, dtype=torch.float64)
        self.gain = 2.0


class SameReLU(nn.ReLU):
    pass


class MyTensor(Tensor):
    pass


def special_weight() -> nn.Module:
    return with_attribute(
        linear(), "weight", nn.Parameter(linear().weight.detach().as_subclass(MyTensor))
    )


def sparse_weight() -> nn.Module:
    sparse = torch.eye(WIDTH, dtype=torch.float64).to_sparse_csr()
    return with_attribute(linear(), "weight", nn.Parameter(sparse, requires_grad=False))


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(mlp().float().eval(), {nn.Linear}).double()


LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "whole model": (linear, "is the whole model"),
    "last": (lambda: nn.Sequential(nn.ReLU(), linear()), "last in its Sequential"),
    "followed by another": (lambda: pair(second=nn.Dropout(0.0)), "followed by Dropout"),
    "activation of other meaning": (lambda: pair(second=nn.Softsign()), "followed by Softsign"),
    "option of other meaning": (
        lambda: pair(second=nn.LeakyReLU(torch.tensor(0.2))),
        r"followed by LeakyReLU\(negative_slope=.*\), whose options are not supported",
    ),
    "activation subclass": (lambda: pair(second=MyReLU()), "followed by MyReLU"),
    "across containers": (lambda: pair(nn.Sequential(linear())), "last in its Sequential"),
    "linear subclass": (
        lambda: pair(MyLinear(6, 6).double()),
        r"is a \S+\.MyLinear, which may compute something else than a torch\.nn\.Linear",
    ),
    "output read twice": (Twice, "its output is not read by an activation alone"),
    "branches": (Branches, "in a Branches, whose forward branches on its input"),
    "own order": (lambda: Backwards(*pair()), "its output is not read by an activation alone"),
    "patched sequential": (
        lambda: changed(pair(), lambda m: setattr(m, "forward", lambda x: m[0](x))),
        "in a Sequential, which has an attribute of its own, 'forward'",
    ),
    "patched linear": (
        lambda: pair(with_attribute(linear(), "forward", lambda x: x)),
        "^has an attribute of its own, 'forward'",
    ),
    "patched activation": (
        lambda: pair(second=with_attribute(nn.ReLU(), "forward", lambda x: x)),
        "^its ReLU has an attribute of its own, 'forward'",
    ),
    "compiled linear": (
        lambda: pair(changed(linear(), lambda m: m.compile(backend="eager"))),
        "attribute of its own, '_compiled_call_impl'",
    ),
    "weight norm": (
        lambda: pair(parametrizations.weight_norm(linear())),
        r"is a \S+\.ParametrizedLinear",
    ),
    "spectral norm": (
        lambda: pair(parametrizations.spectral_norm(linear())),
        r"\.ParametrizedLinear",
    ),
    "old weight norm": (lambda: pair(nn.utils.weight_norm(linear())), "has forward pre hooks"),
    "old spectral norm": (lambda: pair(nn.utils.spectral_norm(linear())), "has forward pre hooks"),
    "pruned": (lambda: pair(prune.l1_unstructured(linear(), "weight", 3)), "has forward pre hooks"),
    "tensor subclass": (lambda: pair(special_weight()), r"its weight is a \S+\.MyTensor"),
    "sparse": (lambda: pair(sparse_weight()), r"its weight has layout torch\.sparse_csr"),
    "complex": (
        lambda: pair(linear(dtype=torch.complex128), nn.Tanh()),
        r"its weight is torch\.complex128",
    ),
    "quantized": (
        quantized,
        r"is a torch\.ao\.nn\.quantized\S*\.Linear, which may compute",
    ),
    "scripted": (lambda: torch.jit.script(mlp()), "in a RecursiveScriptModule, "),
}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("make, reason", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_fuse_leaves_alone_and_reports(make: Callable[[], nn.Module], reason: str) -> None:
    model = make().eval()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    x = torch.randn(4, WIDTH, dtype=dtype)
    before, expected = identities(model), model(x)
    report = mlp_ext.fusion_report(model)
    assert {site.status for site in report} == {"not fused"}
    assert any(re.search(reason, site.reason) for site in report), report
    mlp_ext.fuse(model)
    assert identities(model) == before
    assert torch.equal(model(x), expected)


def test_lazy_linear_is_left_alone_until_it_is_a_linear() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    assert "has forward pre hooks" in sites(mlp_ext.fuse(model))["0"][2]
    model(torch.randn(4, WIDTH))
    assert fused_names(mlp_ext.fuse(model)) == ["0"]


HOOKS = {
    "register_forward_pre_hook": "forward pre hooks",
    "register_forward_hook": "forward hooks",
    "register_full_backward_pre_hook": "backward pre hooks",
    "register_full_backward_hook": "backward hooks",
    "register_backward_hook": "backward hooks",
}


@pytest.mark.parametrize("register, words", HOOKS.items(), ids=HOOKS)
@pytest.mark.parametrize("index", [0, 1], ids=["linear", "activation"])
def test_hook_keeps_a_pair_as_it_is(register: str, words: str, index: int) -> None:
    model = mlp()
    handle = getattr(model[index], register)(lambda *_: None)
    reason = f"has {words}" if index == 0 else f"its ReLU has {words}"
    assert sites(model)["0"] == (None, "not fused", reason)
    assert fused_names(mlp_ext.fuse(model)) == ["2"]
    handle.remove()
    assert fused_names(model) == ["0", "2"]


def test_hook_on_a_sequential_goes_on_firing() -> None:
    model = mlp()
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    output = mlp_ext.fuse(model)(torch.randn(4, WIDTH, dtype=torch.float64))
    assert fused_names(model) == ["0", "2"] and seen[0] is output


def test_parametrization_added_while_fused_holds_and_stays_after_unfuse() -> None:
    model, native = (mlp_ext.fuse(mlp()), mlp())
    native.load_state_dict(model.state_dict())
    results(model)
    for m in (model, native):
        torch.manual_seed(0)
        parametrizations.spectral_norm(m[0])
    assert fused_names(model) == ["2"]
    torch.testing.assert_close(results(model), results(native))
    torch.testing.assert_close(results(mlp_ext.unfuse(model)), results(native))


@pytest.mark.parametrize("modules", [pair(), pair()[::-1]], ids=["in order", "reversed"])
def test_sequential_with_a_forward_of_its_own_is_fused_as_it_calls(modules: nn.Sequential) -> None:
    model = (Doubled if isinstance(modules[0], nn.Linear) else Backwards)(*modules)
    expected = results(copy.deepcopy(model))
    assert len(fused_names(mlp_ext.fuse(model))) == 1
    torch.testing.assert_close(results(model), expected)


def test_class_that_registers_its_subclasses() -> None:
    class Registered(nn.Module):
        names: ClassVar[list[str]] = []

        def __init_subclass__(cls, name: str) -> None:
            cls.names.append(name)

        def __init__(self) -> None:
            super().__init__()
            self.fc = linear()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.fc(input=x))

    class Model(Registered, name="model"):
        pass

    model = Model()
    expected = results(copy.deepcopy(model))
    assert fused_names(mlp_ext.fuse(model)) == ["fc"] and Registered.names == ["model"]
    torch.testing.assert_close(results(model), expected)


@pytest.mark.parametrize("first", [linear, SameLinear], ids=["Linear", "a subclass"])
@pytest.mark.parametrize("second", [nn.ReLU, SameReLU], ids=["ReLU", "a subclass"])
def test_subclasses_that_compute_the_same_are_fused(
    first: Callable[[], nn.Module], second: Callable[[], nn.Module]
) -> None:
    model = pair(first(), second())
    expected = results(copy.deepcopy(model))
    assert fused_names(mlp_ext.fuse(model)) == ["0"]
    torch.testing.assert_close(results(model), expected)


def test_layer_written_by_the_user_stays() -> None:
    model = nn.Sequential(
        mlp_ext.LinearReLU(WIDTH, WIDTH), nn.Identity(), nn.Linear(WIDTH, 1), nn.Tanh()
    )
    before = identities(model)
    assert sites(model)["0"] == ("relu", "fused", "a LinearReLU")
    mlp_ext.unfuse(mlp_ext.fuse(model))
    assert identities(model) == before


def test_layers_taken_apart_while_fused_keep_what_they_compute() -> None:
    model = mlp_ext.fuse(mlp())
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    head, tail = model[:1], model[1:]
    expected = tail(head(x))
    torch.testing.assert_close(mlp_ext.unfuse(tail)(mlp_ext.unfuse(head)(x)), expected)


def test_the_level_can_be_changed() -> None:
    model = mlp()
    expected = results(copy.deepcopy(model))
    for level in ("layers", "stack", "layers"):
        mlp_ext.fuse(model, level)
        torch.testing.assert_close(results(model), expected)
        output = model(torch.randn(4, WIDTH, dtype=torch.float64))
        assert output.grad_fn.name() == ("MlpBackward" if level == "stack" else "LinearActBackward")


@pytest.mark.parametrize("level", ["layers", "stack"])
def test_unfuse_refuses_a_class_that_was_changed_again(level: str) -> None:
    class Sharded:
        pass

    model = mlp_ext.fuse(nn.Sequential(mlp()), level)
    model[0].__class__ = type("ShardedSequential", (Sharded, type(model[0])), {})
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(ValueError, match=r"unfuse: 0 is now a \S+ShardedSequential; undo first"):
        mlp_ext.unfuse(model)
    torch.testing.assert_close(model(x), expected)


# The report


def test_report_tells_of_every_linear() -> None:
    model = Net()
    code = "its output is not read by an activation alone"
    left = {
        "body.3": (None, "not fused", "followed by Softsign"),
        "skips.0": (None, "not fused", code),
        "head.2": (None, "not fused", "last in its Sequential"),
    }
    names = dict(zip(FUSIBLE, ["relu", "tanh", "sigmoid"], strict=True))
    before = identities(model)
    assert sites(model) == left | {name: (act, "would fuse", "") for name, act in names.items()}
    assert identities(model) == before
    mlp_ext.fuse(model)
    assert sites(model) == left | {name: (act, "fused", "") for name, act in names.items()}


def test_report_prints_one_line_for_each_linear() -> None:
    model = nn.Sequential(mlp(), nn.Linear(WIDTH, 2))
    model[0] = mlp_ext.fuse(model[0])
    assert str(mlp_ext.fusion_report(model)).splitlines() == [
        "layer  fused  with     reason",
        "0.0    yes    relu",
        "0.2    yes    sigmoid",
        "1      no              last in its Sequential",
    ]
    assert str(mlp_ext.fusion_report(linear(), "stack")).splitlines() == [
        "layer    fused  with  reason",
        "(model)  no           is the whole model",
    ]
    assert str(mlp_ext.fusion_report(model, "stack")).splitlines()[-1] == (
        "1      would be  (no activation)"
    )
    assert str(mlp_ext.fusion_report(nn.ReLU())) == "no Linear in this model"


def test_report_follows_a_compiled_model() -> None:
    assert list(sites(torch.compile(mlp(), backend="eager"))) == ["_orig_mod.0", "_orig_mod.2"]


# Errors


@pytest.mark.parametrize("function", [mlp_ext.fuse, mlp_ext.unfuse, mlp_ext.fusion_report])
@pytest.mark.parametrize(
    ("model", "what"),
    [([linear()], "list"), (nn.Sequential, "the class Sequential"), (None, "None")],
    ids=["list", "class", "None"],
)
def test_what_is_not_a_module_is_refused(
    function: Callable[[object], object], model: object, what: str
) -> None:
    with pytest.raises(TypeError, match=f"must be a torch.nn.Module, got {what}$"):
        function(model)


def test_unknown_level_is_refused() -> None:
    model = mlp()
    before = identities(model)
    with pytest.raises(ValueError, match=r"fuse: level must be one of .*layers.*, got 'all'"):
        mlp_ext.fuse(model, level="all")
    assert identities(model) == before
    assert fused_names(mlp_ext.fuse(model, level="layers")) == ["0", "2"]


# --- A fuse that changes nothing says so ---


@pytest.mark.parametrize("level", ["layers", "stack"])
def test_fuse_that_changes_nothing_warns_once(level: str) -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()])
    message = (
        "fuse changed nothing: 0 of the model's 2 Linear layers can be fused; "
        f'print fusion_report(model, "{level}") for the reasons, or use '
        'torch.compile(model, backend="mlp_ext"), which follows any code'
    )
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        mlp_ext.fuse(model, level=level)
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("level", ["layers", "stack"])
def test_fuse_that_fuses_or_has_fused_warns_not(level: str) -> None:
    written = nn.Sequential(mlp_ext.LinearReLU(4, 4), nn.Dropout(), nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mlp_ext.fuse(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), level=level)
        mlp_ext.fuse(model, level=level)
        mlp_ext.fuse(written, level=level)


def test_fuse_of_a_model_without_a_linear_warns() -> None:
    with pytest.warns(UserWarning, match="changed nothing: it has no Linear"):
        mlp_ext.fuse(nn.Sequential(nn.ReLU()))
