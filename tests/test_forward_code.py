"""fuse changes how a model's forward computes and nothing else, for models written in code."""

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import EXAMPLES, Example
from pairs import executed_pairs, found_by_compile, found_by_fuse, yardstick
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

import mlp_ext

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fuse changed nothing"),
]

LEVELS = ["layers", "stack"]
every_model = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
# The quick tests take every fourth.
some_models = pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, id=name, marks=[] if i % 4 == 0 else [pytest.mark.slow])
        for i, (name, example) in enumerate(EXAMPLES.items())
    ],
)


def results(model: nn.Module, inputs: tuple[Any, ...], training: bool = True) -> dict[str, Any]:
    """Outputs, gradients by name and buffers after one forward and backward from one seed."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(2)
    inputs = tuple(
        x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    )
    output = model(*inputs)
    leaves = tree_leaves(output)
    if any(leaf.requires_grad for leaf in leaves):
        torch.manual_seed(3)
        sum((leaf * torch.randn_like(leaf)).sum() for leaf in leaves).backward()
    return {
        "output": output,
        "inputs": [x.grad for x in inputs if isinstance(x, Tensor)],
        "parameters": {name: p.grad for name, p in model.named_parameters()},
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def assert_equal(model: nn.Module, native: nn.Module, *inputs: Any) -> None:
    """Both give the same results, in training and in evaluation."""
    for training in (True, False, True):
        torch.testing.assert_close(
            results(model, inputs, training), results(native, inputs, training)
        )


def linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Each nn.Linear with its parent and its name there."""
    return [
        (parent, name, child)
        for parent in [*model.modules()]
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]


# The examples themselves


@every_model
def test_example_executes_its_pairs(example: Example) -> None:
    assert executed_pairs(example.model(), example.batch()) == example.pairs


# What fuse keeps


@every_model
@pytest.mark.parametrize("level", LEVELS)
def test_values_and_gradients(example: Example, level: str) -> None:
    native, fused = example.model(), mlp_ext.fuse(example.model(), level=level)
    assert_equal(fused, native, *example.batch())


@some_models
@pytest.mark.parametrize("level", LEVELS)
def test_class_children_keys_and_repr(example: Example, level: str) -> None:
    native, model = example.model(), example.model()
    before = [(name, id(m)) for name, m in model.named_modules()]
    fused = mlp_ext.fuse(model, level=level)
    fused(*example.batch())
    assert fused is model
    assert type(fused).__name__ == type(native).__name__ and isinstance(fused, type(native))
    assert [(name, id(m)) for name, m in fused.named_modules()] == before
    assert [*fused.state_dict()] == [*native.state_dict()]
    assert repr(fused) == repr(native)


@some_models
def test_copy(example: Example) -> None:
    fused = mlp_ext.fuse(example.model())
    fused(*example.batch())
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    native = example.model()
    native(*example.batch())  # batch normalization counts its calls
    assert_equal(fused, native, *example.batch())  # the copy has its own weights
    native.load_state_dict(twin.state_dict())
    assert_equal(twin, native, *example.batch())


@some_models
def test_saved_and_loaded(example: Example) -> None:
    fused, file = mlp_ext.fuse(example.model()), io.BytesIO()
    fused(*example.batch())
    native = example.model()
    native.load_state_dict(fused.state_dict())
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded).__name__ == type(native).__name__
    assert_equal(loaded, native, *example.batch())


@some_models
def test_unfuse(example: Example) -> None:
    model, native = example.model(), example.model()
    attributes = sorted(vars(model))
    types = [type(m) for m in model.modules()]
    mlp_ext.fuse(model)(*example.batch())
    native(*example.batch())  # batch normalization counts its calls
    native.load_state_dict(model.state_dict())
    assert mlp_ext.unfuse(model) is model
    assert [type(m) for m in model.modules()] == types and sorted(vars(model)) == attributes
    assert_equal(model, native, *example.batch())


# What changes later takes effect in the next call


def hooks(model: nn.Module) -> None:
    for _, _, linear in linears(model):
        linear.register_forward_hook(lambda module, args, output: output - 0.3)


def backward_hooks(model: nn.Module) -> None:
    for _, _, linear in linears(model):
        linear.register_full_backward_hook(lambda module, grads, _: tuple(2 * g for g in grads))


def other_linears(model: nn.Module) -> None:
    for parent, name, linear in linears(model):
        torch.manual_seed(7)
        setattr(parent, name, nn.Linear(linear.in_features, linear.out_features))


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:  # weight and bias, which some models read
        base = vars(self)["_modules"].get("base")
        return getattr(base, name) if base and name != "base" else super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + 0.1 * input.sum(-1, keepdim=True)


def adapters(model: nn.Module) -> None:
    for parent, name, linear in linears(model):
        setattr(parent, name, Adapter(linear))


def other_activations(model: nn.Module) -> None:
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU | nn.GELU | nn.SiLU | nn.ELU | nn.LeakyReLU | nn.Tanh):
                setattr(parent, name, nn.Softsign())


def forwards(model: nn.Module) -> None:
    for _, _, linear in linears(model):
        linear.forward = lambda input, m=linear: F.linear(input, 2 * m.weight, m.bias)  # type: ignore


def parametrized(model: nn.Module) -> None:
    for _, _, linear in linears(model):
        parametrizations.weight_norm(linear)
        with torch.no_grad():
            linear.parametrizations.weight.original0.mul_(1.5)


def assigned(model: nn.Module) -> None:
    state = {k: v.clone() * 0.5 for k, v in model.state_dict().items() if v.is_floating_point()}
    model.load_state_dict(state, assign=True, strict=False)


def data_written(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 0.5


def frozen(model: nn.Module) -> None:
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)


def initialized_by_type(model: nn.Module) -> None:
    def init(module: nn.Module) -> None:
        if type(module) == nn.Linear:  # noqa: E721  as in PyTorch's documentation
            nn.init.constant_(module.weight, 0.05)

    model.apply(init)


CHANGES = [
    hooks,
    backward_hooks,
    other_linears,
    adapters,
    other_activations,
    forwards,
    parametrized,
    assigned,
    data_written,
    frozen,
    initialized_by_type,
]
IN_PLACE = {"Statements", "Generator", "InPlace"}


# The quick tests take each change with some models, and each model with some changes.
MODELS_AND_CHANGES = [
    pytest.param(
        *(example, change),
        id=f"{name}-{change.__name__}",
        marks=[] if (i + j) % 6 == 0 else [pytest.mark.slow],
    )
    for i, (name, example) in enumerate(EXAMPLES.items())
    for j, change in enumerate(CHANGES)
]


@pytest.mark.slow
@pytest.mark.parametrize(("example", "change"), MODELS_AND_CHANGES)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_later_change(example: Example, change: Callable[[nn.Module], None]) -> None:
    if change is backward_hooks and example.make.__name__ in IN_PLACE:
        pytest.skip("PyTorch refuses backward hooks before in-place operations")
    native, fused = example.model(), mlp_ext.fuse(example.model())
    fused(*example.batch())
    native(*example.batch())
    change(native)
    change(fused)
    assert_equal(fused, native, *example.batch())


def grown(name: str) -> Callable[[nn.Module], object]:
    def grow(model: nn.Module) -> None:
        torch.manual_seed(7)
        getattr(model, name).insert(1, nn.Linear(*getattr(model, name)[1].weight.shape))

    return grow


def times_two(model: nn.Module, name: str) -> None:
    method = getattr(model, name)
    setattr(model, name, lambda *args: 2 * method(*args))


SETTINGS: list[tuple[str, str, Callable[[Any], object]]] = [
    ("Flag", "activate", lambda m: setattr(m, "activate", False)),
    ("Flag", "factor", lambda m: setattr(m, "factor", 3.0)),
    ("EarlyReturn", "features_only", lambda m: setattr(m, "features_only", True)),
    ("Activations", "kind", lambda m: setattr(m, "kind", "relu")),
    ("Activations", "replaced", lambda m: m.activations.update({"gelu": nn.Softsign()})),
    ("ByName", "activation", lambda m: setattr(m, "activation", "tanh")),
    ("FunctionAttribute", "act", lambda m: setattr(m, "act", torch.tanh)),
    ("SharedActivation", "negative_slope", lambda m: setattr(m.act, "negative_slope", 0.7)),
    ("SharedActivation", "act", lambda m: setattr(m, "act", nn.Tanh())),
    ("Zip", "alpha", lambda m: setattr(m.activations[1], "alpha", 2.0)),
    ("Statements", "p", lambda m: setattr(m.dropout, "p", 0.9)),
    ("Statements", "dropout", lambda m: setattr(m, "dropout", nn.Identity())),
    ("Statements", "dropout_in_eval", lambda m: m.dropout.register_forward_pre_hook(_eval)),
    ("Configured", "function", lambda m: setattr(m.intermediate, "intermediate_act_fn", F.relu)),
    ("Configured", "p", lambda m: setattr(m.output.dropout, "p", 0.9)),
    ("GaussianPolicy", "buffer", lambda m: m.scale.fill_(5.0)),
    ("GaussianPolicy", "other_buffer", lambda m: setattr(m, "scale", torch.tensor(7.0))),
    ("GraphNet", "parameter", lambda m: m.conv1.eps.data.fill_(1.0)),
    ("GraphNet", "method", lambda m: times_two(m.conv1, "message")),
    ("Autoencoder", "method", lambda m: times_two(m, "encode")),
    ("Functional", "own_forward", lambda m: times_two(m, "forward")),
    ("NeRF", "skips", lambda m: (setattr(m, "skips", (2,)), m.points.insert(3, m.points.pop(2)))),
    ("Loop", "inserted", grown("layers")),
    ("Loop", "popped", lambda m: m.layers.pop(0)),
    ("PINN", "inserted", grown("linears")),
    ("ResidualNet", "eps", lambda m: setattr(m.blocks[0].norm, "eps", 0.5)),
    ("Mixer", "norm", lambda m: setattr(m.tokens, "norm", nn.LayerNorm(12))),
    ("Tied", "untied", lambda m: setattr(m.fc2, "weight", nn.Parameter(torch.ones(8, 8)))),
]


def _eval(module: nn.Module, args: object) -> None:
    module.training = False


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, setting, change", SETTINGS, ids=[f"{n}-{s}" for n, s, _ in SETTINGS]
)
def test_later_setting(name: str, setting: str, change: Callable[[Any], object]) -> None:
    example = EXAMPLES[name]
    native, fused = example.model(), mlp_ext.fuse(example.model())
    assert_equal(fused, native, *example.batch())
    change(native)
    change(fused)
    assert_equal(fused, native, *example.batch())
    assert_equal(mlp_ext.unfuse(fused), native, *example.batch())


def test_training_of_one_child() -> None:
    for training in (True, False):
        native, fused = EXAMPLES["Statements"].model(), mlp_ext.fuse(EXAMPLES["Statements"].model())
        for model in (native, fused):
            model.train(not training)
            model(*rows())
            model.dropout.train(training)
        torch.manual_seed(3)
        expected = native(*rows())
        torch.manual_seed(3)
        torch.testing.assert_close(fused(*rows()), expected)


# Inputs


def rows(count: int = 4, sign: float = 1.0) -> tuple[Tensor]:
    return (sign * torch.rand(count, 8, generator=torch.Generator().manual_seed(1)),)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_branch_on_data(sign: float) -> None:
    native, fused = EXAMPLES["DataBranch"].model(), mlp_ext.fuse(EXAMPLES["DataBranch"].model())
    assert_equal(fused, native, *rows(sign=-sign))
    assert_equal(fused, native, *rows(sign=sign))


def test_optional_arguments() -> None:
    native, fused = EXAMPLES["Masked"].model(), mlp_ext.fuse(EXAMPLES["Masked"].model())
    mask = (torch.arange(16) % 2).float()
    for args in [rows(), (*rows(), mask), (*rows(), None, 3.0), (*rows(), mask, 0.5), rows(7)]:
        assert_equal(fused, native, *args)
    torch.testing.assert_close(fused(*rows(), scale=2.0), native(*rows(), scale=2.0))
    torch.testing.assert_close(fused(x=rows()[0], mask=mask), native(x=rows()[0], mask=mask))


@pytest.mark.parametrize("name", ["Functional", "Digits", "Loop", "Regression", "Recommender"])
@pytest.mark.parametrize("count", [1, 3, 0])
def test_other_batch_sizes(name: str, count: int) -> None:
    example = EXAMPLES[name]
    native, fused = example.model(), mlp_ext.fuse(example.model())
    fused(*example.batch())
    if name == "Digits" and count == 0:
        pytest.skip("view(0, -1) is an error in PyTorch too")
    assert_equal(fused, native, *(x[:count] for x in example.batch()))


@pytest.mark.parametrize("name", ["Functional", "Methods", "Loop"])
def test_errors(name: str) -> None:
    fused = mlp_ext.fuse(EXAMPLES[name].model())
    with pytest.raises(RuntimeError, match=r"weight must be \[N, K=9\]"):
        fused(torch.randn(4, 9))
    with pytest.raises((RuntimeError, TypeError), match="int64"):
        fused(torch.ones(4, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        fused([[0.0] * 8])
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fused()


class BeforeAndAfter(nn.Module):
    """The result of the Linear is used beside the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.fc(x)
        return F.relu(z), z


def test_result_of_the_linear_that_is_used_twice() -> None:
    torch.manual_seed(0)
    native = BeforeAndAfter()
    assert_equal(mlp_ext.fuse(copy.deepcopy(native)), native, *rows())


class Impure(nn.Module):
    """A forward with effects of its own: a counter, a list, a print."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls, self.seen = nn.Linear(8, 4), 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        print(f"call {self.calls}")
        h = F.relu(self.fc(x))
        self.seen.append(h)
        return h * self.calls


def test_effects_of_forward(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    native = Impure()
    fused = mlp_ext.fuse(copy.deepcopy(native))
    capsys.readouterr()
    assert fused.calls == 0 and not fused.seen
    outputs, prints = [], []
    for model in (native, fused):
        outputs.append([model(*rows()) for _ in range(3)])
        prints.append(capsys.readouterr().out)
    torch.testing.assert_close(outputs[1], outputs[0])
    assert prints == ["call 1\ncall 2\ncall 3\n"] * 2
    assert fused.calls == 3 and [h is not None for h in fused.seen] == [True] * 3
    torch.testing.assert_close(fused.seen, native.seen)


class Noisy(nn.Module):
    """Reads what torch.fx cannot see: a global, the shape, the random generator of Python."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc(x))
        if x.shape[0] > 2:
            h = h * 2
        if torch.is_grad_enabled():
            h = h + 1
        return h * self.scale


def test_branches_on_shape_and_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    native = Noisy()
    fused = mlp_ext.fuse(copy.deepcopy(native))
    for count in (4, 1, 4):
        assert_equal(fused, native, *rows(count))
        with torch.no_grad():
            torch.testing.assert_close(fused(*rows(count)), native(*rows(count)))
    monkeypatch.setattr(Noisy, "scale", 5.0)
    assert_equal(fused, native, *rows())


# What is found


def test_report_says_why_code_is_left_alone() -> None:
    for example in EXAMPLES.values():
        if not example.followed:
            report = [*mlp_ext.fusion_report(example.model())]
            assert report
            assert all(site.status == "not fused" and site.reason for site in report)


@pytest.mark.slow
def test_compiled_by_the_backend() -> None:
    for name in ("DataBranch", "Encoder", "Functional", "Dropouts"):
        example = EXAMPLES[name]
        native = example.model().eval()
        compiled = torch.compile(example.model(), backend="mlp_ext")
        torch.testing.assert_close(
            results(compiled, example.batch(), training=False)["output"],
            results(native, example.batch(), training=False)["output"],
        )
        assert found_by_compile(example) == example.pairs


@pytest.mark.slow
def test_yardstick() -> None:
    rows = yardstick()
    tutorials = [row for row in rows if row.group == "tutorial"]
    for part, least in ((rows, 120 / 135), (tutorials, 25 / 27)):
        found, pairs = sum(row.found for row in part), sum(row.pairs for row in part)
        missing = [f"{row.name} {row.found}/{row.pairs}" for row in part if row.found < row.pairs]
        assert found >= least * pairs, f"{found} of {pairs} pairs: {', '.join(missing)}"
        assert all(row.found <= row.pairs for row in part)


@pytest.mark.slow
def test_fuse_alone_finds_most() -> None:
    found = sum(found_by_fuse(example) for example in EXAMPLES.values())
    assert found >= 0.88 * sum(example.pairs for example in EXAMPLES.values())


def test_signature_is_that_of_the_model() -> None:
    """transformers' Trainer, torch.export and torch.fx read it."""
    for name in ("Masked", "Dictionary", "Siamese"):
        native, fused = EXAMPLES[name].model(), mlp_ext.fuse(EXAMPLES[name].model())
        assert inspect.signature(fused.forward) == inspect.signature(native.forward)
