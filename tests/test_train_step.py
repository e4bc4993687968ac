"""TrainStep: steps equal eager's, for every loss and optimizer, also with eager in between."""

import io
import pickle
import warnings
from copy import deepcopy

import pytest
import torch
from steps import LOSSES, LR, NETS, OPTIONS, Training, assert_steps_match_eager, make_net, training
from torch import Tensor, nn

import mlp_ext
from mlp_ext import _C, TrainStep
from mlp_ext.bench.training import Step, sgd_step
from mlp_ext.nn import LinearAct

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 50
SMALL = "3-17-5@100"
STATEFUL = ("dampening", "adam-amsgrad", "rmsprop-centered", "adagrad-decay")
DTYPES = (torch.float32, torch.float64)


# --- Fifty steps ---


# The two meet in no code: each loss with one optimizer, each optimizer with one loss.
LOSSES_AND_OPTIONS = [
    *((loss, "nesterov", reduction) for loss in LOSSES for reduction in ("mean", "sum")),
    *(("classes", options, "mean") for options in OPTIONS),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("loss", "options", "reduction"), LOSSES_AND_OPTIONS)
def test_fifty_steps_match_eager(
    loss: str, options: str, reduction: str, dtype: torch.dtype
) -> None:
    part = training(SMALL, loss, options, dtype, reduction)
    found = assert_steps_match_eager(part, STEPS)
    first, last = found["losses"][0], found["losses"][-1]
    assert last > first if part.optimizer.param_groups[0]["maximize"] else last < first


def test_centered_rmsprop_of_float16_gradients_whose_squares_underflow() -> None:
    """square_avg stays 0, grad_avg does not: their difference is negative, in torch -0."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float16)
    nn.init.zeros_(model.weight)
    native = deepcopy(model)
    x, y = torch.full((1, 1), 1e-4, dtype=torch.float16), torch.ones(1, 1, dtype=torch.float16)
    weights = []
    for net, make in ((model, TrainStep), (native, sgd_step)):
        optimizer = torch.optim.RMSprop(net.parameters(), lr=1, eps=1, centered=True)
        step = make(net, nn.L1Loss(), optimizer)
        for _ in range(30):
            step(x, y)
        assert optimizer.state[net.weight]["grad_avg"] < 0
        assert optimizer.state[net.weight]["square_avg"] == 0
        weights.append(net.weight.detach())
    torch.testing.assert_close(*weights, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_sgd_changes_all_elements_of_16_bit_parameters(dtype: torch.dtype) -> None:
    """torch's own changes few on the CPU."""
    kept = []
    for fused in (False, True):
        model = nn.Linear(16, 16, dtype=dtype)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=fused)
        step = TrainStep(model, nn.MSELoss(reduction="sum"), optimizer)
        for _ in range(2):
            step(torch.ones(4, 16, dtype=dtype), torch.zeros(4, 16, dtype=dtype))
        kept.append(model.weight.detach())
    assert kept[0].ne(1).all()
    assert torch.equal(*kept)


# Each net with each loss, and both of them with each dtype.
NETS_AND_LOSSES = [
    (net, loss, DTYPES[(i + j) % 2])
    for i, net in enumerate(NETS)
    for j, loss in enumerate(["mse", "bce", "bce-logits", "classes-weight-smoothing"])
]


@pytest.mark.slow
@pytest.mark.isa
@pytest.mark.parametrize(("net", "loss", "dtype"), NETS_AND_LOSSES, ids=str)
def test_every_net_matches_eager(net: str, loss: str, dtype: torch.dtype) -> None:
    part = training(net, loss, "nesterov", dtype)
    widths, rows = NETS[net]
    large = (
        rows * sum(widths) > 20_000
    )  # of so many ReLUs some pass 0 in fifty steps, and rounding decides when
    torch.set_num_threads(2 if large else 1)
    assert_steps_match_eager(part, 5 if large else 50)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "frozen", [(), ("0.weight",), ("2.weight",), ("0.weight", "0.bias"), ("2.bias",)]
)
@pytest.mark.parametrize("last", [nn.Identity, nn.Tanh])
@pytest.mark.usefixtures("zen4")
def test_wide_nets_with_frozen_parts_match_eager(
    last: type[nn.Module], frozen: tuple[str, ...], dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    widths, rows = [96, 560, 200, 4], 48
    assert _C.step_plan(widths, rows, dtype.itemsize, threads)["path"] == "panels"
    model = make_net(widths, last).to(dtype)
    model[4] = nn.Linear(200, 4, bias=False, dtype=dtype)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.01, momentum=0.9, weight_decay=0.1)
    x = torch.randn(2 * rows, 96, dtype=dtype)[::2]
    target = torch.randint(4, (rows,))
    assert_steps_match_eager(Training(model, nn.CrossEntropyLoss(), optimizer, x, target), 3)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ("momentum", torch.bfloat16),
        ("momentum", torch.float16),
        ("adamw", torch.bfloat16),  # in float16 eager divides by an eps that is 0 there
    ],
    ids=str,
)
@pytest.mark.parametrize("loss", ["mse", "bce-logits", "classes"])
@pytest.mark.parametrize("net", ["10-5-1@10", "33-64-20-7@1000"])
def test_16_bit_matches_eager(net: str, loss: str, options: str, dtype: torch.dtype) -> None:
    assert_steps_match_eager(training(net, loss, options, dtype), 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_bce_has_torchs_clamping(dtype: torch.dtype) -> None:
    def saturated() -> Training:
        part = training("10-5-1@10", "bce", "plain", dtype)
        with torch.no_grad():
            part.model[2].weight.mul_(1e4)
        part.target.copy_((torch.arange(10) % 2 == 0).unsqueeze(1))
        return part

    found = assert_steps_match_eager(saturated(), 3)
    assert 10 < found["losses"][0] <= 100


@pytest.mark.parametrize("activation", LinearAct.by_module)
def test_every_activation_is_taken(activation: type[nn.Module]) -> None:
    layers = [nn.Linear(3, 6), activation(), LinearAct.by_module[activation](6, 5)]
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = torch.randn(9, 3).double(), torch.rand(9, 5).double()
    assert_steps_match_eager(Training(model, nn.MSELoss(), optimizer, x, y), 5)


@pytest.mark.filterwarnings("ignore:fuse changed nothing")
@pytest.mark.parametrize("level", ["none", "layers", "stack"])
@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 5)), nn.Tanh()),
        nn.Sequential(nn.Identity(), nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Identity()),
        nn.Sequential(mlp_ext.LinearReLU(3, 4), nn.Identity(), mlp_ext.LinearTanh(4, 5)),
        nn.Linear(3, 5),
        mlp_ext.LinearSigmoid(3, 5, bias=False),
    ],
    ids=["nested", "identities", "layers", "linear", "layer"],
)
def test_every_form_of_model_is_taken(model: nn.Module, level: str) -> None:
    model = deepcopy(model).double()
    if level != "none":
        model = mlp_ext.fuse(model, level=level)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(9, 3).double(), torch.rand(9, 5).double()
    assert_steps_match_eager(Training(model, nn.MSELoss(), optimizer, x, y), 5)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.repeat_interleave(2, 0)[::2],
        lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
        lambda t: t[:1].expand(t.shape),
    ],
    ids=["sliced", "transposed", "expanded"],
)
@pytest.mark.parametrize("loss", ["mse", "classes", "probabilities"])
def test_strided_data_match_eager(loss: str, change) -> None:
    part = training(SMALL, loss, "plain", torch.float64)
    part = part._replace(input=change(part.input), target=change(part.target))
    assert_steps_match_eager(part, 3)


# --- What learns ---


def test_frozen_parameters_stay_and_may_thaw() -> None:
    def freezing(model: nn.Sequential, *rest) -> Step:
        step, count = Making.make(model, *rest), 0

        def counted(input: Tensor, target: Tensor) -> Tensor:
            nonlocal count
            for i, p in enumerate(model.parameters()):
                p.requires_grad_(i in ((0, 3, 4), (1, 2), (5,), (0, 1, 2, 3, 4, 5))[count // 3])
            count += 1
            return step(input, target)

        return counted

    class Making:
        make = sgd_step

    part = training("33-64-20-7@1000", "classes", "nesterov", torch.float64)
    native = part.to(torch.float64).run(freezing, 12)
    Making.make = TrainStep
    found = part.run(freezing, 12)
    torch.testing.assert_close(found, native)


def test_what_does_not_learn_keeps_its_version() -> None:
    part = training(SMALL, "mse", "momentum", torch.float32)
    weight, bias = part.model[0].parameters()
    bias.requires_grad_(False)
    before, versions = bias.clone(), (weight._version, bias._version)
    part.run(TrainStep, 1)
    assert torch.equal(bias, before)
    assert weight._version > versions[0]
    assert bias._version == versions[1]
    assert bias not in part.optimizer.state


def test_versions_of_momentum_change() -> None:
    part = training(SMALL, "mse", "momentum", torch.float32)
    step = TrainStep(*part[:3])
    step(*part[3:])
    buffer = part.optimizer.state[part.model[0].weight]["momentum_buffer"]
    version = buffer._version
    step(*part[3:])
    assert buffer is part.optimizer.state[part.model[0].weight]["momentum_buffer"]
    assert buffer._version > version
    assert not buffer.requires_grad


def test_graph_over_changed_parameters_is_an_error() -> None:
    part = training(SMALL, "mse", "plain", torch.float32)
    loss = part.criterion(part.model(part.input), part.target)
    part.run(TrainStep, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_stay_as_they_are() -> None:
    part = training(SMALL, "mse", "plain", torch.float32)
    weight, bias = part.model[0].parameters()
    weight.grad = kept = torch.full_like(weight, 7.0)
    part.run(TrainStep, 2)
    assert weight.grad is kept
    assert torch.equal(kept, torch.full_like(weight, 7.0))
    assert bias.grad is None


def several_groups(model: nn.Sequential) -> torch.optim.SGD:
    """With unlike options, in another order; without the bias of the first layer."""
    groups = [
        {"params": [model[4].bias, model[2].weight], "momentum": 0.9, "nesterov": True},
        {"params": [model[0].weight], "lr": torch.tensor(0.25), "maximize": True},
        {"params": [model[2].bias, nn.Parameter(torch.ones(3))], "weight_decay": 0.1},
        {"params": [model[4].weight], "lr": 0.03, "momentum": 0.5, "dampening": 0.5},
    ]
    return torch.optim.SGD(groups, lr=0.1)


def test_groups_have_their_own_options() -> None:
    part = training("33-64-20-7@1000", "classes", "plain", torch.float64)
    part = part._replace(optimizer=several_groups(part.model))
    before = part.model[0].bias.clone()
    found = assert_steps_match_eager(part, 10)
    assert torch.equal(found["0.bias"], before)
    assert {*(f"momentum_buffer of {name}" for name in ("2.weight", "4.bias", "4.weight"))} < {
        *found
    }


def test_groups_of_adam_have_their_own_options() -> None:
    part = training("33-64-20-7@1000", "classes", "plain", torch.float64)
    model = part.model
    groups = [
        {"params": [model[4].bias, model[2].weight], "amsgrad": True, "maximize": True},
        {"params": [model[0].weight], "lr": 2 * LR, "betas": (0.5, 0.7)},
        {"params": [model[2].bias, nn.Parameter(torch.ones(3))], "weight_decay": 0.1},
        {"params": [model[4].weight], "eps": 0.1, "decoupled_weight_decay": True},
    ]
    found = assert_steps_match_eager(part._replace(optimizer=torch.optim.Adam(groups, lr=0.01)), 10)
    assert {name for name in found if "max_exp" in name} == {
        "max_exp_avg_sq of 4.bias",
        "max_exp_avg_sq of 2.weight",
    }


# --- With the rest of torch ---


def alternating(period: int, first: bool) -> object:
    def make(*parts) -> Step:
        steps, count = (TrainStep(*parts), sgd_step(*parts)), -1

        def step(input: Tensor, target: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return steps[(count // period + first) % 2](input, target)

        return step

    return make


@pytest.mark.parametrize("first", [False, True], ids=["ours-first", "eager-first"])
@pytest.mark.parametrize("options", [*STATEFUL, "plain", "nesterov"])
def test_eager_steps_may_come_in_between(options: str, first: bool) -> None:
    part = training(SMALL, "classes", options, torch.float64)
    assert_steps_match_eager(part, 20, alternating(3, first))


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=30),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=2),
}


@pytest.mark.parametrize("options", ["momentum", "tensor-lr", "adamw"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_work(kind: str, options: str) -> None:
    def scheduled(make):
        def made(model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
            step = make(model, criterion, optimizer)
            scheduler = SCHEDULERS[kind](optimizer)

            def stepping(input: Tensor, target: Tensor) -> Tensor:
                loss = step(input, target)
                scheduler.step(*[loss] * (kind == "plateau"))
                return loss

            return stepping

        return made

    part = training(SMALL, "mse", options, torch.float64)
    native = part.to(torch.float64).run(scheduled(sgd_step), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = part.run(scheduled(TrainStep), 20)
    torch.testing.assert_close(found, native)


def test_schedulers_own_warning_is_not_hidden() -> None:
    part = training(SMALL, "mse", "plain", torch.float32)
    part.run(TrainStep, 1)  # before the scheduler: it does not count with torch either
    scheduler = torch.optim.lr_scheduler.StepLR(part.optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize("resumed", [TrainStep, sgd_step], ids=["ours", "eager"])
@pytest.mark.parametrize("options", ["plain", *STATEFUL])
def test_checkpoint_and_resume(options: str, resumed) -> None:
    part = training(SMALL, "bce-logits", options, torch.float64)
    expected = part.to(torch.float64).run(sgd_step, 20)

    model, criterion, optimizer, x, y = part.to(torch.float64)
    TrainStep(model, criterion, optimizer).fit(x, y, epochs=8)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)

    after = part.to(torch.float64)
    step = resumed(after.model, criterion, after.optimizer)
    step(x, y)  # made, and used, before the checkpoint is loaded
    for one, state in zip((after.model, after.optimizer), torch.load(file), strict=True):
        one.load_state_dict(state)
    losses = [step(x, y) for _ in range(12)]
    torch.testing.assert_close(torch.stack(losses), expected["losses"][8:])
    torch.testing.assert_close(after.state(), {k: v for k, v in expected.items() if k != "losses"})


def exact_keys(state: dict) -> list:
    """Keys in their order, with the dtype and device of tensors."""
    return [
        (
            key,
            exact_keys(v)
            if isinstance(v, dict)
            else (v.dtype, v.device)
            if key != "params" and isinstance(v, Tensor)
            else None,
        )
        for key, v in state.items()
    ]


@pytest.mark.parametrize("wide", [False, True], ids=["default-float32", "default-float64"])
@pytest.mark.parametrize("options", OPTIONS)
def test_state_dict_of_the_optimizer_is_eagers(options: str, wide: bool) -> None:
    part = training(SMALL, "mse", options, torch.float32)
    last_first = [*part.model.parameters()][::-1]  # the order of optimizer.state
    part.optimizer.param_groups[0]["params"][:] = last_first
    ours, eager = deepcopy(part), deepcopy(part)
    torch.set_default_dtype(torch.float64 if wide else torch.float32)
    try:
        ours.run(TrainStep, 2)
        eager.run(sgd_step, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    found, expected = ours.optimizer.state_dict(), eager.optimizer.state_dict()
    torch.testing.assert_close(found, expected)
    assert exact_keys(found["state"]) == exact_keys(expected["state"])


def test_cleared_state_begins_anew() -> None:
    for options in STATEFUL:
        part = training(SMALL, "mse", options, torch.float64)
        results = []
        for make in (sgd_step, TrainStep):
            copy = part.to(torch.float64)
            copy.run(make, 2)
            copy.optimizer.state.clear()
            results.append(copy.run(make, 3))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "copied", [deepcopy, lambda step: pickle.loads(pickle.dumps(step))], ids=["deepcopy", "pickle"]
)
def test_copy_trains_copies(copied) -> None:
    model, criterion, optimizer, x, y = training(SMALL, "mse", "momentum", torch.float32)
    step = TrainStep(model, criterion, optimizer)
    step(x, y)
    copy = copied(step)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    loss = copy(x, y)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(step(x, y), loss)
    assert torch.equal(step(x, y), copy(x, y))


# --- What changes between steps ---


def replace_layer(part: Training) -> None:
    torch.manual_seed(1)
    part.model[0] = nn.Linear(3, 17).double()
    part.optimizer.add_param_group({"params": part.model[0].parameters()})


def load_by_assignment(part: Training) -> None:
    torch.manual_seed(1)
    state = make_net([3, 17, 5]).double().state_dict()
    part.model.load_state_dict(state, assign=True)
    part.optimizer.param_groups[0]["params"][:] = part.model.parameters()


def set_momentum(part: Training) -> None:
    part.optimizer.param_groups[0].update(momentum=0.9, weight_decay=0.1)


CHANGES = {
    "layer": replace_layer,
    "assigned": load_by_assignment,
    "fused": lambda part: mlp_ext.fuse(part.model),
    "options": set_momentum,
    "group dropped": lambda part: part.optimizer.param_groups[0]["params"].pop(),
    "appended": lambda part: part.model.append(nn.Tanh()),
    "smoothing": lambda part: setattr(part.criterion, "label_smoothing", 0.2),
    "weight": lambda part: setattr(part.criterion, "weight", torch.linspace(0, 1, 5).double()),
    "reduction": lambda part: setattr(part.criterion, "reduction", "sum"),
}


def follows(part: Training, change) -> None:
    """A step before, and three after the change, are eager's."""
    found = []
    for make in (sgd_step, TrainStep):
        copy = part.to(torch.float64)
        step = make(*copy[:3])
        losses = [step(*copy[3:])]
        change(copy)
        losses += [step(*copy[3:]) for _ in range(3)]
        found.append({"losses": torch.stack(losses), **copy.state()})
    torch.testing.assert_close(*found)
    assert found[0]["losses"][1] != found[0]["losses"][0]


NUMBERS = {
    "smooth-l1": lambda part: setattr(part.criterion, "beta", 0.0),
    "huber": lambda part: setattr(part.criterion, "delta", 0.05),
    "nll-weight": lambda part: setattr(part.criterion, "ignore_index", 1),
    "bce-logits-weight": lambda part: setattr(
        part.criterion, "pos_weight", torch.tensor([3.0]).double()
    ),
}


@pytest.mark.parametrize("loss", NUMBERS)
def test_numbers_of_the_loss_are_followed(loss: str) -> None:
    follows(training(SMALL, loss, "adam", torch.float64), NUMBERS[loss])


def test_options_of_an_activation_are_followed() -> None:
    part = training(SMALL, "mse", "adam", torch.float64)
    part.model[1] = nn.LeakyReLU(0.3)
    follows(part, lambda part: setattr(part.model[1], "negative_slope", -0.5))


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_followed(change: str) -> None:
    follows(training(SMALL, "classes", "plain", torch.float64), CHANGES[change])


# --- Values ---


def test_loss_is_detached_and_of_no_dimension() -> None:
    part = training(SMALL, "mse", "plain", torch.float32)
    expected = part.criterion(part.model(part.input), part.target)
    loss = TrainStep(*part[:3])(*part[3:])
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("loss", ["mse-linear", "bce-logits", "classes"])
def test_loss_that_is_not_finite_is_returned(loss: str, value: float) -> None:
    part = training(SMALL, loss, "plain", torch.float32)
    part.input[3, 1] = value
    assert_steps_match_eager(part, 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_rows_match_eager(loss: str, reduction: str) -> None:
    part = training(SMALL, loss, "nesterov", torch.float64, reduction)
    part = part._replace(input=part.input[:0], target=part.target[:0])
    assert_steps_match_eager(part, 2)


def test_nothing_but_ignored_rows_matches_eager() -> None:
    part = training(SMALL, "classes-weight-smoothing", "plain", torch.float64)
    part.target.fill_(0)  # the class that is ignored
    assert_steps_match_eager(part, 2)
