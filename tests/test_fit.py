"""fit: the epochs and batches of an eager loop; progress, Ctrl-C, threads."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from eager_steps import Eager
from references import Results
from steps import Training, training
from terminals import on_terminal
from torch import nn

from mlp_ext import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")


def both(part: Training, dtype: torch.dtype = torch.float64, **options) -> list[Results]:
    """What eager and fit come to, from the same seed."""
    seeded = "generator" in options
    results = []
    for ours in (False, True):
        copy = part.to(dtype)
        if seeded:
            options["generator"] = torch.Generator().manual_seed(3)
        torch.manual_seed(7)
        if ours:
            losses = TrainStep(*copy[:3]).fit(*copy[3:], **options)
        else:
            losses = Eager(*copy[:3]).fit(*copy[3:], **options)
        states = [torch.get_rng_state()]
        if seeded:
            states.append(options["generator"].get_state())
        results.append({"losses": losses, "random": torch.cat(states), **copy.state()})
    return results


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch_size", [None, 1, 32, 50, 99, 100, 1000])
@pytest.mark.parametrize("order", ["in order", "shuffled", "shuffled by a generator"])
def test_batches_are_the_eager_loops(order: str, batch_size: int | None, reduction: str) -> None:
    options = {"batch_size": batch_size, "shuffle": order != "in order"}
    if "generator" in order:
        options["generator"] = None
    part = training("3-17-5@100", "classes", "dampening", torch.float64, reduction)
    eager, ours = both(part, epochs=4, **options)
    torch.testing.assert_close(ours, eager)
    assert ours["losses"].shape == (4,)


@pytest.mark.parametrize("options", ["adam-amsgrad", "rmsprop-centered", "adagrad-decay"])
@pytest.mark.parametrize("batch_size", [None, 32])
def test_every_optimizer_counts_its_steps(batch_size: int | None, options: str) -> None:
    part = training("3-17-5@100", "huber", options, torch.float64)
    eager, ours = both(part, epochs=6, batch_size=batch_size, shuffle=batch_size is not None)
    torch.testing.assert_close(ours, eager)


def test_rows_of_many_bytes_are_shuffled_in_parts() -> None:
    """Batches of 70 rows, of which 8 MiB hold several and not all."""
    part = training("3-17-5@100", "mse", "plain", torch.float64)
    part.model[0] = nn.Linear(4096, 17).double()
    optimizer = torch.optim.SGD(part.model.parameters(), lr=1e-3)
    x, y = torch.randn(1000, 4096).double(), torch.rand(1000, 5).double()
    part = part._replace(optimizer=optimizer, input=x, target=y)
    eager, ours = both(part, epochs=2, batch_size=70, shuffle=True)
    torch.testing.assert_close(ours, eager)


def test_default_is_fifty_epochs_of_one_batch() -> None:
    part = training("10-5-1@10", "mse", "momentum", torch.float64)
    copy = part.to(torch.float64)
    eager = Eager(*copy[:3]).fit(*copy[3:], epochs=50)
    losses = TrainStep(*part[:3]).fit(*part[3:])
    torch.testing.assert_close(losses, eager)


def test_fit_goes_on_where_it_stopped() -> None:
    part = training("10-5-1@10", "mse", "dampening", torch.float64)
    at_once, in_parts = part.to(torch.float64), part.to(torch.float64)
    expected = TrainStep(*at_once[:3]).fit(*at_once[3:], epochs=7, batch_size=3)
    step = TrainStep(*in_parts[:3])
    found = [step.fit(*in_parts[3:], epochs=n, batch_size=3) for n in (1, 2, 4)]
    assert torch.equal(torch.cat(found), expected)
    torch.testing.assert_close(in_parts.state(), at_once.state(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "of_losses"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_losses_are_float32_at_least(dtype: torch.dtype, of_losses: torch.dtype) -> None:
    part = training("10-5-1@10", "mse", "plain", dtype)
    losses = TrainStep(*part[:3]).fit(*part[3:], epochs=2)
    assert (losses.dtype, losses.device.type) == (of_losses, "cpu")
    assert not losses.requires_grad


@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "shuffle": True}], ids=str)
def test_no_rows_are_an_error(options: dict, part: Training) -> None:
    with pytest.raises(ValueError, match=r"^TrainStep.fit: input has no rows$"):
        TrainStep(*part[:3]).fit(part.input[:0], part.target[:0], epochs=3, **options)


def test_loss_that_is_not_finite_does_not_stop() -> None:
    part = training("10-5-1@10", "mse-linear", "plain", torch.float32)
    part.input[7] = torch.inf
    losses = TrainStep(*part[:3]).fit(*part[3:], epochs=3, batch_size=5)
    assert not losses.isfinite().any()


ERRORS = [
    (
        {"input": [1.0]},
        TypeError,
        r"input must be a tensor, got list; pass torch.as_tensor\(input\)",
    ),
    ({"target": None}, TypeError, "target must be a tensor, got None"),
    ({"input": torch.zeros(())}, ValueError, r"input must be \[n, \*, K\], got \[\]"),
    ({"input": torch.zeros(9, 10)}, ValueError, "input has 9 rows, target 10"),
    ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
    ({"epochs": -1}, ValueError, "epochs must be at least 1, got -1"),
    ({"epochs": 1.0}, TypeError, "epochs must be an int, got 1.0"),
    ({"epochs": None}, TypeError, "epochs must be an int, got None"),
    ({"epochs": True}, TypeError, "epochs must be an int, got True"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ({"batch_size": "all"}, TypeError, "batch_size must be an int, got 'all'"),
    (
        {"batch_size": 2**63},
        ValueError,
        r"batch_size must be below 2\*\*63, got 9223372036854775808",
    ),
    ({"batch_size": [3] * 1000}, TypeError, "batch_size must be an int, got list"),
    ({"epochs": torch.ones(3)}, TypeError, "epochs must be an int, got torch.Tensor"),
    ({"shuffle": 1}, TypeError, "shuffle must be True or False, got 1"),
    ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got 3"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS, ids=lambda v: str(v)[:30])
def test_wrong_argument_is_an_error_before_anything(wrong: dict, error, message: str) -> None:
    part = training("10-5-1@10", "mse", "momentum", torch.float32)
    before = part.state()
    with pytest.raises(error, match=f"^TrainStep.fit: {message}$"):
        TrainStep(*part[:3]).fit(**{"input": part.input, "target": part.target, **wrong})
    torch.testing.assert_close(part.state(), before, rtol=0, atol=0)


@pytest.mark.parametrize("count", [np.int64(4), np.uint8(4), torch.tensor(4)], ids=repr)
def test_counts_may_be_of_numpy(count) -> None:
    part = training("10-5-1@10", "mse", "momentum", torch.float64)
    same = part.to(torch.float64)
    losses = TrainStep(*part[:3]).fit(*part[3:], epochs=count, batch_size=count)
    assert torch.equal(losses, TrainStep(*same[:3]).fit(*same[3:], epochs=4, batch_size=4))


@pytest.mark.parametrize("shuffle", [False, True])
def test_largest_batch_size_is_one_batch(shuffle: bool) -> None:
    part = training("10-5-1@10", "mse", "momentum", torch.float64)
    for size in (2**63 - 1, 10):
        copy = part.to(torch.float64)
        trainer = TrainStep(*copy[:3])._trainer
        losses = trainer.fit(*copy[3:], 3, size, shuffle, None, None)
        if size > 10:
            expected, state = losses, copy.state()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(copy.state(), state)
    with pytest.raises(ValueError, match="batch_size must be from 1 on, got 0"):
        trainer.fit(*part[3:], 3, 0, shuffle, None, None)


@pytest.mark.parametrize("options", ["dampening", "adam"])
def test_error_on_the_way_leaves_the_last_finished_step(options: str) -> None:
    part = training("3-17-5@100", "classes", options, torch.float64)
    part.target[60] = 5  # no such class
    expected = part.to(torch.float64)
    TrainStep(*expected[:3]).fit(expected.input[:60], expected.target[:60], 1, batch_size=20)
    with pytest.raises(IndexError, match="classes from 0 to 4"):
        TrainStep(*part[:3]).fit(*part[3:], epochs=2, batch_size=20)
    torch.testing.assert_close(part.state(), expected.state(), rtol=0, atol=0)


# --- Progress ---


def fit(progress: bool = True) -> None:
    part = training("10-5-1@10", "mse", "plain", torch.float32)
    TrainStep(*part[:3]).fit(*part[3:], epochs=30, progress=progress)


def test_bar_where_tqdm_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = on_terminal(monkeypatch)
    fit()
    assert "30/30 [" in terminal.getvalue()


def test_plain_text_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr("mlp_ext.progress.find_spec", lambda name: None)
    fit()
    text = terminal.getvalue()
    assert text.startswith("\repoch: 0 loss: 0.")
    assert "\repoch: 29 loss: 0." in text
    assert text.endswith("\n")


def test_bar_in_a_notebook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its stderr is not a terminal."""
    pytest.importorskip("tqdm.auto")  # which chooses its bar when it is imported: that of text
    kernel = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    fit()
    assert "30/30 [" in capsys.readouterr().err
    kernel.config.clear()  # IPython's own terminal
    fit()
    assert capsys.readouterr().err == ""


def test_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    fit()
    assert capsys.readouterr().err == ""


def test_nothing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    fit(progress=False)
    assert terminal.getvalue() == ""


# --- Ctrl-C and threads ---


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "options", [{"batch_size": 1000}, {"batch_size": 300, "shuffle": True}], ids=str
)
def test_ctrl_c_leaves_a_whole_number_of_steps(options: dict, ctrl_c: None) -> None:
    part = training("33-64-20-7@1000", "classes", "nesterov", torch.float64)
    again = part.to(torch.float64)
    weight = next(part.model.parameters()).detach()
    before = weight.clone()

    def interrupt() -> None:
        while torch.equal(weight, before):  # until a step is running
            time.sleep(1e-3)
        signal.raise_signal(signal.SIGINT)

    torch.manual_seed(7)
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        TrainStep(*part[:3]).fit(*part[3:], epochs=2**40, **options)
    thread.join()
    found = part.state()

    torch.manual_seed(7)
    step = TrainStep(*again[:3])
    for _ in range(5000):
        order = torch.randperm(1000) if "shuffle" in options else torch.arange(1000)
        for rows in order.split(options["batch_size"]):
            step(again.input[rows], again.target[rows])
            state = again.state()
            if all(torch.allclose(found[n], state[n], rtol=1e-9, atol=1e-12) for n in found):
                return
    pytest.fail("no number of steps leads to this state")


def test_models_in_threads_are_as_alone() -> None:
    parts = [training("33-64-20-7@1000", "classes", "momentum", torch.float32) for _ in range(4)]
    alone = [part.to(torch.float32) for part in parts]

    def fit(part: Training, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        options = {"batch_size": 64, "shuffle": True, "generator": generator}
        TrainStep(*part[:3]).fit(*part[3:], epochs=5, **options)
        for _ in range(5):
            TrainStep(*part[:3])(*part[3:])

    for seed, part in enumerate(alone):
        fit(part, seed)
    threads = [threading.Thread(target=fit, args=(p, seed)) for seed, p in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for part, expected in zip(parts, alone, strict=True):
        torch.testing.assert_close(part.state(), expected.state(), rtol=0, atol=0)


def test_other_threads_run_meanwhile() -> None:
    """Beside a fit that held the interpreter's lock, this one would see no weight but the first and
    the last."""
    part = training("10-5-1@10", "mse", "plain", torch.float32)
    weight, step = next(part.model.parameters()).detach(), TrainStep(*part[:3])
    thread = threading.Thread(target=lambda: step.fit(*part[3:], epochs=50000))
    seen = {weight[0, 0].item()}
    thread.start()
    while thread.is_alive():
        seen.add(weight[0, 0].item())
    assert len(seen) > 2
