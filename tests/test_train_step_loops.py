"""What training loops have: models, data and losses of other forms, dropout, clipping, groups."""

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlp_ext
from mlp_ext import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 20
TOLERANCES = {torch.bfloat16: {"rtol": 0.05, "atol": 1e-3}}


class Thin(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Only calls its child."""
        return self.body(x)


class Quickstart(nn.Module):
    """As in torch's own tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        x = self.flatten(x)
        logits = self.linear_relu_stack(x)
        return logits


class InTurn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)
        self.act, self.drop = nn.Tanh(), nn.Dropout(0.2)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


def net(*first: nn.Module, dropout: float = 0.0) -> nn.Sequential:
    between = [nn.Dropout(dropout)] if dropout else []
    layers = [nn.Linear(8, 16), nn.ReLU(), *between, nn.Linear(16, 12), nn.GELU(), *between]
    return nn.Sequential(*first, *layers, nn.Linear(12, 4))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, dampening=0.1)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


class Eager:
    """TrainStep as written in torch."""

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        accumulate: int = 1,
    ) -> None:
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.max_norm, self.accumulate, self.count = max_norm, accumulate, 0

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        if self.count == 0:
            self.optimizer.zero_grad()
        loss = self.criterion(self.model(input), target)
        (loss / self.accumulate).backward()
        self.count += 1
        if self.count == self.accumulate:
            self.update()
        return loss.detach()

    def update(self) -> None:
        self.count = 0
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()

    def fit(
        self, input: Tensor, target: Tensor, epochs: int, batch_size: int, shuffle: bool
    ) -> Any:
        losses = []
        for _ in range(epochs):
            order = torch.randperm(len(input)) if shuffle else torch.arange(len(input))
            sums = [self(input[rows], target[rows]) * len(rows) for rows in order.split(batch_size)]
            losses.append(torch.stack(sums).sum() / len(input))
        if self.count:
            self.update()
        return torch.stack(losses)


def results(
    make: Any,
    model: nn.Module,
    criterion: Any,
    optimizer: Callable[..., torch.optim.Optimizer],
    data: list[tuple[Tensor, Tensor]],
    **settings: Any,
) -> dict[str, Tensor]:
    model = deepcopy(model)
    chosen = optimizer(model.parameters())
    step = make(model, criterion, chosen, **settings)
    torch.manual_seed(1)
    found = {"losses": torch.stack([step(x, y) for x, y in data])}
    return found | state_of(model, chosen)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = dict(deepcopy(model).state_dict())
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{key} of {name}"] = value.clone()
    return found


def assert_equal(ours: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)


def assert_as_eager(
    model: nn.Module,
    criterion: Any = F.mse_loss,
    optimizer: Any = sgd,
    x: Callable[[], Tensor] = lambda: torch.randn(10, 8),
    y: Callable[[], Tensor] = lambda: torch.rand(10, 4),
    **settings: Any,
) -> None:
    data = [(x(), y()) for _ in range(STEPS)]
    found, expected = (
        results(make, model, criterion, optimizer, data, **settings) for make in (TrainStep, Eager)
    )
    assert_equal(found, expected)


# --- Models ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: Thin(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)),
        Quickstart,
        InTurn,
        lambda: nn.Sequential(nn.Identity(), Thin(nn.Linear(8, 4)), nn.ReLU()),
    ],
)
def test_modules_that_only_call_their_children(make: Callable[[], nn.Module]) -> None:
    assert_as_eager(make())


@pytest.mark.parametrize(
    "code",
    [
        "def forward(self, x): return self.body(x) + 1",
        "def forward(self, x): return self.body(x.abs())",
        "def forward(self, x): return self.body(x) if self.training else x",
        "def forward(self, x): return self.body[0](x)",
        "def forward(self, x): return F.relu(self.body(x))",
        "def forward(self, x, y=None): return self.body(x)",
        "def forward(self, x):\n  y = self.body(x)\n  return x",
        "def forward(self, x):\n  self.body = self.body\n  return self.body(x)",
        "def forward(self, x):\n  for _ in (1, 2): x = self.body(x)\n  return x",
        "forward = nn.Sequential.forward",
    ],
)
def test_modules_that_do_more_are_refused(code: str) -> None:
    namespace: dict[str, Any] = {}
    exec(code, {"F": F, "nn": nn}, namespace)
    module = type("Mine", (Thin,), namespace)(nn.Linear(8, 4))
    with pytest.raises(TypeError, match=r"model is a .*Mine, which a step does not support; use"):
        TrainStep(module, nn.MSELoss(), sgd(module.parameters()))


def test_a_child_that_is_replaced_is_seen() -> None:
    model = Quickstart()
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    x, y = torch.randn(10, 2, 4), torch.rand(10, 4)
    step(x, y)
    model.linear_relu_stack = nn.LayerNorm(8)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"model.linear_relu_stack is a .*LayerNorm, which a step"):
        step(x, y)


def test_a_forward_that_is_patched_is_seen() -> None:
    class Patched(Thin):
        def forward(self, x):
            return self.body(x)

    model = Patched(nn.Linear(8, 4))
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    step(torch.randn(10, 8), torch.rand(10, 4))
    Patched.forward = lambda self, x: self.body(x) + 1
    with pytest.raises(TypeError, match="which a step does not support"):
        step(torch.randn(10, 8), torch.rand(10, 4))


@pytest.mark.filterwarnings("ignore:fuse changed nothing")
@pytest.mark.parametrize("level", ["layers", "stack"])
def test_fused_wrappers(level: str) -> None:
    for make in (Quickstart, InTurn, lambda: Thin(nn.Flatten(), *net())):
        assert_as_eager(mlp_ext.fuse(make(), level=level))


@pytest.mark.parametrize("shape", [(10, 2, 4), (10, 8), (10, 2, 2, 2), (10, 8, 1)])
def test_flatten(shape: tuple[int, ...]) -> None:
    assert_as_eager(net(nn.Flatten()), x=lambda: torch.randn(shape))


def test_flatten_of_some_dimensions() -> None:
    assert_as_eager(
        net(nn.Flatten(2), nn.Flatten(1, 1)),
        x=lambda: torch.randn(10, 3, 2, 4),
        y=lambda: torch.rand(10, 3, 4),
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(8, 8), nn.Flatten()], r"model.1, a Flatten, comes after other layers; put it"),
        ([nn.Flatten(0), nn.Linear(8, 4)], r"model.0, Flatten\(.*\), flattens the batch; use the"),
        ([nn.Linear(8, 4), nn.Dropout(), nn.ReLU()], "model.2, a ReLU, follows a Dropout; put"),
        ([nn.Linear(8, 4), nn.Dropout(), nn.Dropout()], "model.2, a Dropout, follows another Drop"),
        ([nn.Dropout(inplace=True), nn.Linear(8, 4)], "model.0, a Dropout, changes the input in"),
    ],
)
def test_places_that_are_refused(layers: list[nn.Module], message: str) -> None:
    model = nn.Sequential(*layers)
    with pytest.raises(ValueError, match=f"^TrainStep: {message}"):
        TrainStep(model, nn.MSELoss(), sgd(model.parameters()))


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Dropout1d(), nn.GRU(8, 8)]
)
def test_what_stands_between_layers_is_named(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 8), module, nn.Linear(8, 4))
    name = type(module).__name__
    message = (
        rf"^TrainStep: model\.1 is a torch\.nn\.[a-z.]*{name}, which a step does not support; "
    )
    with pytest.raises(
        TypeError, match=message + r"use the eager loop, with mlp_ext.fuse\(model\)$"
    ):
        TrainStep(model, nn.MSELoss(), sgd(model.parameters()))


# --- Dropout ---


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_draws_eagers_masks(p: float, optimizer: Any) -> None:
    assert_as_eager(net(nn.Dropout(p / 2), dropout=p), optimizer=optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dropout_of_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(*net(dropout=0.3), nn.Dropout(0.2)).to(dtype)
    x, y = torch.randn(10, 8).to(dtype), torch.rand(10, 4).to(dtype)
    expected, found = (
        results(make, model, nn.L1Loss(), sgd, [(x, y)] * 5) for make in (Eager, TrainStep)
    )
    torch.testing.assert_close(found, expected, **TOLERANCES.get(dtype, {}))


def test_dropout_with_eval_and_train() -> None:
    model, x, y = net(dropout=0.5), torch.randn(10, 8), torch.rand(10, 4)
    pairs = []
    for make in (Eager, TrainStep):
        copy = deepcopy(model)
        step = make(copy, nn.MSELoss(), sgd(copy.parameters()))
        torch.manual_seed(2)
        losses = []
        for i in range(12):
            copy.train(i // 3 % 2 == 0)
            copy[2].p = 0.1 * (i % 5)
            losses.append(step(x, y))
        pairs.append({"losses": torch.stack(losses), **copy.state_dict()})
    assert_equal(*reversed(pairs))


# --- Data ---


def test_input_of_three_dimensions() -> None:
    shape = (4, 5)
    assert_as_eager(net(), x=lambda: torch.randn(*shape, 8), y=lambda: torch.rand(*shape, 4))


def test_input_of_one_dimension() -> None:
    assert_as_eager(net(), x=lambda: torch.randn(8), y=lambda: torch.rand(4))
    assert_as_eager(
        net(), nn.CrossEntropyLoss(), x=lambda: torch.randn(8), y=lambda: torch.tensor(2)
    )


def test_classes_of_three_dimensions_say_what_to_pass() -> None:
    model = net()
    step = TrainStep(model, nn.CrossEntropyLoss(), sgd(model.parameters()))
    with pytest.raises(
        ValueError, match=r"classes along dimension 1 .*; pass input.flatten\(0, -2"
    ):
        step(torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(ignore_index=1), nn.NLLLoss()])
def test_classes_of_uint8(criterion: nn.Module) -> None:
    assert_as_eager(net(), criterion, y=lambda: torch.randint(4, (10,), dtype=torch.uint8))


@pytest.mark.parametrize(
    "criterion",
    [
        nn.MSELoss(),
        nn.L1Loss(),
        nn.SmoothL1Loss(),
        nn.BCEWithLogitsLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ],
)
def test_targets_of_float64(criterion: nn.Module) -> None:
    def target() -> Tensor:
        return torch.rand(10, 4).double().softmax(1)

    assert_as_eager(net(), criterion, y=target)
    model = net()
    loss = TrainStep(model, criterion, sgd(model.parameters()))(torch.randn(10, 8), target())
    assert loss.dtype is torch.float64


@pytest.mark.parametrize("criterion", [nn.HuberLoss(), nn.BCELoss()])
def test_targets_of_float64_that_torch_refuses(criterion: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid())
    step = TrainStep(model, criterion, sgd(model.parameters()))
    with pytest.raises(TypeError, match=r"target is float64, the model float32; pass target.float"):
        step(torch.randn(10, 8), torch.rand(10, 4).double())


@pytest.mark.parametrize("call", ["step", "fit"])
def test_numpy_arrays_are_refused_in_one_line(call: str) -> None:
    model = net()
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()))
    x, y = np.ones((500, 8), np.float32), np.ones((500, 4), np.float32)
    call_it = step if call == "step" else step.fit
    for arguments, name in (
        ((x, torch.from_numpy(y)), "input"),
        ((torch.from_numpy(x), y), "target"),
    ):
        with pytest.raises(TypeError, match=rf"pass torch\.from_numpy\({name}\)$") as caught:
            call_it(*arguments)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 120


# --- Losses ---


CLASSES = F.cross_entropy, F.nll_loss
FUNCTIONS = [
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    *CLASSES,
    partial(F.mse_loss, reduction="sum"),
    partial(F.smooth_l1_loss, beta=0.3),
    partial(F.huber_loss, delta=0.2),
    partial(F.cross_entropy, label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 3.0, 4.0])),
    partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor([1.0, 2.0, 3.0, 4.0])),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_functions_as_criterion(function: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Sigmoid())
    of_classes = getattr(function, "func", function) in CLASSES
    y = (lambda: torch.randint(4, (10,))) if of_classes else (lambda: torch.rand(10, 4))
    assert_as_eager(model, function, partial(torch.optim.SGD, lr=0.01), y=y)


def test_keywords_of_a_partial_are_followed_or_refused() -> None:
    model, x, y = net(), torch.randn(10, 8), torch.rand(10, 4)
    criterion = partial(F.mse_loss, reduction="mean")
    step = TrainStep(model, criterion, sgd(model.parameters()))
    loss = criterion(model(x), y)
    torch.testing.assert_close(step(x, y), loss)
    criterion.keywords["reduction"] = "sum"
    loss = criterion(model(x), y)
    torch.testing.assert_close(step(x, y), loss)
    criterion.keywords["size_average"] = False
    with pytest.raises(ValueError, match="criterion has the keyword size_average, which is not"):
        step(x, y)


# --- Clipping and groups ---


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("max_norm", [None, 0.1, 1e6, 0])
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_clipped_and_accumulated(optimizer: Any, max_norm: float | None, accumulate: int) -> None:
    """Twenty steps leave two of an incomplete group, which are not applied."""
    assert_as_eager(net(), optimizer=optimizer, max_norm=max_norm, accumulate=accumulate)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_groups_of_other_dtypes(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    data = [(torch.randn(10, 8).to(dtype), torch.rand(10, 4).to(dtype)) for _ in range(8)]
    settings = {"max_norm": 0.2, "accumulate": 2}
    expected, found = (
        results(make, model, nn.MSELoss(), sgd, data, **settings) for make in (Eager, TrainStep)
    )
    torch.testing.assert_close(found, expected, **TOLERANCES.get(dtype, {}))


def test_large_layers_in_groups() -> None:
    layers = [nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 4)]
    model = nn.Sequential(*layers)
    model[2].weight.requires_grad_(False)
    assert_as_eager(model, optimizer=adam, max_norm=0.5, accumulate=2)


def test_everything_at_once() -> None:
    model = Thin(nn.Flatten(), *net(dropout=0.2))
    assert_as_eager(
        model,
        partial(F.cross_entropy, label_smoothing=0.1),
        adam,
        x=lambda: torch.randn(10, 2, 4),
        y=lambda: torch.randint(4, (10,), dtype=torch.uint8),
        max_norm=0.5,
        accumulate=4,
    )


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("rows", [1, 5], ids=["[n, K]", "[n, T, K]"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_norm": 0.1}, {"accumulate": 4}, {"accumulate": 3, "max_norm": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fit(settings: dict[str, Any], rows: int, shuffle: bool, dropout: float) -> None:
    """The last, incomplete group is applied at the end, not at the end of an epoch."""
    shape = (23,) if rows == 1 else (23, rows)
    x, y, model = torch.randn(*shape, 8), torch.rand(*shape, 4), net(dropout=dropout)
    found = []
    for make in (TrainStep, Eager):
        copy = deepcopy(model)
        optimizer = adam(copy.parameters())
        step = make(copy, nn.MSELoss(), optimizer, **settings)
        torch.manual_seed(3)
        losses = step.fit(x, y, epochs=5, batch_size=5, shuffle=shuffle)
        found.append({"losses": losses, **state_of(copy, optimizer)})
    assert_equal(*found)


def test_fit_on_full_batches_in_groups() -> None:
    x, y, model = torch.randn(23, 8), torch.rand(23, 4), net()
    found = []
    for make in (TrainStep, Eager):
        copy = deepcopy(model)
        step = make(copy, nn.MSELoss(), sgd(copy.parameters()), accumulate=3)
        found.append({"losses": step.fit(x, y, 7, 23, False), **copy.state_dict()})
    assert_equal(*found)


def test_a_group_survives_a_change_of_the_model() -> None:
    x, y, model = torch.randn(10, 8), torch.rand(10, 4), net()
    found = []
    for make in (TrainStep, Eager):
        copy = deepcopy(model)
        step = make(copy, nn.MSELoss(), sgd(copy.parameters()), accumulate=3)
        step(x, y)
        copy.append(nn.Identity())
        step(x, y)
        step(x, y)
        found.append(copy.state_dict())
    assert_equal(*found)


def test_what_learns_may_not_change_within_a_group() -> None:
    x, y, model = torch.randn(10, 8), torch.rand(10, 4), net()
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()), accumulate=2)
    step(x, y)
    model[0].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="TrainStep: other parameters learn than in the step"):
        step(x, y)
    model[0].weight.requires_grad_(True)
    step(x, y)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    step(x, y)
    step(x, y)
    assert torch.equal(model[0].weight, before)


def test_no_state_before_the_first_update() -> None:
    model = net()
    optimizer = adam(model.parameters())
    step = TrainStep(model, nn.MSELoss(), optimizer, accumulate=2)
    before = deepcopy(model.state_dict())
    step(torch.randn(10, 8), torch.rand(10, 4))
    assert not optimizer.state
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    step(torch.randn(10, 8), torch.rand(10, 4))
    assert len(optimizer.state) == 6


def test_a_step_that_fails_leaves_its_group_as_it_was() -> None:
    x, y, model = torch.randn(10, 8), torch.randint(4, (10,)), net()
    copy = deepcopy(model)
    step = TrainStep(model, nn.CrossEntropyLoss(), sgd(model.parameters()), accumulate=2)
    step(x, y)
    with pytest.raises(IndexError, match="target must be classes from 0 to 3"):
        step(x, y + 1)
    step(x, y)
    eager = Eager(copy, nn.CrossEntropyLoss(), sgd(copy.parameters()), accumulate=2)
    eager(x, y)
    eager(x, y)
    assert_equal(model.state_dict(), copy.state_dict())


def test_a_copy_has_the_same_settings() -> None:
    model = net()
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()), max_norm=0.1, accumulate=2)
    copy = deepcopy(step)
    data = [(torch.randn(10, 8), torch.rand(10, 4)) for _ in range(4)]
    for one in (step, copy):
        for x, y in data:
            one(x, y)
    torch.testing.assert_close(copy._parts[0].state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_norm": -1}, ValueError, "max_norm must be from 0 on, got -1"),
        ({"max_norm": float("nan")}, ValueError, "max_norm must be from 0 on, got nan"),
        ({"max_norm": "1"}, TypeError, "max_norm must be a number or None, got '1'"),
        ({"accumulate": 0}, ValueError, "accumulate must be from 1 to"),
        ({"accumulate": 1.5}, TypeError, "accumulate must be an int, got 1.5"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: Any, message: str) -> None:
    model = net()
    with pytest.raises(error, match=f"^TrainStep: {message}"):
        TrainStep(model, nn.MSELoss(), sgd(model.parameters()), **settings)


def test_a_scheduler_that_steps_with_each_group_does_not_warn() -> None:
    model = net()
    optimizer = sgd(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step = TrainStep(model, nn.MSELoss(), optimizer, accumulate=2)
    for _ in range(2):
        step(torch.randn(10, 8), torch.rand(10, 4))
    scheduler.step()


# --- What a step holds ---


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}], ids=str)
def test_parameters_can_be_swapped_after_a_step(settings: dict[str, int]) -> None:
    model, x, y = net(), torch.randn(10, 8), torch.rand(10, 4)
    step = TrainStep(model, nn.MSELoss(), sgd(model.parameters()), **settings)
    for _ in range(2):
        step(x, y)
    other = nn.Parameter(torch.randn(16, 8))
    values = other.detach().clone()
    torch.utils.swap_tensors(model[0].weight, other)
    assert torch.equal(model[0].weight, values)
    for _ in range(2):
        step(x, y)
    assert not torch.equal(model[0].weight, values)


@pytest.mark.parametrize("holder", ["model", "optimizer"])
def test_what_holds_its_step_is_freed(holder: str) -> None:
    model = net()
    optimizer = sgd(model.parameters())
    step = TrainStep(model, nn.MSELoss(), optimizer)
    step(torch.randn(10, 8), torch.rand(10, 4))
    held = model if holder == "model" else optimizer
    held.step_of_mine = step  # type: ignore[union-attr]
    seen = [weakref.ref(thing) for thing in (model, model[0].weight, optimizer)]
    del model, optimizer, step, held
    gc.collect()
    assert [reference() for reference in seen] == [None] * 3
