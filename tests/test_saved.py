"""The graph keeps what native's graph keeps, and torch's guards over it hold."""

from itertools import product

import pytest
import torch
from references import EACH_KIND, Function, native
from shapes import ODD, Operands, leaves
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import mlp_ext

pytestmark = pytest.mark.usefixtures("one_thread")

SUBSETS = [mask for mask in product([True, False], repeat=3) if any(mask)]

close = torch.testing.assert_close
activations = pytest.mark.parametrize("activation", EACH_KIND)


def gradients(output: Tensor, tensors: Operands) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().sum(), list(tensors.values())))


def saved(function: Function, tensors: Operands, activation: str) -> set[str]:
    """Names of the tensors that the graph keeps."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        output = function(*tensors.values(), activation)
    names = {t.data_ptr(): name for name, t in {**tensors, "output": output}.items()}
    return {names.get(t.data_ptr(), "something else") for t in kept}


@pytest.mark.parametrize("live", SUBSETS, ids=str)
@activations
def test_no_more_is_saved_than_native_saves(activation: str, live: tuple[bool, ...]) -> None:
    tensors = leaves(live=live)
    assert saved(mlp_ext.linear_act, tensors, activation) == saved(native, tensors, activation)


@pytest.mark.parametrize("changed", ["input", "weight", "bias", "output"])
@pytest.mark.parametrize("live", SUBSETS, ids=str)
@activations
def test_change_in_place_is_caught_where_native_catches_it(
    activation: str, live: tuple[bool, ...], changed: str
) -> None:
    def outcome(function: Function) -> str:
        tensors = leaves(live=live)
        tensors["output"] = function(*tensors.values(), activation)
        with torch.no_grad():
            tensors[changed].mul_(2)
        try:
            tensors["output"].sum().backward()
        except RuntimeError as error:
            return str(error).partition(":")[0]
        return "not caught"

    found = outcome(mlp_ext.linear_act)
    assert found == outcome(native)
    assert found == "not caught" or "modified by an inplace operation" in found


def test_saved_tensors_can_be_moved_by_hooks() -> None:
    tensors = leaves(ODD)
    with saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
        output = mlp_ext.linear_act(**tensors, activation="tanh")
    close(gradients(output, tensors), gradients(native(**tensors, activation="tanh"), tensors))


def test_activation_checkpointing_recomputes_it() -> None:
    tensors = leaves()
    output = torch.utils.checkpoint.checkpoint(
        mlp_ext.linear_act, *tensors.values(), use_reentrant=False
    )
    close(gradients(output, tensors), gradients(native(**tensors), tensors))


@pytest.mark.parametrize("level", [None, "layers", "stack"])
@pytest.mark.parametrize("activation", [nn.GELU, nn.Mish, nn.Softplus, nn.ReLU], ids=str)
def test_a_model_keeps_no_more_memory_than_native(
    activation: type[nn.Module], level: str | None
) -> None:
    """Bytes that the graph holds, but for parameters and input."""

    def kept(model: nn.Module) -> int:
        storages: dict[int, int] = {}
        own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            output = model(x)
        output.sum().backward()
        return sum(bytes for pointer, bytes in storages.items() if pointer not in own)

    x = torch.randn(64, 32)
    layers = [m for _ in range(3) for m in (nn.Linear(32, 32), activation())]
    model = nn.Sequential(*layers)
    native = kept(model)
    found = kept(mlp_ext.fuse(model, level) if level else mlp_ext.Sequential(*layers))
    assert 0 < found <= native
