"""On a GPU: whole training steps, in one block and layer by layer, many at once, and as a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_steps import (
    OPTIONS,
    Data,
    State,
    Training,
    arguments,
    assert_trains_as_torch,
    data_of,
    model_of,
    states_of,
)
from shapes import DTYPES
from torch import Tensor, nn

from mlp_ext import _C, TrainStep
from mlp_ext.bench.training import sgd_step
from mlp_ext.nn import Activation
from mlp_ext.step_graph import WARM_UPS, Graphs

if not torch.cuda.is_available():
    pytest.skip("torch finds no cuda device here", allow_module_level=True)

pytestmark = pytest.mark.cuda

OP = torch.ops.mlp_ext.mlp_train_step_.default
close = torch.testing.assert_close

# In one block; the last ones layer by layer: too many products, too many layers.
ONE_BLOCK = [
    Training((1, 1), 1, 1),
    Training((10, 5, 1), 10, 10),
    Training((3, 17, 5), 33, 14),
    Training((33, 64, 20, 7), 700, 70),
    Training((64, 128), 64, 32),  # more than 48 KiB of shared memory
    Training((5, 4, 3), 12, 5, bias=False),
]
LAYERS = [Training((64, 300, 10), 200, 200), Training((4,) + (3,) * 9, 9, 4)]


def on_gpu(value: Any) -> Any:
    if isinstance(value, list):
        return [on_gpu(v) for v in value]
    return value.cuda() if isinstance(value, Tensor) else value


def run(t: Training, data: Data, parameters: list[Tensor], states: list[State]) -> Tensor:
    there = {name: on_gpu(v) for name, v in arguments(t, data, parameters, states).items()}
    if t.device_count is None:
        there["steps"] = [step.cpu() for step in there["steps"]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # nothing waits
    losses: Tensor = OP(**there)
    torch.cuda.set_sync_debug_mode("default")
    changed = arguments(t, data, parameters, states)
    for name in ("parameters", "states", "steps"):
        for here, value in zip(changed[name], there[name], strict=True):
            here.copy_(value)
    return losses.cpu()


def test_shapes_here_take_each_path() -> None:
    arch = 10 * torch.cuda.get_device_capability()[0]
    for path, trainings in (("one_block", ONE_BLOCK), ("layers", LAYERS)):
        for t in trainings:
            plan = _C.cuda_step_plan([*t.widths], t.batch, "float32", arch, 163 << 10)
            assert plan["path"] == path, t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [*ONE_BLOCK, *LAYERS], ids=str)
def test_steps_match_torch(training: Training, dtype: torch.dtype) -> None:
    assert_trains_as_torch(run, training._replace(dtype=dtype))


TANH = Activation("tanh")
SMALL = Training((6, 5, 4), 40, 36, hidden=TANH)
MANY = Training((64, 300, 4), 240, 200, hidden=TANH)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", [*_C.losses(), "cross_entropy-soft"])
def test_losses_match_torch(loss: str, reduction: str) -> None:
    for training in (SMALL, MANY):
        options = {"lr": 0.01 if reduction == "mean" else 0.0001}
        training = training._replace(loss=loss, reduction=reduction, options=options)
        assert_trains_as_torch(run, training)
        if loss in ("bce_with_logits", "cross_entropy", "cross_entropy-soft", "nll"):
            assert_trains_as_torch(run, training._replace(weighted=True))
        if loss.startswith("cross_entropy"):
            smoothed = {"label_smoothing": 0.1}
            assert_trains_as_torch(run, training._replace(loss_options=smoothed))


@pytest.mark.parametrize("options", OPTIONS)
def test_optimizers_match_torch(options: str) -> None:
    name, chosen = OPTIONS[options]
    for training in (SMALL, MANY):
        for count in (None, torch.float32, torch.float64):
            training = training._replace(optimizer=name, options=chosen, device_count=count)
            assert_trains_as_torch(run, training._replace(frozen=(1,)))


@pytest.mark.parametrize("name", ["leaky_relu", "gelu", "silu", "softplus"])
def test_activations_match_torch(name: str) -> None:
    for training in (SMALL, MANY):
        activation = Activation(name)
        assert_trains_as_torch(run, training._replace(hidden=activation, last=activation))


# ---- fit ----


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("training", [ONE_BLOCK[1], ONE_BLOCK[2], ONE_BLOCK[3], LAYERS[0]], ids=str)
def test_fit_is_the_eager_loop(training: Training, shuffle: bool) -> None:
    x, y = (
        torch.rand(training.rows, n, device="cuda")
        for n in training.widths[:: len(training.widths) - 1]
    )
    nets = [model_of(training).cuda() for _ in range(2)]
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, dampening=0.2) for net in nets
    ]
    parameters = [*nets[0].parameters()]
    activations = [*["relu"] * (len(training.widths) - 2), "identity"]
    trainer = _C.Trainer(
        parameters, [0] * len(parameters), activations, [], [], [], "mse", "mean", None, [], True,
        optimizers[0], "sgd", {}, _C.Guards([], []), _C.Gradients(None, 1), None,
    )  # fmt: skip
    drawn = [torch.Generator().manual_seed(5) for _ in nets]
    at_once = training in ONE_BLOCK
    found = trainer.fit(x, y, 3, training.batch, shuffle, drawn[0], None, None, at_once)
    for epoch in range(3):
        order = torch.arange(training.rows)
        if shuffle:
            order = torch.randperm(training.rows, generator=drawn[1])
        total = 0.0
        for rows in order.cuda().split(training.batch):
            loss = nn.functional.mse_loss(nets[1](x[rows]), y[rows])
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
            total += loss.item() * len(rows)
        close(found[epoch], total / training.rows, rtol=1e-4, atol=1e-5)
    close([*nets[0].parameters()], [*nets[1].parameters()], rtol=1e-4, atol=1e-5)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        buffers = [o.state[r]["momentum_buffer"] for o, r in zip(optimizers, (p, q), strict=True)]
        close(*buffers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shuffle", [False, True])
def test_fit_goes_through_the_graphs_of_steps(shuffle: bool) -> None:
    """Layer by layer: 200 rows by 60, and as many by step before and after."""
    training = Training((64, 300, 10), 200, 60)
    x, y = torch.rand(200, 64, device="cuda"), torch.rand(200, 10, device="cuda")
    nets = [model_of(training).cuda() for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    step = TrainStep(nets[0], nn.MSELoss(), optimizers[0])
    eager = sgd_step(nets[1], nn.MSELoss(), optimizers[1])
    drawn = [torch.Generator().manual_seed(5) for _ in nets]

    def same(found: Any, expected: Any) -> None:
        close(found, expected, rtol=1e-4, atol=1e-5)

    def is_the_eager_step() -> None:
        same(step(x[:60], y[:60]), eager(x[:60], y[:60]).detach())

    is_the_eager_step()
    losses = step.fit(x, y, 6, 60, shuffle, drawn[0])
    graphs = step._trainer.graphs.kept
    assert [key[0][0][0] for key in graphs] == [60, 20]
    for epoch in range(6):
        order = torch.randperm(200, generator=drawn[1]) if shuffle else torch.arange(200)
        batches = order.cuda().split(60)
        total = sum(eager(x[rows], y[rows]).item() * len(rows) for rows in batches)
        same(losses[epoch].item(), total / 200)
    is_the_eager_step()
    assert len(graphs) == 2
    same(step.fit(x, y, 3), torch.stack([eager(x, y).detach() for _ in range(3)]).cpu())
    same([*nets[0].parameters()], [*nets[1].parameters()])
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        same(*(o.state[r]["momentum_buffer"] for o, r in zip(optimizers, (p, q), strict=True)))


# ---- graphs ----


@pytest.mark.parametrize("options", ["sgd", "adam-amsgrad"])
@pytest.mark.parametrize("loss", ["mse", "bce", "cross_entropy"])
@pytest.mark.parametrize("training", [SMALL, MANY], ids=["one block", "layers"])
def test_a_graph_of_steps_is_the_steps(training: Training, loss: str, options: str) -> None:
    """Also cross-entropy by classes, which asks the device for nothing."""
    name, chosen = OPTIONS[options]
    training = training._replace(loss=loss, optimizer=name, options=chosen, shuffled=False)
    training = training._replace(device_count=torch.float32)  # which a replay reads and advances
    given = []
    for _ in range(2):
        parameters = [p.detach().clone() for p in model_of(training).parameters()]
        there = arguments(training, data_of(training), parameters, states_of(training))
        for name in ("order", "batch_size"):
            there.pop(name)
        given.append({name: on_gpu(value) for name, value in there.items()})
    graphs = Graphs()
    for _ in range(WARM_UPS + 5):
        data = batch_of(training)
        x, y = data.input.cuda(), data.target.cuda()
        expected = OP(**given[1] | {"input": x, "target": y})
        found = graphs(lambda x, y: OP(**given[0] | {"input": x, "target": y}), 0, x, y)
        assert torch.equal(found, expected)
    for name in ("parameters", "states", "steps"):
        for a, b in zip(given[0][name], given[1][name], strict=True):
            assert torch.equal(a, b)


def batch_of(t: Training) -> Data:
    N = t.widths[-1]
    target = torch.randint(N, (t.rows,)) if t.loss == "cross_entropy" else torch.rand(t.rows, N)
    return Data(torch.randn(t.rows, t.widths[0]), target, None, None)


# ---- autocast ----


@pytest.mark.parametrize("loss", [nn.MSELoss, nn.CrossEntropyLoss])
@pytest.mark.parametrize("training", [SMALL, MANY], ids=["narrow", "layers"])
def test_autocast_is_the_eager_loop(training: Training, loss: type[nn.Module]) -> None:
    """Also as a graph, from the fifth step on, and without autocast after it."""
    x, y = (torch.rand(40, n, device="cuda") for n in (training.widths[0], training.widths[-1]))
    nets = [model_of(training).cuda() for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    step = TrainStep(nets[0], loss(), optimizers[0])
    for enabled in (*[True] * 7, False):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            found, expected = step(x, y), loss()(nets[1](x), y)
        optimizers[1].zero_grad()
        expected.backward()
        optimizers[1].step()
        close(found, expected.detach(), rtol=1e-2, atol=1e-3)
    close([*nets[0].parameters()], [*nets[1].parameters()], rtol=1e-2, atol=1e-3)


def test_what_autocast_on_cuda_refuses() -> None:
    model = model_of(SMALL).cuda()
    x, y = torch.rand(8, 6, device="cuda"), torch.rand(8, 4, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for criterion, dtype, message in (
        (nn.MSELoss(), torch.float16, "needs a GradScaler"),
        (nn.BCELoss(), torch.bfloat16, "PyTorch refuses BCELoss"),
    ):
        step = TrainStep(model, criterion, optimizer)
        with (
            torch.autocast("cuda", dtype),
            pytest.raises(RuntimeError, match=f"^TrainStep: .*{message}"),
        ):
            step(x, y)
