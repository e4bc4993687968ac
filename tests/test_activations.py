"""Each activation with several values of its options: values and derivatives are PyTorch's, in the
function, in layers, in fused layers and in stacks, and options are kept and followed."""

import copy
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from references import activated, assert_matches_native
from shapes import DTYPES, Shape, grad_output, operands
from torch import Tensor, nn
from torch.nn import functional as F

import mlp_ext
from mlp_ext.nn import MODULES, Activation, LinearAct, activation_of
from mlp_ext.ops import PARAMETERS

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")

close = torch.testing.assert_close
F64 = {"dtype": torch.float64}


class Case(NamedTuple):
    module: type[nn.Module]
    options: dict[str, Any]
    activation: Activation  # that they stand for

    def __str__(self) -> str:
        return "-".join([self.module.__name__, *(f"{value}" for value in self.options.values())])

    @property
    def layer(self) -> type[LinearAct]:
        return LinearAct.by_module[self.module]


def _cases() -> Iterator[Case]:
    for name in ("ReLU", "Sigmoid", "Tanh", "SELU", "SiLU", "Mish"):
        yield Case(getattr(nn, name), {}, Activation(name.lower()))
    for slope in (0.01, 0.0, 0.2, 1.0, -0.5):
        yield Case(nn.LeakyReLU, {"negative_slope": slope}, Activation("leaky_relu", (slope,)))
    for alpha in (1.0, 0.3, 2.5, -0.7):
        yield Case(nn.ELU, {"alpha": alpha}, Activation("elu", (alpha,)))
    yield Case(nn.GELU, {"approximate": "none"}, Activation("gelu"))
    yield Case(nn.GELU, {"approximate": "tanh"}, Activation("gelu_tanh"))
    for beta, threshold in ((1.0, 20.0), (2.0, 1.5), (0.5, 20.0), (-1.5, 4.0)):
        options = {"beta": beta, "threshold": threshold}
        yield Case(nn.Softplus, options, Activation("softplus", (beta, threshold)))
    for low, high in ((-1.0, 1.0), (-0.25, 2.0), (0.5, 0.75)):
        options = {"min_val": low, "max_val": high}
        yield Case(nn.Hardtanh, options, Activation("hardtanh", (low, high)))
    yield Case(nn.ReLU6, {}, Activation("hardtanh", (0.0, 6.0)))


CASES = [*_cases()]
each = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_activation_is_covered_here() -> None:
    assert {case.activation.name for case in CASES} == set(mlp_ext.ACTIVATIONS) - {"identity"}
    assert {case.module for case in CASES} <= LinearAct.by_module.keys()
    assert MODULES.keys() == set(mlp_ext.ACTIVATIONS)


@pytest.mark.parametrize("name", mlp_ext.ACTIVATIONS)
def test_defaults_are_those_of_torch(name: str) -> None:
    z = torch.linspace(-30, 30, 601, **F64)
    one = torch.ones(1, 1, **F64)
    expected = MODULES[name]()(z)
    close(mlp_ext.linear_act(z[:, None], one, None, name)[:, 0], expected)
    parameters = [*PARAMETERS[name].values()]
    close(mlp_ext.linear_act(z[:, None], one, None, name, parameters)[:, 0], expected)


# --- Values and derivatives ---


def derivatives(
    function: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor
) -> dict[str, Tensor]:
    """The output, the first derivatives, and those of a function of the first."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves)
    first = torch.autograd.grad(output, leaves, dy, create_graph=True)
    # not all of a linear function's derivatives depend on its input
    second = torch.autograd.grad(
        sum(t.square().sum() for t in first), leaves, allow_unused=True, materialize_grads=True
    )
    return {"output": output.detach()} | {
        f"{order} {index}": t.detach()
        for order, found in (("first", first), ("second", second))
        for index, t in enumerate(found)
    }


SHAPES = [(6, 10, 5), (33, 65, 17), (0, 4, 3), (4, 1, 1)]


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_function_has_the_derivatives_of_torch(shape: tuple[int, int, int], case: Case) -> None:
    M, K, N = shape
    x, w, b = torch.randn(M, K, **F64), torch.randn(N, K, **F64), torch.randn(N, **F64)
    dy = torch.randn(M, N, **F64)
    name, parameters = case.activation

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return mlp_ext.linear_act(x, w, b, name, parameters=[*parameters])

    def torchs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return case.module(**case.options)(F.linear(x, w, b))

    close(derivatives(ours, [x, w, b], dy), derivatives(torchs, [x, w, b], dy))


def native(case: Case, *widths: int) -> nn.Sequential:
    layers = [
        m for k, n in pairwise(widths) for m in (nn.Linear(k, n), case.module(**case.options))
    ]
    return nn.Sequential(*layers).double()


def written(model: nn.Sequential, case: Case) -> nn.Sequential:
    layers = [case.layer.from_linear(m, **case.options) for m in [*model][::2]]
    return nn.Sequential(*layers)


MODELS: dict[str, Callable[[nn.Sequential, Case], nn.Module]] = {
    "layers": written,
    "stack of layers": lambda model, case: mlp_ext.Sequential(*written(model, case)),
    "fused layers": lambda model, case: mlp_ext.fuse(model),
    "stack": lambda model, case: mlp_ext.fuse(model, level="stack"),
    "stack of fused layers": lambda model, case: mlp_ext.fuse(mlp_ext.fuse(model), level="stack"),
}


@each
@pytest.mark.parametrize("kind", MODELS)
def test_model_has_the_derivatives_of_torch(kind: str, case: Case) -> None:
    plain = native(case, 7, 20, 9, 3)
    model = MODELS[kind](copy.deepcopy(plain), case)
    x, dy = torch.randn(11, 7, **F64), torch.randn(11, 3, **F64)

    def of(model: nn.Module) -> dict[str, Tensor]:
        names = [name for name, _ in model.named_parameters()]

        def function(x: Tensor, *parameters: Tensor) -> Tensor:
            named = dict(zip(names, parameters, strict=True))
            found: Tensor = torch.func.functional_call(model, named, (x,))
            return found

        return derivatives(function, [x, *model.parameters()], dy)

    close(of(model), of(plain))

    def gradients(model: nn.Module) -> list[Tensor | None]:  # by backward(), as users take them
        model(x).backward(dy)
        return [p.grad for p in model.parameters()]

    close(gradients(model), gradients(plain))


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [Shape((50,), 40, 30), Shape((3,), 9, 5)], ids=str)
def test_results_are_as_accurate_as_those_of_torch(
    shape: Shape, dtype: torch.dtype, case: Case
) -> None:
    name, parameters = case.activation
    dy = grad_output(shape, dtype)
    assert_matches_native(operands(shape, dtype), name, dy, parameters=parameters)


AWKWARD = [0.0, -0.0, 1e-30, -1e-30, 1e-3, -1e-3, 1.0, -1.0, 6.0, 19.9, 20.1, -20.1, 88.0, -88.0]
AWKWARD += [100.0, -100.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan]


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_awkward_values_are_those_of_torch(rows: int, dtype: torch.dtype, case: Case) -> None:
    """NaN, infinities and saturated values: in the output and in its derivative."""
    name, parameters = case.activation
    # z itself, the same in each row: x = 0 and W = 0, and the bias is z
    z = torch.tensor(AWKWARD, dtype=dtype)

    def results(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = z.clone().requires_grad_()
        output = function(leaf)
        (slope,) = torch.autograd.grad(output.sum(0), leaf, torch.ones_like(leaf))
        return output.detach(), slope / rows

    x, w = z.new_zeros(rows, 2), z.new_zeros(len(z), 2)
    found = results(lambda leaf: mlp_ext.linear_act(x, w, leaf, name, parameters))
    expected = results(lambda leaf: activated(F.linear(x, w, leaf), name, parameters))
    exact = results(lambda leaf: activated(F.linear(x, w, leaf).double(), name, parameters))
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # Where f(z) is the difference of close numbers, PyTorch's own error is eps of them.
    for actual, reference, double in zip(found, expected, exact, strict=True):
        # PyTorch's gelu of inf is NaN in float32 and inf in float64: either is right. At NaN its
        # derivatives of elu, selu and hardtanh differ between vectors and the elements after them.
        known = reference.isnan() == double.isnan()
        if actual is found[1] and name in ("elu", "selu", "hardtanh"):
            known &= ~z.isnan()
        assert known.double().mean() > 0.9
        close(
            actual[known], reference[known], rtol=8 * eps, atol=max(4 * eps, tiny), equal_nan=True
        )


# --- Options ---


@each
def test_activation_of_reads_the_options(case: Case) -> None:
    module = case.module(**case.options)
    assert activation_of(module) == case.activation
    if "inplace" in getattr(case.module, "__constants__", ()):
        assert activation_of(case.module(**case.options, inplace=True)) == case.activation
    Other = type("Other", (case.module,), {"forward": nn.Identity.forward})
    assert activation_of(Other(**case.options)) is None
    Same = type("Same", (case.module,), {})
    assert activation_of(Same(**case.options)) == case.activation


@pytest.mark.parametrize("module", [nn.Identity(), nn.PReLU(), nn.Linear(1, 1), None], ids=str)
def test_activation_of_knows_activations_alone(module: nn.Module | None) -> None:
    assert activation_of(module) is None


@each
def test_layer_has_the_options_of_the_module(case: Case) -> None:
    layer = case.layer(7, 5, **case.options)
    assert (layer.activation, layer.activation_parameters) == case.activation
    for name, value in case.options.items():
        assert getattr(layer, name) == value
    options = case.module(**case.options).extra_repr()
    assert repr(layer).endswith(f"bias=True, {options})" if options else "bias=True)")


SOME = ("Mish", "LeakyReLU-0.2", "GELU-tanh", "ReLU6")
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in SOME], ids=str)
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", MODELS)
def test_copies_keep_the_options(kind: str, copied: str, case: Case) -> None:
    model = MODELS[kind](native(case, 7, 5), case)
    x = torch.randn(4, 7, **F64)
    expected, text = model(x), repr(model)
    twin = COPIES[copied](model)
    assert repr(twin) == text
    assert torch.equal(twin(x), expected)


@each
@pytest.mark.parametrize("level", ["layers", "stack"])
def test_fuse_and_back(level: str, case: Case) -> None:
    model = native(case, 7, 5, 3)
    text, modules = repr(model), [*model]
    expected = model(torch.ones(4, 7, **F64))
    planned = mlp_ext.fusion_report(model, level)
    assert {(s.activation, s.status) for s in planned} == {(case.activation.name, "would fuse")}
    mlp_ext.fuse(model, level)
    assert {(s.activation, s.status) for s in mlp_ext.fusion_report(model, level)} == {
        (case.activation.name, "fused")
    }
    close(model(torch.ones(4, 7, **F64)), expected)
    mlp_ext.unfuse(model)
    assert repr(model) == text
    assert all(a is b for a, b in zip(model, modules, strict=True))


CHANGES: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "leaky_relu": (nn.LeakyReLU(), {"negative_slope": 0.3}),
    "elu": (nn.ELU(), {"alpha": 0.5}),
    "gelu": (nn.GELU(), {"approximate": "tanh"}),
    "softplus": (nn.Softplus(), {"beta": 3.0, "threshold": 0.5}),
    "hardtanh": (nn.Hardtanh(), {"min_val": -0.1, "max_val": 0.2}),
    "relu6": (nn.ReLU6(), {"max_val": 0.3}),
}


@pytest.mark.parametrize(
    ("change", "level", "compiled"),
    [
        *((change, level, False) for change in CHANGES for level in ("layers", "stack", "both")),
        *(
            (change, level, True)
            for change in ("leaky_relu", "gelu")
            for level in ("layers", "stack")
        ),
    ],
)
def test_change_of_an_option_holds_from_the_next_call(
    change: str, level: str, compiled: bool
) -> None:
    activation, options = CHANGES[change]
    plain = nn.Sequential(nn.Linear(7, 9), copy.deepcopy(activation), nn.Linear(9, 3)).double()
    model = copy.deepcopy(plain)
    for one in ("layers", "stack") if level == "both" else (level,):
        mlp_ext.fuse(model, one)
    torch.compiler.reset()
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    x = torch.randn(20, 7, **F64)
    before = plain(x)
    close(run(x), before)
    for name, value in options.items():
        setattr(model[1], name, value)
        setattr(plain[1], name, value)
        assert getattr(model[1], name) == value
    assert not torch.equal(plain(x), before)
    close(run(x), plain(x))
    assert repr(mlp_ext.unfuse(model)) == repr(plain)


def test_fused_layers_follow_an_activation_that_is_in_several_places() -> None:
    shared = nn.LeakyReLU()
    first, second = (
        nn.Sequential(nn.Linear(7, 7), shared, nn.Linear(7, 7), shared).double() for _ in range(2)
    )
    plain = copy.deepcopy(first)
    mlp_ext.fuse(first)
    x = torch.randn(20, 7, **F64)
    first[3].negative_slope = 0.4
    assert second[1].negative_slope == shared.negative_slope == 0.4
    plain[1].negative_slope = 0.4
    close(first(x), plain(x))
    shared.negative_slope = plain[1].negative_slope = 0.7
    close(first(x), plain(x))


def test_change_of_a_written_layer_holds_in_a_stack() -> None:
    layer = mlp_ext.LinearLeakyReLU(7, 5, negative_slope=0.2, **F64)
    stack = mlp_ext.Sequential(layer, nn.Linear(5, 3, **F64))
    x = torch.randn(20, 7, **F64)
    stack(x)
    layer.negative_slope = 0.6
    assert layer.activation_parameters == (0.6,)
    close(stack(x), stack[1](F.leaky_relu(F.linear(x, layer.weight, layer.bias), 0.6)))


def test_options_that_are_wrong_are_named() -> None:
    with pytest.raises(TypeError, match=r"^LinearELU: got an unexpected keyword argument 'slope'$"):
        mlp_ext.LinearELU(3, 2, slope=0.1)
    with pytest.raises(
        TypeError, match=r"^LinearReLU: got an unexpected keyword argument 'alpha'$"
    ):
        mlp_ext.LinearReLU.from_linear(nn.Linear(3, 2), alpha=0.1)
    with pytest.raises(ValueError, match=r"^LinearGELU: approximate='erf' is not supported$"):
        mlp_ext.LinearGELU(3, 2, approximate="erf")
    layer = mlp_ext.LinearLeakyReLU(3, 2)
    layer.negative_slope = "steep"
    with pytest.raises(ValueError, match=r"^LinearLeakyReLU: negative_slope='steep' is not supp"):
        layer(torch.ones(4, 3))
    with pytest.raises(AttributeError, match=r"LinearLeakyReLU follows from negative_slope$"):
        layer.activation_parameters = (0.1,)


def test_operator_mlp_takes_the_parameters_of_all_layers_in_order() -> None:
    widths = [7, 6, 5, 4]
    ws = [torch.randn(n, k, **F64) for k, n in pairwise(widths)]
    names, parameters = ["leaky_relu", "relu", "softplus"], [0.3, 2.0, 1.0]
    x = expected = torch.randn(9, 7, **F64)
    for w, name, taken in zip(ws, names, ([0.3], [], [2.0, 1.0]), strict=True):
        expected = activated(F.linear(expected, w), name, taken)
    close(torch.ops.mlp_ext.mlp(x, ws, [None] * 3, names, parameters), expected)
    for wrong in (parameters[:2], [*parameters, 1.0]):
        with pytest.raises(ValueError, match="mlp: parameters must be those of all activations"):
            torch.ops.mlp_ext.mlp(x, ws, [None] * 3, names, wrong)
