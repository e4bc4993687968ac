"""The training loop: it is the tutorial's, and every kind of layer takes the same way."""

from collections.abc import Callable

import pytest
import torch
from samples import load
from torch import Tensor, nn

import mlp_ext
from mlp_ext.bench.training import LAYERS, Layers, Step, make_mlp, sgd_step
from mlp_ext.commands import loop
from mlp_ext.commands.data import Dataset
from mlp_ext.commands.loop import TrainingRun, accuracy, train
from mlp_ext.nn import Activation, activation_of
from mlp_ext.ops import PARAMETERS

pytestmark = pytest.mark.usefixtures("one_thread")

# How far a fused loss may be from native's: some roundings of the dtype, of losses below 1.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}


def finish(
    kinds: list[str], model: nn.Sequential, data: Dataset, epochs: int, **rest
) -> list[TrainingRun]:
    *_, runs = train(kinds, model, data, epochs=epochs, **rest)
    return runs


def counting_rows() -> Dataset:
    """Each of ten rows holds its number, so that it can be followed through the batches."""
    x = torch.arange(10.0).unsqueeze(1)
    return Dataset("rows", x, x / 10, x[:0], x[:0], classes=0)


@pytest.fixture
def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn is one epoch."""
    monkeypatch.setattr(loop, "GROUP_SECONDS", 0.0)


@pytest.fixture
def watched(
    monkeypatch: pytest.MonkeyPatch, no_groups: None
) -> Callable[[str], list[tuple[str, list[int]]]]:
    """Adds a kind that notes in a common list the batches it is given after its warm-up."""
    seen: list[tuple[str, list[int]]] = []

    def add(kind: str) -> list[tuple[str, list[int]]]:
        def row(*parts: object) -> Step:
            step = sgd_step(*parts)
            seen.clear()

            def noting(input: Tensor, target: Tensor) -> Tensor:
                seen.append((kind, input.flatten().int().tolist()))
                return step(input, target)

            return noting

        monkeypatch.setitem(LAYERS, kind, Layers(row))
        return seen

    return add


def test_native_is_the_tutorial() -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())
    x = torch.randn(10, 10, generator=torch.Generator().manual_seed(7))
    y = torch.tensor([[1.0], [0], [0], [1], [1], [1], [0], [0], [1], [1]])
    loss_function = torch.nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(50):
        y_pred = model(x)
        loss = loss_function(y_pred, y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    (run,) = finish(["native"], make_mlp([10, 5, 1], seed=7), load("tutorial", seed=7), 50, seed=7)
    assert run.losses == pytest.approx(losses, rel=1e-6)
    assert losses[-1] < losses[0] - 1e-3  # so 1e-6 says something


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["tutorial", "breast_cancer"])
def test_every_kind_has_natives_losses(name: str, dtype: torch.dtype) -> None:
    data = load(name, dtype=dtype)
    model = make_mlp([data.x.shape[1], 16, 8, 1]).to(dtype)
    native, *others = finish(list(LAYERS), model, data, epochs=5, lr=0.2, batch_size=32)
    assert native.losses[-1] < native.losses[0]
    for run in others:
        assert run.losses == pytest.approx(native.losses, abs=TOLERANCES[dtype]), run.kind


def test_every_kind_ends_at_natives_weights() -> None:
    data = load("digits", dtype=torch.float64)
    model = make_mlp([64, 16, 10]).double()
    native, *others = finish(list(LAYERS), model, data, epochs=2, lr=0.5)
    assert not torch.equal(native.model[0].weight, model[0].weight)
    for run in others:
        torch.testing.assert_close(run.model.state_dict(), native.model.state_dict())


def test_fused_is_fused() -> None:
    native, fused = finish(["native", "fused"], make_mlp([10, 5, 1]), load("tutorial"), epochs=1)
    assert type(native.model) is nn.Sequential
    assert [s.status for s in mlp_ext.fusion_report(fused.model)] == ["fused", "fused"]


def test_the_model_given_stays_as_it_was() -> None:
    model = make_mlp([10, 5, 1])
    finish(list(LAYERS), model, load("tutorial"), epochs=3)
    torch.testing.assert_close(
        model.state_dict(), make_mlp([10, 5, 1]).state_dict(), atol=0, rtol=0
    )
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid]
    assert all(p.grad is None for p in model.parameters())


def test_kinds_see_the_same_batches_and_take_turns(watched) -> None:
    seen, *_ = [watched(kind) for kind in "abc"]
    finish(["a", "b", "c"], make_mlp([1, 2, 1]), counting_rows(), epochs=4, batch_size=4)
    by_kind = {kind: [rows for k, rows in seen if k == kind] for kind in "abc"}
    assert len(by_kind["a"]) == 4 * 3
    assert by_kind["a"] == by_kind["b"] == by_kind["c"]
    assert "".join(kind for kind, _ in seen[::3]) == "abcbcacababc"


def test_an_epoch_is_every_row_once_in_new_order(watched) -> None:
    seen = watched("a")
    finish(["a"], make_mlp([1, 2, 1]), counting_rows(), epochs=3, batch_size=4)
    batches = [rows for _, rows in seen]
    assert [len(rows) for rows in batches] == [4, 4, 2] * 3
    epochs = [[row for rows in batches[i : i + 3] for row in rows] for i in (0, 3, 6)]
    assert all(sorted(rows) == list(range(10)) for rows in epochs)
    assert len({tuple(rows) for rows in [*epochs, range(10)]}) == 4


@pytest.mark.parametrize("batch_size", [10, 11])
def test_one_batch_stays_in_order(watched, batch_size: int) -> None:
    seen = watched("a")
    finish(["a"], make_mlp([1, 2, 1]), counting_rows(), epochs=2, batch_size=batch_size)
    assert [rows for _, rows in seen] == [list(range(10))] * 2


def test_loss_is_the_mean_over_rows() -> None:
    """Without learning it is that of the whole, though the last batch is short."""
    data, model = load("tutorial"), make_mlp([10, 5, 1])
    (run,) = finish(["native"], model, data, epochs=2, lr=0.0, batch_size=7)
    assert run.losses == pytest.approx([nn.MSELoss()(model(data.x), data.y).item()] * 2, rel=1e-6)


def test_training_follows_the_seed() -> None:
    data, model = load("breast_cancer"), make_mlp([30, 4, 1])
    first, again, other = (
        finish(["native"], model, data, epochs=2, seed=seed)[0].losses for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("seconds", [0.0, 10.0])
@pytest.mark.parametrize("batch_size", [4, 10])
def test_groups_of_epochs_change_no_loss(
    batch_size: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "GROUP_SECONDS", seconds)
    model, data = make_mlp([10, 5, 1]).double(), load("tutorial", dtype=torch.float64)
    turns = [
        [len(run.losses) for run in runs]
        for runs in train([*LAYERS], model, data, epochs=8, batch_size=batch_size)
    ]
    assert [done for done, *_ in turns] == ([3, 6, 8] if seconds else [*range(1, 9)])
    assert all(len({*done}) == 1 for done in turns)
    (alone,) = finish(["native"], model, data, 8, batch_size=batch_size)
    for run in finish([*LAYERS], model, data, 8, batch_size=batch_size):
        assert run.losses == pytest.approx(alone.losses, rel=1e-12), run.kind


def test_each_epoch_is_told_as_it_ends(no_groups: None) -> None:
    epochs = train(["native", "fused"], make_mlp([10, 5, 1]), load("tutorial"), epochs=3)
    for count, runs in enumerate(epochs, start=1):
        assert [run.kind for run in runs] == ["native", "fused"]
        assert all(len(run.losses) == len(run.seconds) == count for run in runs)
        assert all(seconds > 0 for run in runs for seconds in run.seconds)
    assert count == 3


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("name", "lr", "bar"), [("breast_cancer", 0.5, 0.93), ("digits", 2.0, 0.9)]
)
def test_every_kind_learns(name: str, lr: float, bar: float, kind: str) -> None:
    data = load(name)
    model = make_mlp([data.x.shape[1], 32, data.y.shape[1]])
    assert accuracy(model, data.x_test, data.y_test) < 0.7
    (run,) = finish([kind], model, data, epochs=8, lr=lr)
    assert accuracy(run.model, data.x, data.y) > bar
    assert accuracy(run.model, data.x_test, data.y_test) > bar


def test_mlp_is_linear_relu_linear_sigmoid() -> None:
    state = torch.get_rng_state()
    model = make_mlp([7, 5, 4, 3], seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    kinds = [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid]
    assert [type(m) for m in model] == kinds
    assert [(m.in_features, m.out_features) for m in model[::2]] == [(7, 5), (5, 4), (4, 3)]
    torch.manual_seed(2)
    assert torch.equal(model[0].weight, nn.Linear(7, 5).weight)
    assert not torch.equal(model[0].weight, make_mlp([7, 5, 4, 3], seed=3)[0].weight)


@pytest.mark.parametrize("activation", mlp_ext.ACTIVATIONS)
def test_mlp_has_the_activation_and_the_last_module(activation: str) -> None:
    model = make_mlp([7, 5, 3], activation=activation, last=nn.Identity)
    expected = Activation(activation, tuple(PARAMETERS[activation].values()))
    assert (activation_of(model[1]) or Activation("identity")) == expected
    assert type(model[-1]) is nn.Identity


def test_mlp_needs_two_widths() -> None:
    with pytest.raises(ValueError, match=r"widths must name input and output, got \[3\]"):
        make_mlp([3])


def test_accuracy_counts_classes_found() -> None:
    same = nn.Identity()
    two = torch.tensor([[0.1], [0.4], [0.6], [0.9]])
    assert accuracy(same, two, torch.tensor([[0.0], [1.0], [1.0], [1.0]])) == 0.75
    many = torch.tensor([[0.1, 0.2, 0.0], [0.9, 0.8, 0.7]])  # class 1, class 0
    assert accuracy(same, many, torch.tensor([[0.0, 1, 0], [0, 0, 1]])) == 0.5
    assert torch.tensor(accuracy(same, two[:0], two[:0])).isnan()
    logits = two - 0.5
    assert accuracy(same, logits, torch.tensor([[0.0], [1], [1], [1]]), "bce_with_logits") == 0.75


def test_kinds_stop_where_a_plain_loop_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """All at the same epoch, with the weights of the best one; also in groups of epochs."""
    monkeypatch.setattr(loop, "GROUP_SECONDS", 10.0)
    torch.manual_seed(1)
    x = torch.randn(60, 10).double()
    y = (x[:, :1] + torch.randn(60, 1) > 0).double()
    data = Dataset("random", x[:30], y[:30], x[:0], y[:0], classes=2)
    rows, model = (x[30:], y[30:]), make_mlp([10, 16, 1]).double()
    options = {"epochs": 60, "lr": 0.02, "optimizer": "adam", "batch_size": 30}
    runs = finish([*LAYERS], model, data, **options, validation=rows, patience=4)

    copy = make_mlp([10, 16, 1]).double()
    step = sgd_step(copy, nn.MSELoss(), torch.optim.Adam(copy.parameters(), lr=0.02))
    losses, states = [], []
    while len(losses) - 1 - (best := losses.index(min(losses)) if losses else -1) < 4:
        step(data.x, data.y)
        with torch.no_grad():
            losses.append(nn.functional.mse_loss(copy(rows[0]), rows[1]).item())
        states.append([p.detach().clone() for p in copy.parameters()])
    assert 0 < best < 50
    for run in runs:
        assert (run.has_ended, run.validation.best.epoch) == (True, best), run.kind
        assert len(run.losses) == len(run.seconds) == len(losses)
        assert run.validation.losses == pytest.approx(losses)
        assert accuracy(run.model, *rows) == run.validation.accuracies[best]
        torch.testing.assert_close([p.detach() for p in run.model.parameters()], states[best])
