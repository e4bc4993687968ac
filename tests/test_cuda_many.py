"""Many networks in one launch, in the CUDA model, are trained as each alone: the same bits."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_kernels import load_once
from cuda_steps import (
    OPTIONS,
    Data,
    Network,
    Training,
    assert_trains_as_torch,
    data_of,
    launch_in_each_order,
    model_of,
    model_of_cuda,
    states_of,
)
from once import Once
from shapes import DTYPES
from torch import Tensor

from mlp_ext.nn import Activation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def kernels(once: Once) -> ctypes.CDLL:
    return load_once(once, "step")


def own_data(t: Training, seed: int) -> Data:
    drawn = torch.Generator().manual_seed(seed)
    data = data_of(t)
    x = torch.randn(data.input.shape, generator=drawn).to(t.dtype)
    return data._replace(input=x, target=data.target[torch.randperm(len(x), generator=drawn)])


def networks_of(t: Training, count: int, epochs: int, own: str = "") -> list[Network]:
    """Each with its parameters and learning rate; its own data, rows and orders, as `own` says."""
    drawn = torch.Generator().manual_seed(4)
    found = []
    shared = data_of(t)

    def orders(rows: int) -> Tensor:
        each = [torch.randperm(len(shared.input), generator=drawn) for _ in range(epochs)]
        return torch.cat([permutation[:rows] for permutation in each])

    if t.shuffled:
        shared = shared._replace(order=orders(t.rows))
    for e in range(count):
        rows = max(t.rows - 3 * e, 1) if "rows" in own else t.rows
        data = shared
        if "data" in own:
            data = own_data(t, e)._replace(order=shared.order)
        if "rows" in own or "orders" in own:
            data = data._replace(order=orders(rows))
        options = t.options | {"lr": t.options["lr"] * (1 + e / 4)}
        parameters = [
            p.detach() + 0.1 * torch.randn(p.shape, generator=drawn).to(t.dtype)
            for p in model_of(t).parameters()
        ]
        training = t._replace(options=options, rows=rows)
        found.append(Network(training, data, parameters, states_of(training)))
    return found


def copy_of(n: Network) -> Network:
    states = [{name: value.clone() for name, value in state.items()} for state in n.states]
    return n._replace(parameters=[p.clone() for p in n.parameters], states=states)


def trained_alone(kernels: ctypes.CDLL, n: Network, epochs: int) -> Tensor:
    """By a launch for each epoch; returns the losses."""
    orders = [None] * epochs if n.data.order is None else n.data.order.split(n.training.rows)
    run = model_of_cuda(kernels)
    losses = [
        run(n.training, n.data._replace(order=order), n.parameters, n.states) for order in orders
    ]
    return torch.cat(losses)


def assert_as_alone(kernels: ctypes.CDLL, networks: list[Network], epochs: int) -> None:
    alone = [copy_of(n) for n in networks]
    losses = launch_in_each_order(kernels, networks, epochs, in_table=True)
    for e, (n, other) in enumerate(zip(networks, alone, strict=True)):
        expected = trained_alone(kernels, other, epochs).view(epochs, -1)
        found = losses[e].view(epochs, -1)
        batches = expected.shape[1]
        same_bits(found[:, :batches], expected)
        assert found[:, batches:].isnan().all(), "written where there is no batch"
        for value, alone_value in zip(n.changing, other.changing, strict=True):
            same_bits(value, alone_value)


def same_bits(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


SMALL = Training((6, 5, 4), 20, 9, hidden=Activation("tanh"))


@pytest.mark.slow
@pytest.mark.parametrize("own", ["", "data", "orders", "rows", "data rows"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_each_network_has_its_rows(loss: str, own: str, kernels: ctypes.CDLL) -> None:
    """Two epochs of three batches, the last one short, or of fewer."""
    networks = networks_of(SMALL._replace(loss=loss, weighted=loss != "mse"), 5, 2, own)
    assert_as_alone(kernels, networks, 2)


def test_rows_in_their_own_order(kernels: ctypes.CDLL) -> None:
    training = SMALL._replace(shuffled=False)
    assert_as_alone(kernels, networks_of(training, 3, 3), 3)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_each_network_has_its_hyperparameters(options: str, kernels: ctypes.CDLL) -> None:
    name, chosen = OPTIONS[options]
    training = SMALL._replace(optimizer=name, options=chosen, batch=11)
    assert_as_alone(kernels, networks_of(training, 2, 2), 2)


def of_each(*options: str) -> list[Network]:
    """A network with each of these options of an optimizer."""
    chosen = [OPTIONS[name] for name in options]
    return [
        networks_of(SMALL._replace(optimizer=name, options=given), 1, 2)[0]
        for name, given in chosen
    ]


@pytest.mark.parametrize(
    "options",
    [("sgd", "sgd-momentum", "sgd-maximize"), ("adam", "adam-amsgrad", "adam-decoupled")],
)
def test_networks_may_have_other_options_and_states(
    options: tuple[str, ...], kernels: ctypes.CDLL
) -> None:
    assert_as_alone(kernels, of_each(*options), 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "training",
    [
        Training((1, 1), 1, 1),
        Training((3, 17, 5), 40, 36, hidden=Activation("silu")),
        Training((5, 4, 3), 12, 5, bias=False),
        Training((4, 3, 3, 3, 3, 3, 3, 3, 2), 9, 4, frozen=(0, 3)),
    ],
    ids=str,
)
def test_shapes(training: Training, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    name, chosen = OPTIONS["adam-amsgrad"]
    training = training._replace(optimizer=name, options=chosen, dtype=dtype)
    assert_as_alone(kernels, networks_of(training, 3, 2, "orders"), 2)


@pytest.mark.parametrize("count", [None, torch.float32, torch.float64], ids=str)
def test_networks_may_have_done_other_numbers_of_steps(
    count: torch.dtype | None, kernels: ctypes.CDLL
) -> None:
    name, chosen = OPTIONS["adam"]
    training = SMALL._replace(optimizer=name, options=chosen, device_count=count)
    networks = networks_of(training, 3, 2, "rows")
    for e, network in enumerate(networks):
        for state in network.states:
            state["step"] += 10 * e
    assert_as_alone(kernels, networks, 2)


def test_a_network_that_diverges_changes_no_other(kernels: ctypes.CDLL) -> None:
    networks = networks_of(SMALL, 3, 2, "orders")
    healthy = [copy_of(networks[e]) for e in (0, 2)]
    networks[1].parameters[0].fill_(torch.nan)
    launch_in_each_order(kernels, networks, 2, in_table=True)
    launch_in_each_order(kernels, healthy, 2, in_table=True)
    assert networks[1].parameters[-1].isnan().all()
    for network, other in zip(networks[::2], healthy, strict=True):
        for value, alone_value in zip(network.changing, other.changing, strict=True):
            same_bits(value, alone_value)
            assert value.isfinite().all()


@pytest.mark.parametrize("options", ["sgd-nesterov", "adam"])
def test_a_network_in_a_table_is_trained_as_by_torch(options: str, kernels: ctypes.CDLL) -> None:
    name, chosen = OPTIONS[options]
    training = SMALL._replace(optimizer=name, options=chosen)
    assert_trains_as_torch(model_of_cuda(kernels, in_table=True), training)


@pytest.mark.parametrize(
    ("loss", "wrong", "message"),
    [("cross_entropy", 4, "not a class"), ("bce", 1.5, "not a probability"),
     ("mse", None, "not a row of the input")],
)  # fmt: skip
def test_the_device_asserts_it_of_each_network(
    loss: str, wrong: float | None, message: str, kernels: ctypes.CDLL
) -> None:
    networks = networks_of(SMALL._replace(loss=loss), 3, 1, "data orders")
    data = networks[2].data
    assert data.order is not None
    if wrong is None:
        data.order[7] = len(data.input)
    else:
        data.target[data.order[7]] = wrong
    with pytest.raises(AssertionError, match=f"{message}.*of block 2,0"):
        launch_in_each_order(kernels, networks, in_table=True)
