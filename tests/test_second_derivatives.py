"""Derivatives beyond the first are torch's own: which are zero, missing, or finite."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from references import EACH_KIND, activated
from torch import Tensor, nn

import mlp_ext

pytestmark = pytest.mark.usefixtures("one_thread")
close = torch.testing.assert_close
Map = Callable[[Tensor], Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)]
    return nn.Sequential(*layers).double()


def function(x: Tensor, layers: nn.Module) -> Tensor:
    """The same network, by the function."""
    linears = [m for m in layers if isinstance(m, nn.Linear)]
    for linear in linears[:-1]:
        x = mlp_ext.linear_relu(x, linear.weight, linear.bias)
    return F.linear(x, linears[-1].weight, linears[-1].bias)


def models() -> dict[str, Map]:
    plain = net()
    return {
        "native": plain,
        "layers": mlp_ext.fuse(copy.deepcopy(plain), level="layers"),
        "stack": mlp_ext.fuse(copy.deepcopy(plain), level="stack"),
        "function": lambda x: function(x, plain),
    }


KINDS = ["layers", "stack", "function"]


def slope(model: Map, x: Tensor) -> Tensor:
    return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_of_a_relu_network_have_the_derivatives_of_native(kind: str) -> None:
    found = []
    for name in ("native", kind):
        model, x = models()[name], torch.ones(5, 3, dtype=torch.double, requires_grad=True)
        (second,) = torch.autograd.grad(slope(model, x).sum(), x)
        found.append(second)
    assert not found[0].any()
    assert torch.equal(*found)


@pytest.mark.parametrize("frozen", [False, True], ids=["learning", "frozen"])
@pytest.mark.parametrize("kind", ["layers", "stack"])
def test_a_loss_on_slopes_gives_every_parameter_the_gradient_of_native(
    kind: str, frozen: bool
) -> None:
    """Zeros, not None, for the hidden biases, so that weight decay reaches them."""
    gradients = []
    for name in ("native", kind):
        model = models()[name]
        assert isinstance(model, nn.Module)
        model.requires_grad_(not frozen)
        x = torch.randn(5, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        (slope(model, x.requires_grad_()) - 1).square().mean().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    for expected, actual in zip(*gradients, strict=True):
        assert (expected is None) == (actual is None)
        close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_strict_hessian_of_a_relu_network(kind: str) -> None:
    x = torch.ones(3, dtype=torch.double)
    native, fused = (models()[name] for name in ("native", kind))
    hessian = torch.autograd.functional.hessian
    expected = hessian(lambda q: native(q).sum(), x, strict=True)
    close(hessian(lambda q: fused(q).sum(), x, strict=True), expected)


EXTREMES = {
    torch.float16: [-12.0, -11.0, 12.0],
    torch.bfloat16: [-100.0, -90.0, 100.0],
    torch.float32: [-100.0, -89.0, 100.0],
    torch.float64: [-800.0, -710.0, 800.0],
}
TRANSFORMS: dict[str, Callable[[Map, Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(lambda q: f(q).sum())(x),
    "vmap_of_grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda q: f(q).sum()))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda q: f(q).sum())(x),
    "double_backward": lambda f, x: torch.autograd.grad(
        slope(lambda q: f(q).square(), x.requires_grad_()).sum(), x
    )[0],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", EXTREMES, ids=str)
@pytest.mark.parametrize("activation", EACH_KIND)
@pytest.mark.parametrize("stack", [False, True], ids=["layer", "stack"])
def test_extremal_values_under_every_transform(
    activation: str, dtype: torch.dtype, transform: str, stack: bool
) -> None:
    weight = torch.ones(1, 1, dtype=dtype)

    def native(x: Tensor) -> Tensor:
        return activated(F.linear(x, weight), activation)

    def fused(x: Tensor) -> Tensor:
        if stack:
            return torch.ops.mlp_ext.mlp(x, [weight], [None], [activation])
        return mlp_ext.linear_act(x, weight, None, activation)

    values = [*EXTREMES[dtype], -torch.inf, torch.inf, torch.nan, 0.0]
    x = torch.tensor(values, dtype=dtype).unsqueeze(1)
    run = TRANSFORMS[transform]
    found, expected = run(fused, x.clone()), run(native, x.clone())
    if (activation, transform) == ("mish", "double_backward"):
        # Of a large z PyTorch's is NaN, since it computes exp(z).
        expected = found.where(expected.isnan() & x.isfinite(), expected)
        assert expected[x.isfinite()].isfinite().all()
    close(found, expected, equal_nan=True)
