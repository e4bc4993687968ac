"""TrainSteps: each network is trained as by its own TrainStep, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from many import Many, assert_like_each_alone, many
from steps import LOSSES, OPTIONS
from torch import Tensor, nn

import mlp_ext
from mlp_ext import TrainSteps
from mlp_ext.nn import LinearAct

pytestmark = pytest.mark.usefixtures("one_thread")

close = torch.testing.assert_close


# --- As each alone ---


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss: str) -> None:
    assert_like_each_alone(many(3, "3-17-5@100", loss, "momentum", torch.float32), 5)


@pytest.mark.parametrize("loss", ["mse", "classes-weight-smoothing"])
def test_sums(loss: str) -> None:
    parts = many(3, "3-17-5@100", loss, "momentum", torch.float32, reduction="sum")
    assert_like_each_alone(parts, 5)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_optimizer(options: str) -> None:
    assert_like_each_alone(many(3, "3-17-5@100", "mse", options, torch.float64), 6)


@pytest.mark.parametrize("activation", [*LinearAct.by_module], ids=lambda kind: kind.__name__)
def test_every_activation(activation: type[nn.Module]) -> None:
    parts = many(3, "3-17-5@100", "mse-linear", "plain", torch.float32)
    for model in parts.models:
        model[1] = activation()
    assert_like_each_alone(parts, 5)


@pytest.mark.parametrize("net", ["1-1@1", "10-5-1@10", "33-64-20-7@1000", "70-600-3@50"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_widths_and_dtypes(net: str, dtype: torch.dtype) -> None:
    assert_like_each_alone(many(3, net, "mse", "adam", dtype), 3)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33])
def test_numbers_of_networks(count: int) -> None:
    assert_like_each_alone(many(count, "10-5-1@10", "mse", "adam", torch.float32), 5)


@pytest.mark.parametrize("own", ["input", "target", "both"])
@pytest.mark.parametrize("loss", ["mse", "classes", "probabilities"])
def test_data_of_each(loss: str, own: str) -> None:
    parts = many(4, "3-17-5@100", loss, "momentum", torch.float64)
    if own != "target":
        parts = parts._replace(input=torch.randn(4, 100, 3).double())
    if own != "input":
        target = torch.stack([parts.target.roll(i, 0) for i in range(4)])
        parts = parts._replace(target=target)
    assert_like_each_alone(parts, 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.repeat_interleave(2, 0)[::2],
        lambda t: t.t().contiguous().t(),
        lambda t: t[:1].expand(t.shape),
    ],
    ids=["sliced", "transposed", "expanded"],
)
def test_strided_data(change: Callable[[Tensor], Tensor]) -> None:
    parts = many(3, "3-17-5@100", "mse", "plain", torch.float64)
    parts = parts._replace(input=change(parts.input), target=change(parts.target))
    assert_like_each_alone(parts, 3)


def test_hyperparameters_may_all_differ() -> None:
    parts = many(6, "3-17-5@100", "mse", "plain", torch.float64)
    options: list[dict[str, Any]] = [
        {"lr": 0.1},
        {"lr": torch.tensor(0.2), "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.5, "dampening": 0.4},
        {"lr": 0.1, "momentum": 0.5, "nesterov": True},
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "maximize": True, "momentum": 0.1, "dampening": 0.1},
    ]
    for i, (model, own) in enumerate(zip(parts.models, options, strict=True)):
        parts.optimizers[i] = torch.optim.SGD(model.parameters(), **own)
    assert_like_each_alone(parts, 5)


def test_groups_and_frozen_parameters() -> None:
    parts = many(3, "33-64-20-7@1000", "classes", "plain", torch.float64)
    for i, model in enumerate(parts.models):
        model[2].weight.requires_grad_(False)
        groups = [
            {"params": [model[4].bias, model[0].weight], "amsgrad": True, "lr": 0.01 * (i + 1)},
            {"params": [model[4].weight, model[2].weight], "weight_decay": 0.1},
        ]
        parts.optimizers[i] = torch.optim.AdamW(groups)
    before = parts.models[1][2].weight.clone()
    assert_like_each_alone(parts, 4)
    assert torch.equal(parts.models[1][2].weight, before)


@pytest.mark.parametrize("level", ["layers", "stack"])
def test_fused_and_flattening_models(level: str) -> None:
    parts = many(3, "33-64-20-7@1000", "classes", "momentum", torch.float64)
    for i, model in enumerate(parts.models):
        model.insert(0, nn.Flatten())
        parts.models[i] = mlp_ext.fuse(model, level)
    assert_like_each_alone(parts._replace(input=parts.input.unflatten(1, (3, 11))), 3)
    of_each = torch.randn(3, 50, 3, 11).double()
    parts = parts._replace(input=of_each, target=parts.target[:50])
    assert_like_each_alone(parts, 3)


@pytest.mark.parametrize("loss", ["mse", "classes"])
def test_no_rows(loss: str) -> None:
    parts = many(3, "3-17-5@100", loss, "nesterov", torch.float64)
    assert_like_each_alone(parts._replace(input=parts.input[:0], target=parts.target[:0]), 2)


def test_float64_target_of_a_float32_model() -> None:
    parts = many(2, "10-5-1@10", "mse", "plain", torch.float32)
    steps = TrainSteps(*parts[:3])
    losses = steps(parts.input, parts.target.double())
    assert (losses.dtype, losses.shape, losses.requires_grad) == (torch.float64, (2,), False)


def test_dropout_draws_network_after_network() -> None:
    parts = many(2, "10-5-1@10", "mse", "plain", torch.float32)
    for model in parts.models:
        model.insert(1, nn.Dropout(0.5))
        model[2] = nn.Identity()
    together, alone = deepcopy(parts), deepcopy(parts)
    torch.manual_seed(1)
    losses = TrainSteps(*together[:3]).fit(*parts[3:], epochs=3)
    torch.manual_seed(1)
    steps = [mlp_ext.TrainStep(*each[:3]) for each in alone.each()]
    expected = torch.stack(
        [torch.stack([step(parts.input, parts.target) for step in steps]) for _ in range(3)]
    )
    close(losses, expected)
    close(together.state(), alone.state())


# --- Independence ---


@pytest.mark.parametrize("net", ["10-5-1@10", "3-17-5@100", "70-600-3@50"])
@pytest.mark.parametrize("options", ["plain", "adam"])
def test_company_order_and_number_change_no_bit(net: str, options: str) -> None:
    parts = many(21, net, "mse", options, torch.float32)
    generators = [torch.Generator().manual_seed(i) for i in range(21)]

    def trained(indices: list[int]) -> dict[int, dict[str, Tensor]]:
        chosen = deepcopy(parts.chosen(indices))
        own = [torch.Generator().manual_seed(i) for i in indices]
        steps = TrainSteps(*chosen[:3])
        first = steps(*chosen[3:])
        losses = steps.fit(*chosen[3:], epochs=2, batch_size=7, shuffle=True, generators=own)
        return {
            index: {"first": first[k], "losses": losses[:, k], **each.state()}
            for k, (index, each) in enumerate(zip(indices, chosen.each(), strict=True))
        }

    assert len(generators) == 21
    expected = trained([*range(21)])
    for indices in ([4], [20, 3, 4], [*range(16)], [*range(20, 3, -1)]):
        for index, found in trained(indices).items():
            close(found, expected[index], rtol=0, atol=0)


@pytest.mark.parametrize("net", ["10-5-1@10", "33-64-20-7@1000"])
def test_threads_change_no_bit(net: str) -> None:
    parts = many(37, net, "mse", "momentum", torch.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        copy = deepcopy(parts)
        losses = TrainSteps(*copy[:3]).fit(*copy[3:], epochs=2, batch_size=9)
        found.append({"losses": losses, **copy.state()})
    for other in found[1:]:
        close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_network_that_diverges_changes_no_other(value: float) -> None:
    parts = many(17, "10-5-1@10", "mse-linear", "momentum", torch.float32)
    ill = deepcopy(parts)
    with torch.no_grad():
        ill.models[3][0].weight.fill_(value)
    for each in (parts, ill):
        TrainSteps(*each[:3])(*each[3:])
        TrainSteps(*each[:3]).fit(*each[3:], epochs=20, batch_size=4)
    assert not ill.models[3][0].weight.isfinite().all()
    for i, (found, expected) in enumerate(zip(ill.each(), parts.each(), strict=True)):
        if i != 3:
            close(found.state(), expected.state(), rtol=0, atol=0)


def bce_with_nan() -> Many:
    parts = many(18, "10-5-1@10", "bce", "momentum", torch.float32)
    with torch.no_grad():
        parts.models[3][0].weight.fill_(torch.nan)
        parts.models[17][0].weight.fill_(torch.nan)
    return parts


@pytest.mark.parametrize("fit", [False, True])
def test_outputs_that_are_no_probabilities_stop_their_network(fit: bool) -> None:
    parts = bce_with_nan()
    finite = [i for i in range(18) if i not in (3, 17)]
    ill, well = deepcopy(parts), deepcopy(parts.chosen(finite))
    steps, others = TrainSteps(*ill[:3]), TrainSteps(*well[:3])
    options = {"epochs": 300, "batch_size": 3}
    message = r"^TrainSteps.*: bce needs outputs .* \(models\[3\]; the others were trained\)$"
    with pytest.raises(RuntimeError, match=message):
        steps.fit(*ill[3:], **options) if fit else steps(*ill[3:])
    others.fit(*well[3:], **options) if fit else others(*well[3:])
    for i in (3, 17):
        close(ill.each()[i].state(), parts.each()[i].state(), rtol=0, atol=0, equal_nan=True)
    assert not ill.optimizers[3].state and not ill.optimizers[17].state
    close(ill.chosen(finite).state(), well.state())


# --- With the rest of torch ---


def test_schedulers() -> None:
    parts = many(3, "10-5-1@10", "mse", "momentum", torch.float64)
    found = []
    for together in (True, False):
        copy = deepcopy(parts)
        schedulers = [
            torch.optim.lr_scheduler.StepLR(o, i + 1, 0.5) for i, o in enumerate(copy.optimizers)
        ]
        steps = TrainSteps(*copy[:3]) if together else copy.alone()
        for _ in range(6):
            steps(*copy[3:])
            for scheduler in schedulers:
                scheduler.step()
        found.append(copy.state())
    close(*found)


@pytest.mark.parametrize("options", ["momentum", "dampening", "adam", "adagrad"])
def test_eager_steps_come_in_between(options: str) -> None:
    parts = many(3, "10-5-1@10", "mse", options, torch.float64)
    alone = deepcopy(parts)
    steps, each = TrainSteps(*parts[:3]), alone.alone()
    for i in range(8):
        if i % 3 == 1:  # of one network
            eager = parts.each()[i % 2]
            eager.optimizer.zero_grad()
            eager.criterion(eager.model(eager.input), eager.target).backward()
            eager.optimizer.step()
            mlp_ext.TrainStep(*alone.each()[i % 2][:3])(*parts[3:])
        steps(*parts[3:])
        each(*parts[3:])
    close(parts.state(), alone.state())
    assert parts.models[2][0].weight.grad is None


@pytest.mark.parametrize("options", ["dampening", "adam", "rmsprop-momentum"])
def test_checkpoints(options: str) -> None:
    parts = many(3, "10-5-1@10", "mse", options, torch.float64)
    whole, resumed = deepcopy(parts), deepcopy(parts)
    expected = TrainSteps(*whole[:3]).fit(*whole[3:], epochs=8)
    TrainSteps(*parts[:3]).fit(*parts[3:], epochs=5)
    steps = TrainSteps(*resumed[:3])
    steps(*resumed[3:])
    for from_, to in zip(parts.each(), resumed.each(), strict=True):
        to.model.load_state_dict(from_.model.state_dict())
        to.optimizer.load_state_dict(deepcopy(from_.optimizer.state_dict()))
    close(steps.fit(*resumed[3:], epochs=3), expected[5:])
    close(resumed.state(), whole.state())


def test_versions_change_with_the_values() -> None:
    parts = many(2, "10-5-1@10", "mse", "momentum", torch.float32)
    weight = parts.models[1][0].weight
    parts.models[1][0].bias.requires_grad_(False)
    parts.models[0][0].bias.requires_grad_(False)
    versions = weight._version, parts.models[1][0].bias._version
    TrainSteps(*parts[:3])(*parts[3:])
    assert weight._version > versions[0]
    assert parts.models[1][0].bias._version == versions[1]
    assert parts.models[1][0].bias not in parts.optimizers[1].state
