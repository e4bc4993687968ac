"""What a step does about torch's global state: the table of docs/train-step.md, row by row."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from threading import Thread
from typing import Any

import pytest
import torch
from steps import Training, training
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mlp_ext import TrainStep
from mlp_ext.bench.training import sgd_step

pytestmark = pytest.mark.usefixtures("one_thread")

Context = Callable[[], AbstractContextManager[Any]]
Call = Callable[[TrainStep, Tensor, Tensor], Tensor]

CALLS: dict[str, Call] = {
    "step": lambda step, x, y: step(x, y),
    "fit": lambda step, x, y: step.fit(x, y, epochs=2),
    "fit in batches": lambda step, x, y: step.fit(x, y, epochs=2, batch_size=3, shuffle=True),
}


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def saved_tensor_hooks() -> AbstractContextManager[None]:
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


# --- Refused ---

REFUSED: dict[str, tuple[Context, str]] = {
    "no_grad": (torch.no_grad, "gradients are disabled"),
    "set_grad_enabled": (lambda: torch.set_grad_enabled(False), "gradients are disabled"),
    "inference mode": (torch.inference_mode, "inference_mode forbids"),
    "anomaly detection": (torch.autograd.detect_anomaly, "anomaly detection is on"),
    "anomaly detection without NaN": (
        lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
        "anomaly detection is on",
    ),
    "saved-tensor hooks": (saved_tensor_hooks, "saved-tensor hooks are set"),
    "save_on_cpu": (torch.autograd.graph.save_on_cpu, "saved-tensor hooks are set"),
    "function mode": (Functions, "a Functions is active"),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("state", REFUSED)
def test_state_is_refused(state: str, call: str, part: Training) -> None:
    context, message = REFUSED[state]
    step = TrainStep(*part[:3])
    with context(), pytest.raises(RuntimeError, match=f"^TrainStep: .*{message}"):
        CALLS[call](step, *part[3:])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("which", ["input", "target", "parameter"])
def test_forward_mode_tangents_are_refused(which: str, call: str, part: Training) -> None:
    step = TrainStep(*part[:3])
    with forward_ad.dual_level():
        x, y = part[3:]
        if which == "input":
            x = forward_ad.make_dual(x, torch.ones_like(x))
        elif which == "target":
            y = forward_ad.make_dual(y, torch.ones_like(y))
        else:
            with torch.no_grad():
                tangent = torch.ones(5, 10)
                part.model[0].weight.add_(forward_ad.make_dual(torch.zeros(5, 10), tangent))
        with pytest.raises(RuntimeError, match="forward-mode tangent"):
            CALLS[call](step, x, y)


TRANSFORMS: dict[str, Callable[[TrainStep, Tensor, Tensor], object]] = {
    "grad": lambda step, x, y: torch.func.grad(lambda z: z * step(x, y))(torch.ones(())),
    "grad of the input": lambda step, x, y: torch.func.grad(lambda x: step(x, y))(x),
    "vmap": lambda step, x, y: torch.func.vmap(lambda x: step(x, y))(x.expand(3, 10, 10)),
    "jvp": lambda step, x, y: torch.func.jvp(lambda x: step(x, y), (x,), (x,)),
    "functionalize": lambda step, x, y: torch.func.functionalize(lambda x: step(x, y))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(transform: str, part: Training) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"^TrainStep: "):
        TRANSFORMS[transform](TrainStep(*part[:3]), *part[3:])


class Traced(nn.Module):
    def __init__(self, step: TrainStep, y: Tensor) -> None:
        super().__init__()
        self.step, self.y = step, y

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x, self.y)


TRACERS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "make_fx": lambda model, x: make_fx(model)(x),
    "export": lambda model, x: torch.export.export(model, (x,)),
}


@pytest.mark.parametrize("tracer", TRACERS)
def test_tracers_are_refused(tracer: str, part: Training) -> None:
    with pytest.raises(RuntimeError, match=r"^TrainStep: a \w+ is active"):
        TRACERS[tracer](Traced(TrainStep(*part[:3]), part.target), part.input)


def test_fake_tensors_are_refused_by_torch(part: Training) -> None:
    step = TrainStep(*part[:3])
    with FakeTensorMode(), pytest.raises(Exception, match="convert all Tensors to FakeTensors"):
        step(*part[3:])


# --- Followed, or of no effect, as in an eager loop ---


@contextlib.contextmanager
def setting(get: Callable[[], Any], set: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    set(value)
    try:
        yield
    finally:
        set(before)


def matmul_precision(value: str) -> AbstractContextManager[None]:
    return setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value)


FOLLOWED: dict[str, Context] = {
    "another device's autocast": lambda: setting(
        lambda: torch.is_autocast_enabled("cuda"),
        lambda on: torch.set_autocast_enabled("cuda", on),
        True,
    ),
    "disabled autocast": lambda: torch.autocast("cpu", enabled=False),
    "deterministic algorithms": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "default dtype": lambda: setting(
        torch.get_default_dtype, torch.set_default_dtype, torch.float64
    ),
    "default device": lambda: torch.device("cpu"),
    "level without tangents": forward_ad.dual_level,
    "saved-tensor hooks are disabled": lambda: torch.autograd.graph.disable_saved_tensors_hooks(""),
    "threads": lambda: setting(torch.get_num_threads, torch.set_num_threads, 2),
    "no oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "profiler": torch.profiler.profile,
}


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("state", FOLLOWED)
def test_state_changes_no_result(state: str, call: str) -> None:
    part = training("10-5-1@10", "mse", "momentum", torch.float32)
    there, here = part.to(torch.float32), part.to(torch.float32)
    torch.manual_seed(1)
    expected = CALLS[call](TrainStep(*here[:3]), *here[3:])
    torch.manual_seed(1)
    with FOLLOWED[state]():
        found = CALLS[call](TrainStep(*there[:3]), *there[3:])
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(there.state(), here.state(), rtol=0, atol=0)


def test_losses_of_fit_are_on_the_cpu_whatever_the_default_device() -> None:
    part = training("10-5-1@10", "mse", "momentum", torch.float32)
    step = TrainStep(*part[:3])
    with torch.device("meta"):
        assert step(*part[3:]).device.type == "cpu"
        losses = step.fit(*part[3:], epochs=2, batch_size=3, shuffle=True)
    assert losses.device.type == "cpu" and losses.isfinite().all()


def test_uninitialized_memory_is_never_read(poisoned_memory: None) -> None:
    part = training("33-64-20-7@1000", "classes", "momentum", torch.float32)
    assert TrainStep(*part[:3]).fit(*part[3:], epochs=2, batch_size=300).isfinite().all()
    assert all(value.isfinite().all() for value in part.state().values())


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("net", ["33-64-20-7@1000", "530-300-5@112"])
def test_products_of_float32_are_never_less_accurate(net: str, precision: str) -> None:
    """Where native may take bfloat16 on the CPU."""
    part = training(net, "mse", "plain", torch.float32)
    found, full = part.to(torch.float32), part.to(torch.float32)
    expected = TrainStep(*full[:3])(*full[3:])
    with matmul_precision(precision):
        loss = TrainStep(*found[:3])(*found[3:])
    assert torch.equal(loss, expected)
    torch.testing.assert_close(found.state(), full.state(), rtol=0, atol=0)


def test_graphs_know_whether_algorithms_must_be_deterministic() -> None:
    """The step of a GPU goes through graphs(step, key, input, target)."""
    part = training("10-5-1@10", "mse", "plain", torch.float32)
    keys: list[bytes] = []

    def graphs(step: Callable[[Tensor, Tensor], Tensor], key: bytes, *data: Tensor) -> Tensor:
        keys.append(key)
        return step(*data)

    step = TrainStep(*part[:3])
    step(*part[3:])
    trainer = getattr(step._trainer, "_trainer", step._trainer)
    trainer.step(*part[3:], graphs)
    with FOLLOWED["deterministic algorithms"]():
        trainer.step(*part[3:], graphs)
    trainer.step(*part[3:], graphs)
    assert keys[0] != keys[1] and keys[0] == keys[2]


def test_steps_through_graphs_are_counted() -> None:
    """A captured step counts on copies of the optimizer's counts; set anew, these are followed."""
    part = training("10-5-1@10", "mse", "adam", torch.float32)
    plain = part.to(torch.float32)
    step, trainer = TrainStep(*plain[:3]), TrainStep(*part[:3])._trainer
    trainer = getattr(trainer, "_trainer", trainer)
    for i in range(6):
        if i == 4:
            for state in (*part.optimizer.state.values(), *plain.optimizer.state.values()):
                state["step"].fill_(20.0)
        step(*plain[3:])
        trainer.step(*part[3:], lambda step, key, *data: step(*data))
        torch.testing.assert_close(part.state(), plain.state(), rtol=0, atol=0)


def test_dispatch_modes_see_the_operator() -> None:
    part = training("10-5-1@10", "mse", "momentum", torch.float32)
    step = TrainStep(*part[:3])
    step(*part[3:])
    with Operators() as operators:
        step(*part[3:])
    assert operators.seen == ["mlp_ext.mlp_train_step_.default"]


def test_state_belongs_to_its_thread() -> None:
    """no_grad in one thread does not stop a step in another."""
    part = training("10-5-1@10", "mse", "momentum", torch.float32)
    step, losses = TrainStep(*part[:3]), []
    thread = Thread(target=lambda: losses.append(step(*part[3:])))
    with torch.no_grad():
        thread.start()
        thread.join()
    assert len(losses) == 1


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_step_inside_a_compiled_function_runs_as_it_is() -> None:
    part = training("10-5-1@10", "mse", "momentum", torch.float32)
    eager, step = part.to(torch.float32), TrainStep(*part[:3])
    compiled = torch.compile(lambda x, y: step(2 * x, y), backend="eager")
    found = compiled(*part[3:])
    torch.testing.assert_close(found, sgd_step(*eager[:3])(2 * eager.input, eager.target))
    torch.testing.assert_close(part.state(), eager.state())


# --- A model that holds its own step ---


class WithStep(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.step = TrainStep(self, nn.MSELoss(), optimizer)


def saved(model: WithStep) -> WithStep:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: WithStep = torch.load(file, weights_only=False)
    return loaded


def pickled(model: WithStep) -> WithStep:
    loaded: WithStep = pickle.loads(pickle.dumps(model))
    return loaded


def averaged(model: WithStep) -> WithStep:
    copied: WithStep = torch.optim.swa_utils.AveragedModel(model).module
    return copied


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved, averaged])
@pytest.mark.parametrize("call", CALLS)
def test_model_with_its_step_is_copied(
    call: str, copied: Callable[[WithStep], WithStep], trained: bool
) -> None:
    model, x, y = WithStep(), torch.randn(5, 4), torch.rand(5, 2)
    if trained:
        model.step(x, y)
    other = copied(model)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    losses = CALLS[call](other.step, x, y)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.manual_seed(1)
    torch.testing.assert_close(losses, CALLS[call](model.step, x, y))
    torch.testing.assert_close(other.state_dict(), model.state_dict())


def test_copy_is_checked_at_its_first_call() -> None:
    model = WithStep()
    model[1] = nn.LayerNorm(4)
    other = copy.deepcopy(model)
    with pytest.raises(TypeError, match=r"^TrainStep: model.1 is a torch.nn.modules.normalization"):
        other.step(torch.randn(5, 4), torch.rand(5, 2))
