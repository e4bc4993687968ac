"""On a GPU: many networks at once are trained as one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_steps import OPTIONS, Network, Training, arguments
from shapes import DTYPES
from test_cuda_many import copy_of, networks_of, of_each, same_bits
from torch import Tensor

from mlp_ext import _C
from mlp_ext.nn import Activation

if not torch.cuda.is_available():
    pytest.skip("torch finds no cuda device here", allow_module_level=True)

pytestmark = pytest.mark.cuda

OPS = torch.ops.mlp_ext
TANH = Activation("tanh")
SMALL = Training((6, 5, 4), 40, 14, hidden=TANH)
TOGETHER = [
    SMALL,
    Training((1, 1), 1, 1),
    Training((10, 5, 1), 33, 10),
    Training((64, 64, 64, 10), 128, 64, options={"lr": 0.01}),  # layer by layer if it is alone
    Training((5, 4, 3), 12, 5, bias=False),
]
IN_TURN = [Training((784, 100, 10), 40, 20, options={"lr": 0.001}), Training((4,) + (3,) * 9, 9, 4)]


def all_arguments(networks: list[Network], epochs: int) -> dict[str, Any]:
    """Those of mlp_train_many_, by name."""
    each = [arguments(*n) for n in networks]
    given = each[0] | {"networks": len(networks), "epochs": epochs, "orders": []}
    for name in ("parameters", "states", "steps", "hyperparameters"):
        given[name] = [value for one in each for value in one[name]]
    for name in ("input", "target"):
        own = [getattr(n.data, name) for n in networks]
        if any(t is not own[0] for t in own):
            given[name] = torch.stack([one[name] for one in each])
    orders = [n.data.order for n in networks if n.data.order is not None]
    shared = all(order is orders[0] for order in orders)
    for n, order in zip(networks, orders[:1] if shared else orders, strict=False):
        given["orders"].append(order.view(epochs, n.training.rows))
    given.pop("order")
    return given


def on_gpu(given: dict[str, Any], but: tuple[str, ...] = ()) -> dict[str, Any]:
    def there(value: Any) -> Any:
        if isinstance(value, list):
            return [there(v) for v in value]
        return value.cuda() if isinstance(value, Tensor) else value

    return {name: value if name in but else there(value) for name, value in given.items()}


def train(networks: list[Network], epochs: int) -> Tensor:
    """Trains them at once; returns the losses."""
    given = all_arguments(networks, epochs)
    counts = networks[0].training.device_count
    there = on_gpu(given, but=("steps",) if counts is None else ())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # nothing waits
    losses: Tensor = OPS.mlp_train_many_.default(**there)
    torch.cuda.set_sync_debug_mode("default")
    take_back(given, there)
    return losses.cpu()


def take_back(given: dict[str, Any], there: dict[str, Any]) -> None:
    for name in ("parameters", "states", "steps"):
        for here, value in zip(given[name], there[name], strict=True):
            here.copy_(value)


def train_alone(n: Network, epochs: int) -> Tensor:
    orders = [None] * epochs if n.data.order is None else n.data.order.split(n.training.rows)
    losses = []
    for order in orders:
        given = arguments(n.training, n.data._replace(order=order), n.parameters, n.states)
        there = on_gpu(given)
        losses.append(OPS.mlp_train_step_.default(**there).cpu())
        take_back(given, there)
    return torch.stack(losses)


def assert_as_alone(networks: list[Network], epochs: int) -> None:
    alone = [copy_of(n) for n in networks]
    losses = train(networks, epochs).view(len(networks), epochs, -1)
    t = networks[0].training
    tolerance = {
        torch.float32: {"rtol": 1e-4, "atol": 1e-5},
        torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    }.get(t.dtype, {"rtol": 0.05, "atol": 0.05})
    for found, n, other in zip(losses, networks, alone, strict=True):
        expected = train_alone(other, epochs)
        batches = expected.shape[1]
        torch.testing.assert_close(found[:, :batches], expected, **tolerance)
        assert (found[:, batches:] == 0).all()
        for value, alone_value in zip(n.changing, other.changing, strict=True):
            torch.testing.assert_close(value, alone_value, **tolerance)


def test_shapes_here_take_each_path() -> None:
    arch = 10 * torch.cuda.get_device_capability()[0]
    for path, trainings in (("one_block", TOGETHER), ("layers", IN_TURN)):
        for t in trainings:
            plan = _C.cuda_step_plan([*t.widths], t.batch, "float32", arch, 163 << 10, many=True)
            assert plan["path"] == path, t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [*TOGETHER, *IN_TURN], ids=str)
def test_networks_are_trained_as_alone(training: Training, dtype: torch.dtype) -> None:
    assert_as_alone(networks_of(training._replace(dtype=dtype), 3, 2), 2)


@pytest.mark.parametrize("own", ["", "data", "orders", "rows", "data rows"])
@pytest.mark.parametrize("loss", ["mse", "bce", "cross_entropy"])
def test_each_network_has_its_rows(loss: str, own: str) -> None:
    assert_as_alone(networks_of(SMALL._replace(loss=loss), 5, 2, own), 2)


@pytest.mark.parametrize("count", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_each_network_has_its_hyperparameters(options: str, count: torch.dtype | None) -> None:
    name, chosen = OPTIONS[options]
    training = SMALL._replace(optimizer=name, options=chosen, device_count=count)
    assert_as_alone(networks_of(training, 3, 2, "rows"), 2)


def test_networks_may_have_other_options_and_states() -> None:
    assert_as_alone(of_each("sgd", "sgd-momentum", "sgd-maximize"), 2)
    assert_as_alone(of_each("adam", "adam-amsgrad", "adam-decoupled"), 2)


def test_bits_do_not_depend_on_the_other_networks() -> None:
    networks = networks_of(SMALL._replace(shuffled=False), 300, 2, "data")
    alone = [copy_of(n) for n in (networks[0], networks[299])]
    losses = train(networks, 2)
    for e, other in zip((0, 299), alone, strict=True):
        same_bits(losses[e], train([other], 2)[0])
        for value, alone_value in zip(networks[e].changing, other.changing, strict=True):
            same_bits(value, alone_value)
