"""The layers are nn.Linear and an activation in one module, and nn.Linear in all but forward."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import mlp_ext
from mlp_ext.nn import LinearAct

LAYERS = [
    pytest.param(layer, module, id=layer.__name__) for module, layer in LinearAct.by_module.items()
]
each_layer = pytest.mark.parametrize("layer_class, module", LAYERS)

F64 = {"dtype": torch.float64}


def test_layers_are_public() -> None:
    names = "ReLU Sigmoid Tanh LeakyReLU ELU SELU SiLU GELU Softplus Hardtanh ReLU6 Mish"
    assert LinearAct.by_module.keys() >= {getattr(nn, name) for name in names.split()}
    for layer in LinearAct.by_module.values():
        assert getattr(mlp_ext, layer.__name__) is layer
        assert layer.__name__ in mlp_ext.__all__


@each_layer
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_layer_equals_linear_then_activation(
    layer_class: type[LinearAct], module: type[nn.Module], bias: bool, leading: tuple[int, ...]
) -> None:
    linear = nn.Linear(7, 5, bias=bias, **F64)
    layer = layer_class(7, 5, bias=bias, **F64)
    layer.load_state_dict(linear.state_dict())
    native = nn.Sequential(linear, module())
    x = torch.randn(*leading, 7, **F64)
    dy = torch.randn(*leading, 5, **F64)

    def results(model: nn.Module) -> list[Tensor]:
        input = x.clone().requires_grad_()
        output = model(input)
        return [output, *torch.autograd.grad(output, [input, *model.parameters()], dy)]

    torch.testing.assert_close(results(layer), results(native))


@each_layer
def test_layer_starts_as_linear_does(layer_class: type[LinearAct], module: type[nn.Module]) -> None:
    torch.manual_seed(1)
    linear = nn.Linear(7, 5)
    torch.manual_seed(1)
    layer = layer_class(7, 5)
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    options = module().extra_repr()
    expected = repr(linear).replace("Linear", layer_class.__name__)
    assert repr(layer) == expected.replace(")", f", {options})" if options else ")")


def test_layer_state_dict_is_linears_in_both_directions() -> None:
    linear, layer = nn.Linear(7, 5), mlp_ext.LinearReLU(7, 5)
    assert list(layer.state_dict()) == list(linear.state_dict())
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.weight, linear.weight)
    other = nn.Linear(7, 5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.bias, linear.bias)


def test_layer_learns_as_linear_then_activation_does() -> None:
    native = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid()).double()
    layers = nn.Sequential(mlp_ext.LinearReLU(10, 5), mlp_ext.LinearSigmoid(5, 1)).double()
    layers[0].load_state_dict(native[0].state_dict())
    layers[1].load_state_dict(native[2].state_dict())
    x, target = torch.randn(10, 10, **F64), torch.rand(10, 1, **F64)

    def losses(model: nn.Module) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        history = []
        for _ in range(10):
            loss = nn.functional.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
        return history

    torch.testing.assert_close(losses(layers), losses(native))


def test_layer_computes_gradients_only_for_what_requires_them() -> None:
    layer = mlp_ext.LinearReLU(7, 5)
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 7)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_layer_converts_as_linear_does(dtype: torch.dtype) -> None:
    converted = mlp_ext.LinearTanh(7, 5).to(dtype)
    made = mlp_ext.LinearTanh(7, 5, dtype=dtype)
    for layer in (converted, made):
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        assert layer(torch.randn(4, 7, dtype=dtype)).dtype == dtype


def test_layer_lives_on_meta_as_linear_does() -> None:
    layer = mlp_ext.LinearReLU(7, 5, device="meta")
    output = layer(torch.empty(4, 7, device="meta"))
    assert output.is_meta and output.shape == (4, 5)
    skipped = nn.utils.skip_init(mlp_ext.LinearReLU, 7, 5)
    assert {parameter.device.type for parameter in skipped.parameters()} == {"cpu"}


def test_layer_under_autocast_is_as_linear_then_activation() -> None:
    linear = nn.Linear(7, 5)
    layer = mlp_ext.LinearReLU.from_linear(linear)
    x = torch.randn(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = layer(x), torch.relu(linear(x))
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_layer_copy_is_equal_and_its_own(copied) -> None:  # type: ignore[no-untyped-def]
    layer = mlp_ext.LinearSigmoid(7, 5).eval()
    layer.bias.requires_grad_(False)
    twin = copied(layer)
    x = torch.randn(4, 7)
    assert type(twin) is mlp_ext.LinearSigmoid
    assert torch.equal(twin(x), layer(x))
    assert not twin.training and not twin.bias.requires_grad
    with torch.no_grad():
        twin.weight.zero_()
    assert layer.weight.any()


@each_layer
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_parameters(
    layer_class: type[LinearAct], module: type[nn.Module], bias: bool
) -> None:
    linear = nn.Linear(7, 5, bias=bias).eval()
    linear.weight.requires_grad_(False)
    random_state = torch.get_rng_state()
    layer = layer_class.from_linear(linear)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(layer) is layer_class
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (7, 5)
    assert not layer.training and not layer.weight.requires_grad
    layer.weight = nn.Parameter(torch.zeros(5, 7))
    assert linear.weight.any()


@pytest.mark.parametrize(
    "other, name",
    [
        (mlp_ext.LinearReLU(3, 2), "mlp_ext.nn.LinearReLU"),
        (nn.LazyLinear(3), "torch.nn.modules.linear.LazyLinear"),
        (nn.ReLU(), "torch.nn.modules.activation.ReLU"),
        (None, "builtins.NoneType"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_from_linear_refuses_what_is_not_exactly_a_linear(other: nn.Linear, name: str) -> None:
    with pytest.raises(TypeError, match=rf"LinearTanh\.from_linear: .*exactly.*, got {name}$"):
        mlp_ext.LinearTanh.from_linear(other)


def test_from_linear_refuses_to_lose_a_hook() -> None:
    linear = nn.Linear(3, 2)
    handle = linear.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="linear has forward hooks, which would be lost"):
        mlp_ext.LinearReLU.from_linear(linear)
    handle.remove()
    assert mlp_ext.LinearReLU.from_linear(linear).weight is linear.weight


def test_layer_is_one_statement() -> None:
    class Plain(LinearAct, activation="identity"):
        pass

    class Renamed(mlp_ext.LinearTanh):
        pass

    x = torch.randn(4, 7)
    linear = nn.Linear(7, 5)
    torch.testing.assert_close(Plain.from_linear(linear)(x), linear(x))
    torch.testing.assert_close(Renamed.from_linear(linear)(x), torch.tanh(linear(x)))
    assert {Plain, Renamed}.isdisjoint(LinearAct.by_module.values())


def test_layer_of_an_unknown_activation_cannot_be_stated() -> None:
    with pytest.raises(ValueError, match=r"Swish: activation must be one of .*relu.*, got 'swish'"):
        type("Swish", (LinearAct,), {}, activation="swish")
