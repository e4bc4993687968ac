"""Graphs that only count: when a step is run, captured, replayed; step and fit through them."""

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from typing import Any

import pytest
import torch
from steps import training
from torch import Tensor, nn

from mlp_ext import TrainStep, step_graph
from mlp_ext.reading import read
from mlp_ext.step_graph import COPIED, KEPT, WARM_UPS, Graphs, GraphTrainer, Step


class Recorder:
    """What was done, in order, and Graphs that do it."""

    def __init__(self, keys: Iterator[object] | None = None) -> None:
        self.done: list[str] = []
        self.key: object = 0
        self.keys = keys
        self.graphs = Graphs(self.capture, self.warm_up)

    def eager(self, input: Tensor, target: Tensor) -> Tensor:
        self.done.append("eager")
        return input.sum() + target.sum()

    def step(self, input: Tensor, target: Tensor) -> Tensor:
        key = next(self.keys) if self.keys else self.key
        return self.graphs(self.eager, key, input, target)

    def warm_up(self, step: Step, input: Tensor, target: Tensor) -> Tensor:
        self.done.append("warm up")
        return input.sum() + target.sum()

    def capture(self, step: Step, input: Tensor, target: Tensor) -> Step:
        self.done.append("capture")

        def replay(input: Tensor, target: Tensor) -> Tensor:
            self.done.append("replay")
            return input.sum() + target.sum()

        return replay

    def __call__(self, times: int = 1, rows: int = 4, dtype: torch.dtype = torch.float32) -> str:
        self.done = []
        for _ in range(times):
            input, target = torch.rand(rows, 3).to(dtype), torch.rand(rows, 2).to(dtype)
            assert torch.equal(self.step(input, target), input.sum() + target.sum())
        return " ".join(self.done)


FIRST = " ".join(["eager", *["warm up"] * WARM_UPS, "capture", "replay"])
UNTIL_CAPTURED = 2 + WARM_UPS


@pytest.fixture
def run() -> Recorder:
    return Recorder()


def test_a_step_that_comes_again_is_captured_once(run: Recorder) -> None:
    assert run(UNTIL_CAPTURED) == FIRST
    assert run(3) == "replay replay replay"


def test_new_hyperparameters_are_captured_anew(run: Recorder) -> None:
    run(UNTIL_CAPTURED)
    run.key = 1
    assert run(UNTIL_CAPTURED) == FIRST
    run.key = 0
    assert run() == "replay"


@pytest.mark.parametrize("change", [{"rows": 3}, {"dtype": torch.float64}], ids=str)
def test_other_arguments_have_a_graph_of_their_own(run: Recorder, change: dict[str, int]) -> None:
    """As the last, short batch of each epoch."""
    run(UNTIL_CAPTURED)
    for _ in range(UNTIL_CAPTURED - 1):
        assert run(**change) in ("eager", "warm up")
        assert run() == "replay"
    assert run(**change) == "capture replay"


def test_what_changes_at_every_call_stays_eager() -> None:
    run = Recorder(keys=count())
    assert set(run(20).split()) == {"eager"}
    assert len(run.graphs._calls) == KEPT


def test_few_graphs_are_kept(run: Recorder) -> None:
    for run.key in range(KEPT + 2):
        assert run(UNTIL_CAPTURED) == FIRST
    assert len(run.graphs.kept) == KEPT
    run.key = 0
    assert run() == "eager"


def test_a_capture_that_fails_is_not_tried_again(run: Recorder) -> None:
    def fail(step: Step, input: Tensor, target: Tensor) -> Step:
        run.done.append("fails")
        raise RuntimeError("operation not permitted when stream is capturing")

    run.graphs._capture = fail
    assert run(UNTIL_CAPTURED - 1) == FIRST.removesuffix(" capture replay")
    with pytest.warns(UserWarning, match="a step could not be captured .* not permitted"):
        assert run() == "fails eager"
    run.key = 1
    assert set(run(3 * UNTIL_CAPTURED).split()) == {"eager"}


def test_graphs_are_captured_in_their_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that pins memory for a DataLoader may call CUDA meanwhile."""
    modes = []

    def graph(graph: object, capture_error_mode: str = "global") -> Any:
        modes.append(capture_error_mode)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    step_graph.capture(lambda input, target: input.sum(), torch.ones(2, 3), torch.ones(2))
    assert modes == ["thread_local"]


# --- Steps of a Trainer ---


class Calls:
    """A graph that notes keys and batches, and runs each step between event and after."""

    def __init__(
        self,
        event: Callable[[int], object] = lambda call: None,
        after: Callable[[int], object] = lambda call: None,
    ) -> None:
        self.keys: list[bytes] = []
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.event, self.after = event, after

    def __call__(self, step: Step, key: bytes, input: Tensor, target: Tensor) -> Tensor:
        self.event(len(self.keys))
        self.keys.append(key)
        self.batches.append((input, target))
        loss = step(input, target)
        self.after(len(self.keys) - 1)
        return loss


def momentum_buffers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state["momentum_buffer"] for state in optimizer.state.values()]


def test_key_follows_the_optimizer() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = read(model, nn.MSELoss(), optimizer).trainer
    calls = Calls()

    def key() -> bytes | None:
        before = len(calls.keys)
        trainer.step(torch.randn(4, 3), torch.randn(4, 2), calls)
        return calls.keys[-1] if len(calls.keys) > before else None

    assert key() is None  # momentum begins
    first = key()
    assert key() == first is not None
    optimizer.param_groups[0]["lr"] = 0.2
    assert key() != first
    optimizer.param_groups[0]["lr"] = 0.1
    assert key() == first
    optimizer.state[model[0].bias]["momentum_buffer"] = torch.zeros(2)
    assert key() != first
    model[0].bias.requires_grad_(False)
    assert key() != first


def test_key_follows_what_a_pointer_does_not_tell() -> None:
    """A transposed weight has the data of before; the loss weight of before may be freed."""
    model, criterion = nn.Sequential(nn.Linear(3, 3)), nn.CrossEntropyLoss(torch.rand(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = read(model, criterion, optimizer).trainer
    calls = Calls()

    def step() -> None:
        trainer.step(torch.randn(4, 3), torch.randint(3, (4,)), calls)

    step()
    model[0].weight.data = model[0].weight.data.t()
    step()
    before = criterion.weight.data  # noqa: F841  keeps the memory, which would be given out again
    criterion.weight.data = torch.rand(3)
    step()
    assert len(set(calls.keys)) == 3


def test_key_follows_the_precision_of_products() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = read(model, nn.MSELoss(), optimizer).trainer
    calls = Calls()
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            trainer.step(torch.randn(4, 3), torch.randn(4, 2), calls)
    finally:
        torch.set_float32_matmul_precision(before)
    assert calls.keys[0] == calls.keys[2] != calls.keys[1]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 32, 50, 100])
@pytest.mark.parametrize("options", ["plain", "dampening"])
def test_fit_through_a_graph_is_fit(options: str, batch_size: int, shuffle: bool) -> None:
    """Its calls are the eager loop's; without the first, where that begins momentum."""
    part = training("3-17-5@100", "classes", options, torch.float64)
    plain, calls, after = part.to(torch.float64), Calls(), []
    given = (4, batch_size, shuffle)
    drawn = [torch.Generator().manual_seed(3) for _ in range(3)]
    expected = read(*plain[:3]).trainer.fit(*plain[3:], *given, drawn[0], None)
    trainer = read(*part[:3]).trainer
    losses = trainer.fit(*part[3:], *given, drawn[1], None, calls)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))
    torch.testing.assert_close(part.state(), plain.state(), rtol=0, atol=0)
    orders = [
        torch.randperm(100, generator=drawn[2]) if shuffle else torch.arange(100) for _ in range(4)
    ]
    batches = [
        (part.input[rows], part.target[rows])
        for order in orders
        for rows in order.split(batch_size)
    ]
    assert len(set(calls.keys)) == 1
    skipped = 1 if options == "dampening" else 0
    torch.testing.assert_close(calls.batches, batches[skipped:], rtol=0, atol=0)

    losses = trainer.fit(*part[3:], *given, drawn[1], lambda epoch, loss: after.append(loss), calls)
    assert after == losses
    assert len(calls.keys) == 2 * len(batches) - skipped


def test_settings_are_those_of_the_start() -> None:
    part = training("3-17-5@100", "classes", "plain", torch.float64)
    plain = part.to(torch.float64)
    read(*plain[:3]).trainer.fit(*plain[3:], 3, 50, False, None, None)
    calls = Calls(lambda call: part.optimizer.param_groups[0].update(lr=call))
    read(*part[:3]).trainer.fit(*part[3:], 3, 50, False, None, None, calls)
    torch.testing.assert_close(part.state(), plain.state(), rtol=0, atol=0)


def test_losses_of_many_epochs_of_one_batch() -> None:
    """More than are kept at a time."""
    part = training("10-5-1@10", "mse", "plain", torch.float64)
    plain = part.to(torch.float64)
    given = (*part[3:], 4100, 10, False, None, None)
    losses = read(*part[:3]).trainer.fit(*given, Calls())
    expected = read(*plain[:3]).trainer.fit(*given)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))


def interrupt(call: int) -> None:
    """As Ctrl-C, which a job in the background ignores."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGALRM)
    finally:
        signal.signal(signal.SIGALRM, before)


def fail(call: int) -> None:
    raise ZeroDivisionError


EVENTS = pytest.mark.parametrize(
    ("event", "error"),
    [(interrupt, KeyboardInterrupt), (fail, ZeroDivisionError)],
    ids=["interrupt", "fail"],
)


@EVENTS
@pytest.mark.parametrize("calls", [0, 3])
def test_what_interrupts_leaves_whole_steps(
    event: Callable[[int], None], error: type[BaseException], calls: int
) -> None:
    part = training("3-17-5@100", "classes", "dampening", torch.float64)
    plain = part.to(torch.float64)
    graph = Calls(lambda call: event(call) if call == calls else None)
    with pytest.raises(error):
        read(*part[:3]).trainer.fit(*part[3:], 9, 20, False, None, None, graph)
    step = TrainStep(*plain[:3])
    for rows in torch.arange(100).split(20)[: 1 + calls]:  # the first began momentum
        step(plain.input[rows], plain.target[rows])
    torch.testing.assert_close(part.state(), plain.state(), rtol=0, atol=0)


@EVENTS
@pytest.mark.parametrize("options", ["adam", "dampening"])
def test_a_step_done_before_an_error_counts(
    options: str, event: Callable[[int], None], error: type[BaseException]
) -> None:
    """As where memory runs out for the copy of its loss."""
    part = training("10-5-1@10", "mse", options, torch.float64)
    plain = part.to(torch.float64)
    trainer = read(*part[:3]).trainer
    for graph in (None, Calls(), Calls(after=event), Calls(event), Calls()):
        raises = isinstance(graph, Calls) and event in (graph.event, graph.after)
        with pytest.raises(error) if raises else nullcontext():
            trainer.step(*part[3:], graph)
    step = TrainStep(*plain[:3])
    for _ in range(4):  # all but the one that an error came before
        step(*plain[3:])
    torch.testing.assert_close(part.state(), plain.state(), rtol=0, atol=0)


@pytest.mark.parametrize("fit", [False, True], ids=["step", "fit"])
def test_a_replay_counts_as_a_change(fit: bool) -> None:
    """As of any step, or a backward through what was saved before would give wrong gradients."""
    part = training("10-5-1@10", "mse", "momentum", torch.float64)
    part.model[0].bias.requires_grad_(False)
    trainer = read(*part[:3]).trainer
    trainer.step(*part[3:])
    tensors = [*part.model.parameters(), *momentum_buffers(part.optimizer)]
    before = [t._version for t in tensors]

    def replay(step: Step, key: bytes, input: Tensor, target: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.float64)

    if fit:
        trainer.fit(*part[3:], 1, 10, False, None, None, replay)
    else:
        trainer.step(*part[3:], replay)
    for t, version in zip(tensors, before, strict=True):
        assert t._version == version + (t is not part.model[0].bias)


# --- Which steps go through graphs ---


class OnGpu(Tensor):
    is_cuda = True


def on_gpu(*shape: int) -> Tensor:
    return torch.rand(shape).as_subclass(OnGpu)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[GraphTrainer, Recorder]:
    monkeypatch.setattr(step_graph, "_is_one_launch", lambda widths, rows, *_: rows < 5)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = nn.Sequential(nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer, run = GraphTrainer(*read(model, nn.MSELoss(), optimizer)[:2]), Recorder()
    trainer.graphs = run.graphs
    return trainer, run


Recorded = tuple[GraphTrainer, Recorder]


def fit(trainer: GraphTrainer, input: Tensor, batch_size: int) -> None:
    trainer.fit(input, on_gpu(len(input), 2), 2, batch_size, False, None, None)


def test_steps_and_fit_share_a_graph(recorded: Recorded) -> None:
    trainer, run = recorded
    input, target = on_gpu(10, 64), on_gpu(10, 2)
    for _ in range(3):
        trainer.step(input, target)
    fit(trainer, on_gpu(25, 64), 10)  # and a short batch of its own
    trainer.step(input, target)
    # Beside the step that began momentum and the first ones of 10 and of 5 rows.
    done = ["warm up"] * WARM_UPS + ["capture", "replay", "replay", "warm up", "replay"]
    assert run.done == done
    assert len(run.graphs.kept) == 1


BIG = COPIED // 4 // 66 + 1  # rows


@pytest.mark.parametrize(
    ("settings", "dropout"), [({"accumulate": 2}, 0), ({"max_norm": 1.0}, 0), ({}, 0.5)], ids=str
)
def test_steps_with_gradients_or_dropout_are_not_captured(
    settings: dict[str, Any], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    model = nn.Sequential(nn.Linear(64, 2), nn.Dropout(dropout))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainStep(model, nn.MSELoss(), optimizer, **settings)
    assert not isinstance(step._trainer, GraphTrainer)
    assert isinstance(TrainStep(model.eval(), nn.MSELoss(), optimizer)._trainer, GraphTrainer)


def test_many_steps_are_one_call_only_where_each_is_one_launch(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else Ctrl-C would wait for thousands of long steps."""
    trainer, _ = recorded
    at_once = []

    class Asked:
        def fit(self, *args: Any) -> list[float]:
            at_once.append(args[-1])
            return []

    monkeypatch.setattr(trainer, "_trainer", Asked())
    for rows, batch_size in ((25, 4), (25, 10), (BIG, BIG)):
        fit(trainer, on_gpu(rows, 64), batch_size)
    assert at_once == [True, False, False]


@pytest.mark.parametrize(
    ("rows", "graphs"), [(4, False), (5, True), (BIG - 1, True), (BIG, False)], ids=str
)
def test_neither_one_launch_nor_what_is_dear_to_copy(
    recorded: Recorded, rows: int, graphs: bool
) -> None:
    trainer, run = recorded
    trainer.step(on_gpu(rows, 64), on_gpu(rows, 2))  # begins momentum
    for _ in range(2):
        trainer.step(on_gpu(rows, 64), on_gpu(rows, 2))
    assert run.done == ["warm up"] * graphs


def test_a_batch_of_fit_may_be_small_where_all_is_big(recorded: Recorded) -> None:
    trainer, run = recorded
    fit(trainer, on_gpu(BIG, 64), BIG // 4)
    assert run.done[:4] == ["warm up"] * 3 + ["capture"]


def test_a_number_of_rows_is_decided_once(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = recorded
    asked = []

    def is_one_launch(widths: list[int], *key: Any) -> bool:
        asked.append(key)
        return True

    monkeypatch.setattr(step_graph, "_is_one_launch", is_one_launch)
    for rows in (6, 6, 7, 6, 7):
        trainer.step(on_gpu(rows, 64), on_gpu(rows, 2))
    fit(trainer, on_gpu(20, 64), 7)
    assert asked == [(rows, torch.float32, torch.device("cpu")) for rows in (6, 7)]
    monkeypatch.setattr(step_graph, "DECIDED", 2)
    for rows in range(1, 9):
        trainer.step(on_gpu(rows, 64), on_gpu(rows, 2))
    assert len(trainer._ways) == 2
    asked.clear()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    trainer.step(on_gpu(6, 64), on_gpu(6, 2))
    assert not asked  # layer by layer


@pytest.mark.parametrize("input", [torch.rand(9, 64), None, on_gpu()], ids=["cpu", "none", "0-d"])
def test_what_is_no_batch_on_a_gpu_is_the_steppers(recorded: Recorded, input: Any) -> None:
    trainer, run = recorded
    errors = (TypeError, ValueError, RuntimeError)
    with pytest.raises(errors) as expected:
        trainer._trainer.step(input, on_gpu(9, 3))
    with pytest.raises(errors, match=re.escape(str(expected.value))):
        trainer.step(input, on_gpu(9, 3))
    assert not run.done
