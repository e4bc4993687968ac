"""TrainStep under autocast equals an eager loop whose forward and loss run under it."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from eager_steps import Eager, adam, net, sgd, state_of
from references import Results, assert_as_accurate_as_native
from steps import LOSSES, OPTIONS, Training, assert_steps_match_eager, training
from test_train_operator import OP, arguments
from torch import Tensor, nn

from mlp_ext import TrainStep, TrainSteps
from mlp_ext.bench.training import Step
from mlp_ext.nn import LinearAct

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "3-17-5@100"
autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
float16 = partial(torch.autocast, "cpu", dtype=torch.float16)


class Under(nn.Module):
    """A module called under autocast, so that backward and the update are outside it."""

    def __init__(self, module: nn.Module, context: Callable[[], Any]) -> None:
        super().__init__()
        self.module, self.context = module, context

    def forward(self, *arguments: Tensor) -> Tensor:
        with self.context():
            return self.module(*arguments)


def eager(
    context: Callable[[], Any], model: nn.Module, criterion: nn.Module, *rest: Any, **settings: Any
) -> Eager:
    return Eager(Under(model, context), Under(criterion, context), *rest, **settings)


def ours(context: Callable[[], Any], *parts: Any, **settings: Any) -> Step:
    step = TrainStep(*parts, **settings)

    def run(input: Tensor, target: Tensor) -> Tensor:
        with context():
            return step(input, target)

    return run


def assert_as_accurate_as_eager(
    part: Training,
    steps: int = 5,
    context: Callable[[], Any] = autocast,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> Results:
    """Losses, states, and the changes of parameters: sums of numbers of the autocast dtype."""
    unit = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 4
    before = {name: p.detach() for name, p in part.model.named_parameters()}
    reference = part.to(torch.float64).run(partial(Eager, **settings), steps)
    native = part.to(torch.float32).run(partial(eager, context, **settings), steps)
    found = part.to(torch.float32).run(partial(ours, context, **settings), steps)
    assert found.keys() == native.keys()
    for name in reference:
        ran = found[name], native[name], reference[name]
        actual, expected, exact = (t - before.get(name, 0) for t in ran)
        assert_as_accurate_as_native(actual, expected, exact, unit * exact.abs(), name)
    plain = part.to(torch.float32).run(partial(TrainStep, **settings), steps)
    assert not torch.equal(found["losses"], plain["losses"]), "in float32"
    return found


# --- Values ---


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str, reduction: str) -> None:
    found = assert_as_accurate_as_eager(training(SMALL, loss, "momentum", torch.float32, reduction))
    assert found["losses"].dtype == torch.float32  # as eager's, which was compared


@pytest.mark.parametrize("options", OPTIONS)
def test_optimizers(options: str) -> None:
    assert_as_accurate_as_eager(training(SMALL, "classes", options, torch.float32))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "name", ["10-5-1@10", "33-64-20-7@1000", "530-300-5@112", "3-700-400-1@32"]
)
def test_nets(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    assert_as_accurate_as_eager(training(name, "mse", "nesterov", torch.float32), 3)


@pytest.mark.parametrize("activation", LinearAct.by_module)
def test_activations(activation: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 6), activation(), nn.Linear(6, 5, bias=False), activation())
    x, y = torch.randn(9, 3), torch.rand(9, 5)
    assert_as_accurate_as_eager(Training(model, nn.MSELoss(), sgd(model.parameters()), x, y))


@pytest.mark.parametrize("loss", ["bce", "classes", "mse"])
def test_float16_on_the_cpu(loss: str) -> None:
    part = training(SMALL, loss, "momentum", torch.float32)
    assert_as_accurate_as_eager(part, 5, float16, torch.float16)


@pytest.mark.parametrize("settings", [{"max_norm": 0.1}, {"accumulate": 3}], ids=str)
@pytest.mark.parametrize("options", ["momentum", "adam-betas"])
def test_clipping_and_groups(options: str, settings: dict[str, Any]) -> None:
    part = training(SMALL, "mse", options, torch.float32)
    assert_as_accurate_as_eager(part, 7, **settings)


def test_frozen_layers_strided_data_and_parameters() -> None:
    part = training(SMALL, "mse", "momentum", torch.float32)
    model = part.model
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    model[0].requires_grad_(False)
    part = part._replace(input=torch.randn(3, 100).t(), target=torch.rand(100, 10)[:, ::2])
    found = assert_as_accurate_as_eager(part)
    assert torch.equal(found["0.weight"], model[0].weight)


def test_dropout_draws_as_eager() -> None:
    """Masks apply to the float32 input, and to outputs in bfloat16."""
    layers = [nn.Dropout(0.3), nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 4)]
    model = nn.Sequential(*layers, nn.Dropout(0.2))
    part = Training(
        model, nn.MSELoss(), sgd(model.parameters()), torch.randn(20, 8), torch.rand(20, 4)
    )
    found = []
    for make in (eager, ours):
        torch.manual_seed(1)
        found.append(part.to(torch.float32).run(partial(make, autocast), 5))
    torch.testing.assert_close(*found, rtol=1e-2, atol=2e-3)  # another mask: 0.1 and more


@pytest.mark.parametrize("settings", [{}, {"max_norm": 0.1, "accumulate": 2}], ids=str)
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_fit(optimizer: Any, settings: dict[str, Any]) -> None:
    """Shuffled, with a last batch of 4 rows."""
    x, y = torch.randn(64, 8), torch.rand(64, 4)
    losses, states = [], []
    for dtype, make in (
        (torch.float64, Eager),
        (torch.float32, partial(eager, autocast)),
        (torch.float32, TrainStep),
    ):
        torch.manual_seed(0)
        model = net().to(dtype)
        chosen = optimizer(model.parameters())
        step = make(model, nn.MSELoss(), chosen, **settings)
        torch.manual_seed(1)
        with autocast(enabled=make is TrainStep):
            run = step.fit(x.to(dtype), y.to(dtype), epochs=3, batch_size=10, shuffle=True)
        losses.append(run)
        states.append({"losses": run} | state_of(model, chosen))
    reference, native, found = states
    for name, exact in reference.items():
        terms = 2.0**14 * (exact.abs() + exact.abs().max().clamp(max=1))
        assert_as_accurate_as_native(found[name], native[name], exact, terms, name)


# --- Its state ---


def part_of(dtype: torch.dtype = torch.float32) -> Training:
    return training(SMALL, "classes", "momentum", torch.float32).to(dtype)


def test_disabled_inside_and_after() -> None:
    """Steps in float32 before, after and between have the bits of steps without autocast."""
    part = part_of()
    here, there = part.to(torch.float32), part.to(torch.float32)
    step, plain = TrainStep(*here[:3]), TrainStep(*there[:3])
    with autocast():
        with autocast(enabled=False):
            assert torch.equal(step(*here[3:]), plain(*there[3:]))
        assert torch.is_autocast_enabled("cpu")
        assert step(*here[3:]).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    there.model.load_state_dict(here.model.state_dict())
    there.optimizer.load_state_dict(here.optimizer.state_dict())
    assert torch.equal(step(*here[3:]), plain(*there[3:]))
    assert {t.dtype for t in here.state().values()} == {torch.float32}


def test_float64_is_left_alone_as_in_eager() -> None:
    part = part_of(torch.float64)
    found = part.to(torch.float64).run(partial(ours, autocast), 3)
    expected = part.to(torch.float64).run(TrainStep, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert_steps_match_eager(part, 3, partial(ours, autocast))


def test_error_changes_nothing() -> None:
    part = training(SMALL, "bce", "momentum", torch.float32)
    before = part.state()
    with autocast(), pytest.raises(RuntimeError, match=r"^TrainStep: .*between 0 and 1"):
        TrainStep(*part[:3])(part.input, part.target + 1)
    torch.testing.assert_close(part.state(), before, rtol=0, atol=0)


# --- Refused ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_are_refused(dtype: torch.dtype) -> None:
    part = part_of(dtype)
    name = str(dtype).removeprefix("torch.")
    with (
        autocast(),
        pytest.raises(RuntimeError, match=f"^TrainStep: autocast .* got {name}; leave"),
    ):
        TrainStep(*part[:3])(*part[3:])


def test_many_networks_refuse_it_by_name() -> None:
    parts = [part_of() for _ in range(2)]
    models, optimizers = [p.model for p in parts], [p.optimizer for p in parts]
    steps = TrainSteps(models, parts[0].criterion, optimizers)
    for call in (steps, steps.fit):
        with (
            autocast(),
            pytest.raises(RuntimeError, match=r"^TrainSteps(\.fit)?: autocast is enab"),
        ):
            call(*parts[0][3:])


# --- The operator ---


@pytest.mark.parametrize("loss", ["mse", "cross_entropy-classes"])
def test_opcheck(loss: str) -> None:
    with torch.no_grad():
        torch.library.opcheck(OP, (), arguments(loss) | {"autocast": torch.bfloat16})


@pytest.mark.parametrize(
    ("dtype", "to", "message"),
    [
        (torch.float32, torch.float32, "autocast must be bfloat16 or float16, got float32"),
        (torch.float64, torch.bfloat16, "with autocast input must be float32, got float64"),
    ],
)
def test_operator_refuses(dtype: torch.dtype, to: torch.dtype, message: str) -> None:
    given = arguments(requires_grad=False)
    for name in ("input", "target"):
        given[name] = given[name].to(dtype)
    for name in ("parameters", "states"):
        given[name] = [t.to(dtype) for t in given[name]]
    with pytest.raises(TypeError, match=f"^mlp_train_step_: {re.escape(message)}"):
        OP(**given, autocast=to)
