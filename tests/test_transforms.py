"""Under torch.func, forward-mode and higher derivatives, linear_act equals native torch."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from references import EACH_KIND, Function, Net, native, twins
from shapes import leaves
from torch import Tensor
from torch.autograd import forward_ad

import mlp_ext

pytestmark = pytest.mark.usefixtures("one_thread")

close = torch.testing.assert_close
activations = pytest.mark.parametrize("activation", EACH_KIND)


def x_w_b() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 6), torch.randn(3, 6), torch.randn(3)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2))(*x_w_b()),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1, 2))(*x_w_b()),
    "jacfwd": lambda f: torch.func.jacfwd(f, argnums=(0, 1, 2))(*x_w_b()),
    "hessian": lambda f: torch.func.hessian(lambda *a: f(*a).square().sum(), argnums=(0, 1, 2))(
        *x_w_b()
    ),
    "jvp": lambda f: torch.func.jvp(f, x_w_b(), x_w_b()),
    "vjp": lambda f: torch.func.vjp(f, *x_w_b())[1](torch.randn(4, 3)),
    "vmap_input": lambda f: torch.func.vmap(f, (0, None, None))(*x_w_b()),
    "vmap_inner": lambda f: torch.func.vmap(f, (1, None, None))(torch.randn(4, 5, 6), *x_w_b()[1:]),
    "vmap_ensemble": lambda f: torch.func.vmap(f)(
        torch.randn(2, 4, 6), torch.randn(2, 3, 6), torch.randn(2, 3)
    ),
    "vmap_weight": lambda f: torch.func.vmap(f, (None, 0, None))(
        x_w_b()[0], torch.randn(2, 3, 6), x_w_b()[2]
    ),
    "vmap_bias": lambda f: torch.func.vmap(f, (None, None, 1))(*x_w_b()[:2], torch.randn(3, 2)),
    "vmap_of_grad": lambda f: torch.func.vmap(
        torch.func.grad(lambda w, x: f(x, w).sum()), (None, 0)
    )(x_w_b()[1], x_w_b()[0]),
    "vectorized_jacobian": lambda f: torch.autograd.functional.jacobian(f, x_w_b(), vectorize=True),
    "hessian_vector": lambda f: torch.autograd.functional.vhp(
        lambda *a: f(*a).square().sum(), x_w_b(), x_w_b()
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@activations
def test_transforms_match_native(activation: str, transform: str) -> None:
    def applied(function: Function) -> Any:
        torch.manual_seed(0)
        return TRANSFORMS[transform](lambda x, w, b=None: function(x, w, b, activation))

    close(applied(mlp_ext.linear_act), applied(native))


@activations
def test_forward_mode_derivatives_match_native(activation: str) -> None:
    primals, tangents = x_w_b(), x_w_b()
    for live in product([True, False], repeat=3):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(p, t) if on else p
                for p, t, on in zip(primals, tangents, live, strict=True)
            ]
            x, w, b = duals
            found = forward_ad.unpack_dual(mlp_ext.linear_act(x, w, b, activation))
            close(found, forward_ad.unpack_dual(native(x, w, b, activation)))


def test_functional_call_matches_native() -> None:
    x = torch.randn(7, 10)

    def per_sample_gradients(model: Net) -> Any:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Any:
            return torch.func.functional_call(model, parameters, (x,)).sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    fused, plain = twins()
    close(per_sample_gradients(fused), per_sample_gradients(plain))


@activations
def test_second_derivatives_of_a_gradient_penalty_match_native(activation: str) -> None:
    def penalty(function: Function) -> list[Tensor]:
        tensors = leaves()
        output = function(*tensors.values(), activation)
        (slope,) = torch.autograd.grad(output.square().sum(), tensors["input"], create_graph=True)
        (output.sum() + slope.square().sum()).backward()
        return [t.grad for t in tensors.values()]

    torch.manual_seed(0)
    found = penalty(mlp_ext.linear_act)
    torch.manual_seed(0)
    close(found, penalty(native))
