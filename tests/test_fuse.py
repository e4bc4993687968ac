"""fuse changes how a model computes and nothing else; unfuse gives the very same model back."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hypotheses import given, settings, st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import mlp_ext
from mlp_ext.nn import LinearAct

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
    return [name for name, m in model.named_modules() if isinstance(m, LinearAct)]


# What fuse does


def test_fuse_puts_a_layer_and_an_identity_in_place_of_each_pair() -> None:
    model = Net()
    assert mlp_ext.fuse(model) is model
    assert fused_names(model) == FUSIBLE
    assert type(model.body[0]) is mlp_ext.LinearReLU
    assert type(model.body[2][0]) is mlp_ext.LinearTanh
    assert type(model.head[0]) is mlp_ext.LinearSigmoid
    assert all(isinstance(m, nn.Identity) for m in (model.body[1], model.body[2][1], model.head[1]))
    assert "ReLU(inplace=True)" in repr(model.body[1])


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
    """Calls the layer before the activation and once more by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(pair())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x)) + self.layers[0](x)


class MyLinear(nn.Linear):
    pass


class MyReLU(nn.ReLU):
    pass


class MyTensor(Tensor):
    pass


def used_twice() -> nn.Module:
    first = linear()
    return nn.Sequential(first, nn.ReLU(inplace=True), first, nn.ReLU(inplace=True))


def used_elsewhere() -> nn.Module:
    first = linear()
    return nn.Sequential(nn.Sequential(first, nn.ReLU()), nn.Sequential(nn.Dropout(0.0), first))


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
        r"is a \S+\.MyLinear, not exactly a torch\.nn",
    ),
    "used twice": (used_twice, "used in 2 places"),
    "used elsewhere": (used_elsewhere, "used in 2 places"),
    "called by code": (Twice, "in a ModuleList, whose calls are code"),
    "own forward": (lambda: Doubled(*pair()), "in a Doubled, whose calls are code"),
    "own order": (lambda: Backwards(*pair()), "in a Backwards, whose calls are code"),
    "patched sequential": (
        lambda: changed(pair(), lambda m: setattr(m, "forward", lambda x: m[0](x))),
        "in a Sequential, whose calls are code",
    ),
    "patched linear": (
        lambda: pair(with_attribute(linear(), "forward", lambda x: x)),
        "^has an attribute of its own, 'forward'",
    ),
    "patched activation": (
        lambda: pair(second=with_attribute(nn.ReLU(), "forward", lambda x: x)),
        "^its ReLU has an attribute of its own, 'forward'",
    ),
    "attribute": (
        lambda: pair(with_attribute(linear(), "qconfig", 1)),
        "attribute of its own, 'qconfig'",
    ),
    "buffer": (
        lambda: pair(changed(linear(), lambda m: m.register_buffer("mask", None))),
        "attribute of its own, 'mask'",
    ),
    "child": (
        lambda: pair(changed(linear(), lambda m: m.add_module("lora", linear()))),
        "attribute of its own, 'lora'",
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
        r"is a torch\.ao\.nn\.quantized\S*\.Linear, not exactly a torch\.nn\.Linear",
    ),
    "scripted": (lambda: torch.jit.script(mlp()), "RecursiveScriptModule, not exactly"),
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
    assert "LazyLinear, not exactly" in sites(mlp_ext.fuse(model))["0"][2]
    model(torch.randn(4, WIDTH))
    assert fused_names(mlp_ext.fuse(model)) == ["0"]


HOOKS = {
    "register_forward_pre_hook": "forward pre hooks",
    "register_forward_hook": "forward hooks",
    "register_full_backward_pre_hook": "backward pre hooks",
    "register_full_backward_hook": "backward hooks",
    "register_backward_hook": "backward hooks",
    "register_state_dict_pre_hook": "state dict pre hooks",
    "register_state_dict_post_hook": "state dict hooks",
    "register_load_state_dict_pre_hook": "load state dict pre hooks",
    "register_load_state_dict_post_hook": "load state dict post hooks",
}


@pytest.mark.parametrize("register, words", HOOKS.items(), ids=HOOKS)
@pytest.mark.parametrize("index", [0, 1], ids=["linear", "activation"])
def test_hook_keeps_a_pair_as_it_is(register: str, words: str, index: int) -> None:
    model = mlp()
    handle = getattr(model[index], register)(lambda *_: None)
    reason = f"has {words}" if index == 0 else f"its ReLU has {words}"
    assert sites(model)["0"] == ("relu", "not fused", reason)
    assert fused_names(mlp_ext.fuse(model)) == ["2"]
    handle.remove()
    assert fused_names(mlp_ext.fuse(model)) == ["0", "2"]

    handle = getattr(model[index], register)(lambda *_: None)
    before = identities(model)
    with pytest.raises(ValueError, match=f"unfuse: 0 has {words}, which unfuse would lose"):
        mlp_ext.unfuse(model)
    assert identities(model) == before
    handle.remove()
    assert fused_names(mlp_ext.unfuse(model)) == []


def test_hook_on_a_sequential_goes_on_firing() -> None:
    model = mlp()
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    output = mlp_ext.fuse(model)(torch.randn(4, WIDTH, dtype=torch.float64))
    assert fused_names(model) == ["0", "2"] and seen[0] is output


def test_parametrization_added_while_fused_is_not_lost() -> None:
    model = mlp()
    before = identities(model)
    parametrizations.spectral_norm(mlp_ext.fuse(model)[0])
    with pytest.raises(
        ValueError, match="unfuse: 0 has an attribute of its own, 'parametrizations'"
    ):
        mlp_ext.unfuse(model)
    assert fused_names(model) == ["0", "2"]
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    expected = results(model)
    assert identities(mlp_ext.unfuse(model)) == before
    torch.testing.assert_close(results(model), expected)


def test_layer_written_by_the_user_stays() -> None:
    model = nn.Sequential(
        mlp_ext.LinearReLU(WIDTH, WIDTH), nn.Identity(), nn.Linear(WIDTH, 1), nn.Tanh()
    )
    before = identities(model)
    assert sites(model)["0"] == ("relu", "fused", "written as LinearReLU, which unfuse keeps")
    mlp_ext.unfuse(mlp_ext.fuse(model))
    assert identities(model) == before


def test_layers_taken_apart_while_fused_keep_what_they_compute() -> None:
    model = mlp_ext.fuse(mlp())
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    head, tail = model[:1], model[1:]
    expected = tail(head(x))
    torch.testing.assert_close(mlp_ext.unfuse(tail)(mlp_ext.unfuse(head)(x)), expected)


def test_layer_put_in_place_of_a_fused_one_stays() -> None:
    model = mlp_ext.fuse(mlp())
    model[0] = mlp_ext.LinearTanh(WIDTH, WIDTH, dtype=torch.float64)
    expected = results(model)
    mlp_ext.unfuse(model)
    assert fused_names(model) == ["0"]
    torch.testing.assert_close(results(model), expected)


# The report


def test_report_tells_of_every_linear() -> None:
    model = Net()
    code = "in a ModuleList, whose calls are code: write the fused layer there"
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
        "0.0  fused      relu",
        "0.2  fused      sigmoid",
        "1    not fused  -        last in its Sequential",
    ]
    assert str(mlp_ext.fusion_report(linear())) == "(model)  not fused  -  is the whole model"
    assert str(mlp_ext.fusion_report(nn.ReLU())) == "no Linear in this model"


def test_report_follows_a_compiled_model() -> None:
    assert list(sites(torch.compile(mlp(), backend="eager"))) == ["_orig_mod.0", "_orig_mod.2"]


# Errors


@pytest.mark.parametrize("function", [mlp_ext.fuse, mlp_ext.unfuse, mlp_ext.fusion_report])
@pytest.mark.parametrize("model", [[linear()], nn.Sequential, None], ids=str)
def test_what_is_not_a_module_is_refused(
    function: Callable[[object], object], model: object
) -> None:
    with pytest.raises(TypeError, match=f"must be a torch.nn.Module, got {type(model).__name__}$"):
        function(model)


def test_unknown_level_is_refused() -> None:
    model = mlp()
    before = identities(model)
    with pytest.raises(ValueError, match=r"fuse: level must be one of .*layers.*, got 'all'"):
        mlp_ext.fuse(model, level="all")
    assert identities(model) == before
    assert fused_names(mlp_ext.fuse(model, level="layers")) == ["0", "2"]


def test_error_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(linear: nn.Linear) -> LinearAct:
        raise RuntimeError("half way")

    model = mlp()
    before = identities(model)
    monkeypatch.setattr(mlp_ext.LinearSigmoid, "from_linear", fail)
    with pytest.raises(RuntimeError, match="half way"):
        mlp_ext.fuse(model)
    assert identities(model) == before


# --- A fuse that changes nothing says so ---


@pytest.mark.parametrize("level", ["layers", "stack"])
def test_fuse_that_changes_nothing_warns_once(level: str) -> None:
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()])
    message = (
        "fuse changed nothing: 0 of the model's 2 Linear layers can be fused; "
        f'fusion_report(model, "{level}") tells why'
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
