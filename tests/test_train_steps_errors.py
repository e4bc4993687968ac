"""What TrainSteps does not take, one clear line each; what changes between calls is noticed."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from many import Many, many
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import mlp_ext
from mlp_ext import TrainStep, TrainSteps

pytestmark = pytest.mark.usefixtures("one_thread", "small_heap")

close = torch.testing.assert_close


def net(*widths: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for K, N in pairwise(widths):
        modules += [nn.Linear(K, N), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def sgd(models: list[Any]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]


def nets(last: nn.Module) -> tuple[Any, ...]:
    models: list[nn.Module] = [net(4, 3, 2), net(4, 3, 2), last]
    return models, nn.MSELoss(), sgd(models)


def frozen() -> nn.Module:
    model = net(4, 3, 2)
    model[0].bias.requires_grad_(False)
    return model


def shared() -> tuple[Any, ...]:
    models, criterion, _ = nets(net(4, 3, 2))
    models[2][2].bias = models[1][2].bias
    return models, criterion, sgd(models)


def kinds() -> tuple[Any, ...]:
    models, criterion, optimizers = nets(net(4, 3, 2))
    return models, criterion, [*optimizers[:2], torch.optim.Adam(models[2].parameters())]


def twice(index: int) -> tuple[Any, ...]:
    parts = nets(net(4, 3, 2))
    parts[index][2] = parts[index][0]
    return parts


def other_optimizer() -> tuple[Any, ...]:
    models, criterion, optimizers = nets(net(4, 3, 2))
    return models, criterion, [*optimizers[:2], *sgd([net(4, 3, 2)])]


ALIKE = "ValueError: TrainSteps: models must be alike, and "
KIND = "; make one call for each kind"
NOT_TAKEN: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "no models": (
        lambda: ([], nn.MSELoss(), []),
        "ValueError: TrainSteps: models must be at least one, got an empty list",
    ),
    "one model": (
        lambda: (net(4, 2), nn.MSELoss(), sgd([net(4, 2)])),
        "TypeError: TrainSteps: models must be a list, got torch.nn.modules.container.Sequential",
    ),
    "one optimizer": (
        lambda: ([net(4, 2)], nn.MSELoss(), sgd([net(4, 2)])[0]),
        "TypeError: TrainSteps: optimizers must be a list, got torch.optim.sgd.SGD",
    ),
    "numbers": (
        lambda: ([net(4, 2)] * 3, nn.MSELoss(), sgd([net(4, 2)] * 2)),
        "ValueError: TrainSteps: got 3 models and 2 optimizers; pass one optimizer for each model",
    ),
    "model twice": (
        lambda: twice(0),
        "ValueError: TrainSteps: models[2] is models[0]; make one for each network",
    ),
    "optimizer twice": (
        lambda: twice(2),
        "ValueError: TrainSteps: optimizers[2] is optimizers[0]; make one for each network",
    ),
    "shared": (
        shared,
        "ValueError: TrainSteps: models[2] shares its 2.bias with models[1]; give it its own, "
        "as by copy.deepcopy",
    ),
    "kinds": (
        kinds,
        "TypeError: TrainSteps: optimizers[2] is a torch.optim.adam.Adam, optimizers[0] a "
        f"torch.optim.sgd.SGD{KIND}",
    ),
    "widths": (
        lambda: nets(net(4, 5, 2)),
        f"{ALIKE}widths: 4-5-2 in models[2], 4-3-2 in models[0]{KIND}",
    ),
    "layers": (
        lambda: nets(net(4, 3, 3, 2)),
        f"{ALIKE}widths: 4-3-3-2 in models[2], 4-3-2 in models[0]{KIND}",
    ),
    "activations": (
        lambda: nets(nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.2), nn.Linear(3, 2))),
        f"{ALIKE}activations: leaky_relu(0.2,) identity in models[2], relu identity in models[0]"
        f"{KIND}",
    ),
    "biases": (
        lambda: nets(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))),
        f"{ALIKE}layers with a bias: [0] in models[2], [0, 1] in models[0]{KIND}",
    ),
    "dtype": (
        lambda: nets(net(4, 3, 2).double()),
        f"{ALIKE}dtype: torch.float64 in models[2], torch.float32 in models[0]{KIND}",
    ),
    "device": (
        lambda: nets(net(4, 3, 2).to("meta")),
        f"{ALIKE}device: meta in models[2], cpu in models[0]{KIND}",
    ),
    "learning": (
        lambda: nets(frozen()),
        f"{ALIKE}parameters that learn: [0, 2, 3] in models[2], [0, 1, 2, 3] in models[0]{KIND}",
    ),
    "dropout": (
        lambda: nets(nn.Sequential(nn.Dropout(0.1), *net(4, 3, 2))),
        f"{ALIKE}dropout before layers: {{0: 0.1}} in models[2], {{}} in models[0]{KIND}",
    ),
    "module": (
        lambda: nets(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))),
        "TypeError: TrainSteps: models[2].1 is a torch.nn.modules.batchnorm.BatchNorm1d, which a "
        "step does not support; use the eager loop, with mlp_ext.fuse(model)",
    ),
    "criterion": (
        lambda: (nets(net(4, 2))[0], nn.CTCLoss(), nets(net(4, 2))[2]),
        "TypeError: TrainSteps: criterion is a torch.nn.modules.loss.CTCLoss, not exactly one of ",
    ),
    "optimizer of others": (
        other_optimizer,
        "ValueError: TrainSteps: optimizers[2] has none of the model's parameters; make it with "
        "model.parameters()",
    ),
}


def raised(call: Callable[[], object]) -> str:
    with pytest.raises((TypeError, ValueError, IndexError, RuntimeError)) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("case", NOT_TAKEN)
def test_parts_that_are_not_taken(case: str) -> None:
    make, message = NOT_TAKEN[case]
    assert raised(lambda: TrainSteps(*make())).startswith(message)


def test_data_parallel_is_refused() -> None:
    model = net(4, 2)
    model.__class__ = type("Fake", (nn.Sequential,), {})
    parallel = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    text = raised(lambda: TrainSteps([parallel], nn.MSELoss(), sgd([net(4, 2)])))
    assert "models[0] is a DistributedDataParallel" in text
    assert "use TrainStep, or pass its .module" in text


def data() -> dict[str, Any]:
    return {"input": torch.randn(6, 4), "target": torch.rand(6, 2)}


INPUT = "input must be [M, K=4] for all networks or [E=3, M, K=4] for each its own, got "
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "array": (
        {"input": np.zeros((6, 4))},
        "TypeError: TrainSteps: input must be a tensor, got numpy.ndarray; pass "
        "torch.from_numpy(input)",
    ),
    "width": ({"input": torch.zeros(6, 5)}, f"RuntimeError: TrainSteps: {INPUT}[6, 5]"),
    "vector": ({"input": torch.zeros(4)}, f"RuntimeError: TrainSteps: {INPUT}[4]"),
    "networks": ({"input": torch.zeros(2, 6, 4)}, f"RuntimeError: TrainSteps: {INPUT}[2, 6, 4]"),
    "dtype": (
        {"input": torch.zeros(6, 4).double()},
        "RuntimeError: TrainSteps: input is float64, the model float32; pass input.float()",
    ),
    "target": (
        {"target": torch.zeros(6, 3)},
        "RuntimeError: TrainSteps: target must be [M=6, N=2] as the output, got [6, 3], or "
        "[E=3, ...] for each its own",
    ),
    "target networks": (
        {"target": torch.zeros(2, 6, 2)},
        "RuntimeError: TrainSteps: target must be [M=6, N=2] as the output, got [2, 6, 2], or ",
    ),
    "target rows": (
        {"target": torch.zeros(3, 5, 2)},
        "RuntimeError: TrainSteps: target must be [M=6, N=2] as the output, got [5, 2], or ",
    ),
    "gradient": (
        {"input": torch.zeros(6, 4, requires_grad=True)},
        "ValueError: TrainSteps: input requires a gradient, which a step does not compute; ",
    ),
}
OF_FIT: dict[str, tuple[dict[str, Any], str]] = {
    "epochs": ({"epochs": 0}, "ValueError: TrainSteps.fit: epochs must be at least 1, "),
    "batch_size": ({"batch_size": "8"}, "TypeError: TrainSteps.fit: batch_size must be an int, "),
    "shuffle": ({"shuffle": 1}, "TypeError: TrainSteps.fit: shuffle must be True or False, got 1"),
    "generator": (
        {"generators": torch.Generator()},
        "TypeError: TrainSteps.fit: generators must be a list, one for each network, or None, got ",
    ),
    "generators": (
        {"generators": [torch.Generator()]},
        "ValueError: TrainSteps.fit: generators must be 3, one for each, got 1",
    ),
    "seeds": (
        {"generators": [1, 2, 3]},
        "TypeError: TrainSteps.fit: generators[0] must be a torch.Generator, got 1",
    ),
    "one generator": (
        {"generators": [torch.default_generator] * 3},
        "ValueError: TrainSteps.fit: generators[1] is generators[0]; make one for each network",
    ),
    "rows": (
        {"rows": [torch.arange(2)] * 2},
        "ValueError: TrainSteps.fit: rows must be 3, one for each, got 2",
    ),
    "list": (
        {"rows": [["a"]] * 3},
        "TypeError: TrainSteps.fit: rows[0] must be a tensor, array or list of integers, got list",
    ),
    "mask": (
        {"rows": [torch.ones(6, dtype=torch.bool)] * 3},
        "TypeError: TrainSteps.fit: rows[0] must be integers, got torch.bool; pass "
        "torch.as_tensor(rows[0]).nonzero().squeeze(1)",
    ),
    "table": (
        {"rows": [torch.zeros(2, 2, dtype=torch.int64)] * 3},
        "ValueError: TrainSteps.fit: rows[0] must be [n] with at least one row, got [2, 2]",
    ),
    "range": (
        {"rows": [torch.arange(2), torch.arange(7), torch.arange(2)]},
        "IndexError: TrainSteps.fit: rows[1] must be from 0 to 5, got 0 to 6",
    ),
    "negative": (
        {"rows": [torch.arange(2), torch.arange(2), torch.tensor([-1])]},
        "IndexError: TrainSteps.fit: rows[2] must be from 0 to 5, got -1 to -1",
    ),
}


UNSUPPORTED = {
    "validation": (
        {"validation": (torch.ones(6, 4), torch.ones(6, 2)), "patience": 3},
        "TrainSteps.fit: validation is not supported; use TrainStep for each network",
    ),
    "scheduler": (
        {"scheduler": None},
        "TrainSteps.fit: scheduler is not supported; use TrainStep for each network",
    ),
    "generator": (
        {"generator": torch.default_generator},
        "TrainSteps.fit: pass generators, one for each network, not generator",
    ),
    "typo": ({"epoch": 3}, "TrainSteps.fit() got an unexpected keyword argument 'epoch'"),
    "loader": (
        {"input": DataLoader([*zip(*data().values(), strict=True)]), "target": None},
        "TrainSteps.fit: pass tensors of all rows, input and target, not a loader, got ",
    ),
    "batches": (
        {"input": [(data()["input"], data()["target"])], "target": None},
        "TrainSteps.fit: pass tensors of all rows, input and target, not a loader, got list",
    ),
    "no target": ({"target": None}, "TrainSteps.fit: target must be a tensor, got None"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_only_one_network_has_is_refused(case: str) -> None:
    wrong, message = UNSUPPORTED[case]
    parts = three()
    text = unchanged(TrainSteps(*parts[:3]).fit, parts, {**data(), **wrong})
    assert text.startswith(f"TypeError: {message}")


@pytest.mark.parametrize("option", ["max_norm", "accumulate"])
def test_gradients_of_groups_are_refused(option: str) -> None:
    models, criterion, optimizers, *_ = three()
    text = raised(lambda: TrainSteps(models, criterion, optimizers, **{option: 2}))
    what = f"{option} is not supported; use TrainStep for each network"
    assert text == f"TypeError: TrainSteps: {what}"


def unchanged(call: Callable[..., object], parts: Many, arguments: dict[str, Any]) -> str:
    before = copy.deepcopy(parts.state())
    text = raised(lambda: call(**arguments))
    close(parts.state(), before, rtol=0, atol=0)
    assert not any(optimizer.state for optimizer in parts.optimizers)
    return text


def three() -> Many:
    models: list[Any] = [net(4, 3, 2) for _ in range(3)]
    optimizers = [torch.optim.Adam(model.parameters()) for model in models]
    return Many(models, nn.MSELoss(), optimizers, *data().values())


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("fit", [False, True])
def test_wrong_data(fit: bool, case: str) -> None:
    wrong, message = WRONG[case]
    parts = three()
    steps = TrainSteps(*parts[:3])
    text = unchanged(steps.fit if fit else steps, parts, {**data(), **wrong})
    assert text.replace("TrainSteps.fit", "TrainSteps").startswith(message)


@pytest.mark.parametrize("case", OF_FIT)
def test_wrong_arguments_of_fit(case: str) -> None:
    wrong, message = OF_FIT[case]
    parts = three()
    assert unchanged(TrainSteps(*parts[:3]).fit, parts, {**data(), **wrong}).startswith(message)


WIDTHS = {"lanes": 5, "cores": 600}


def classifiers(width: int, target: Tensor) -> Many:
    models = [net(4, width, 3) for _ in range(2)]
    return Many(models, nn.CrossEntropyLoss(), sgd(models), torch.randn(6, 4), target)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_classes_out_of_range(width: int) -> None:
    parts = classifiers(width, torch.tensor([[0, 1, 0, 1, 1, 2], [0, 1, 0, 1, 1, 3]]))
    steps = TrainSteps(*parts[:3])
    for call in (steps, steps.fit):
        text = unchanged(call, parts, {"input": parts.input, "target": parts.target})
        assert re.match(r"IndexError: TrainSteps(.fit)?: target must be classes from 0 to 2", text)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_rows_that_no_network_trains_on_may_have_any_class(width: int) -> None:
    parts = classifiers(width, torch.tensor([0, 1, 2, 1, -1, 9]))
    rows = 2 * [torch.arange(4)]
    losses = TrainSteps(*parts[:3]).fit(parts.input, parts.target, epochs=2, rows=rows)
    assert losses.isfinite().all()


def test_data_without_rows_for_another_number_of_networks() -> None:
    parts = three()
    empty = {"input": torch.ones(5, 0, 4), "target": torch.ones(5, 0, 3)}
    assert unchanged(TrainSteps(*parts[:3]), parts, empty).startswith("RuntimeError: TrainSteps: ")


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")]
)
def test_global_state(context: Callable[[], Any]) -> None:
    parts = three()
    steps = TrainSteps(*parts[:3])
    with context():
        for call in (steps, steps.fit):
            assert re.match(r"RuntimeError: TrainSteps(\.fit)?: ", unchanged(call, parts, data()))


# --- What changes between calls ---


def hook(*_: object) -> None:
    pass


def doubled(parts: Many) -> None:
    parts.models[1].double()


def hooked(parts: Many) -> None:
    parts.models[1].register_forward_hook(hook)


def hooked_parameter(parts: Many) -> None:
    parts.models[1][0].weight.register_hook(hook)


def widened(parts: Many) -> None:
    parts.models[1][0] = nn.Linear(4, 5)
    parts.models[1][2] = nn.Linear(5, 2)
    parts.optimizers[1].param_groups[0]["params"][:] = parts.models[1].parameters()


def emptied(parts: Many) -> None:
    del parts.models[0][:]


def thawed_less(parts: Many) -> None:
    parts.models[1][0].bias.requires_grad_(False)


def tied(parts: Many) -> None:
    parts.models[1][0].weight.data = parts.models[0][0].weight.data


def text_as_lr(parts: Many) -> None:
    parts.optimizers[1].param_groups[0]["lr"] = "0.1"


def broken_state(parts: Many) -> None:
    parts.optimizers[1].state[parts.models[1][0].weight] = 7  # type: ignore[assignment]


REFUSED_LATER: dict[Callable[[Many], None], str] = {
    doubled: r"models must be alike, and dtype: torch.float64 in models\[1\]",
    hooked: r"models\[1\] has forward hooks",
    hooked_parameter: r"models\[1\].0.weight has hooks",
    widened: r"models must be alike, and widths: 4-5-2 in models\[1\]",
    emptied: r"models\[0\] has no Linear",
    thawed_less: r"models must be alike, and parameters that learn: \[0, 2, 3\] in models\[1\]",
    tied: "must not share memory with",
    text_as_lr: r"optimizers\[1\].param_groups has lr = str; it must be a number",
    broken_state: r"models\[1\]: each parameter's entry in optimizer.state must be a dict, got int",
}


@pytest.mark.parametrize("change", REFUSED_LATER, ids=lambda change: change.__name__)
def test_changes_that_are_refused(change: Callable[[Many], None]) -> None:
    parts = three()
    steps = TrainSteps(*parts[:3])
    change(parts)
    before = [copy.deepcopy(parts.models[i].state_dict()) for i in (0, 2)]
    for call in (steps, steps.fit):
        text = raised(lambda call=call: call(**data()))
        assert re.search(rf"TrainSteps(\.fit)?: .*{REFUSED_LATER[change]}", text)
    close([parts.models[i].state_dict() for i in (0, 2)], before, rtol=0, atol=0)


def activation(parts: Many) -> None:
    for model in parts.models:
        model[1] = nn.Tanh()


def all_doubled(parts: Many) -> None:
    for model, optimizer in zip(parts.models, parts.optimizers, strict=True):
        model.double()
        optimizer.load_state_dict(optimizer.state_dict())


def learning_rate(parts: Many) -> None:
    parts.optimizers[1].param_groups[0]["lr"] = 0.5


def layer(parts: Many) -> None:
    torch.manual_seed(1)
    parts.models[1][2] = nn.Linear(3, 2)
    parts.optimizers[1].param_groups[0]["params"][2:] = parts.models[1][2].parameters()


def fused(parts: Many) -> None:
    mlp_ext.fuse(parts.models[1], level="stack")


def reduction(parts: Many) -> None:
    parts.criterion.reduction = "sum"


@pytest.mark.parametrize(
    "change", [activation, all_doubled, learning_rate, layer, fused, reduction]
)
def test_changes_that_are_followed(change: Callable[[Many], None]) -> None:
    together, alone = three(), None
    alone = copy.deepcopy(together)
    steps, each = TrainSteps(*together[:3]), [TrainStep(*part[:3]) for part in alone.each()]
    for parts, run in ((together, steps), (alone, lambda x, y: [step(x, y) for step in each])):
        run(parts.input, parts.target)
        change(parts)
        dtype = parts.models[0][0].weight.dtype
        for _ in range(3):
            run(parts.input.to(dtype), parts.target.to(dtype))
    close(together.state(), alone.state())


# --- Text, copies, collection ---


def test_repr() -> None:
    models: list[Any] = [net(4, 3, 2) for _ in range(12)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=i / 8) for i, m in enumerate(models)]
    text = "3 x 4-3-2 relu identity, MSELoss(), SGD(lr=[0.0, 0.125, 0.25])"
    assert repr(TrainSteps(models[:3], nn.MSELoss(), optimizers[:3])) == f"TrainSteps({text})"
    text = repr(TrainSteps(models, F.mse_loss, optimizers))
    assert text.endswith("mse_loss, SGD(lr=[0.0, 0.125, 0.25, ..., 1.375]))")


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda steps: pickle.loads(pickle.dumps(steps))],
    ids=["copy", "pickle"],
)
def test_copy_trains_copies(copied: Callable[[TrainSteps], TrainSteps]) -> None:
    parts = three()
    steps = TrainSteps(*parts[:3])
    steps(*parts[3:])
    other, before = copied(steps), copy.deepcopy(parts.state())
    losses = other(*parts[3:])
    close(parts.state(), before, rtol=0, atol=0)
    assert torch.equal(steps(*parts[3:]), losses)
    assert torch.equal(steps.fit(*parts[3:]), other.fit(*parts[3:]))


class WithSteps(nn.Sequential):
    """A model that holds what trains it."""

    steps: TrainSteps


def test_models_that_hold_their_steps_are_collected() -> None:
    models: list[Any] = [WithSteps(*net(4, 3, 2)) for _ in range(3)]
    steps = TrainSteps(models, nn.MSELoss(), sgd(models))
    models[0].__dict__["steps"] = steps
    steps(**data())
    gone = [weakref.ref(model) for model in models] + [weakref.ref(models[1][0].weight)]
    del models, steps
    gc.collect()
    assert not any(ref() for ref in gone)


def test_models_of_many_modules_and_module_lists_are_taken() -> None:
    models = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
    parts: list[Tensor] = [*TrainSteps(models, F.mse_loss, sgd([*models]))(**data())]
    assert len(parts) == 2


def test_many_takes_data_for_each() -> None:
    parts = many(2, "3-17-5@100", "classes", "plain", torch.float32)
    own = parts._replace(target=torch.stack([parts.target, parts.target]))
    assert own.each()[1].target.shape == (100,)
