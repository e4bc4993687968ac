"""What a forward reads is a constant to torch.fx: fuse guards it, or leaves the forward alone."""

import copy
import functools
import math
import random
import re
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlp_ext

pytestmark = [
    pytest.mark.filterwarnings("ignore:fuse changed nothing"),
    pytest.mark.usefixtures("one_thread"),
]

np.random.seed(0)  # numpy.random is loaded when it is first used

FLAG = True
TABLE: dict[str, Callable[[Tensor], Tensor]] = {"activation": torch.relu}
SETTINGS = types.SimpleNamespace(scale=1.0)


class Options:
    scale, scales, bias = 1.5, {"first": 2.0}, None

    class Inner:
        scale = 0.5

    @classmethod
    def doubled(cls) -> float:
        return 2 * cls.scale


class Scaler:
    factor = 2.0

    def __init__(self) -> None:
        self.scale = 3.0

    def times(self, x: Tensor) -> Tensor:
        return x * self.scale * self.factor


def scaled(x: Tensor, by: dict[str, float] = {"factor": 1.0}) -> Tensor:  # noqa: B006
    return x * by["factor"] * scaled.scale  # type: ignore[attr-defined, no-any-return]


scaled.scale = 2.0  # type: ignore[attr-defined]
SCALER = Scaler()
TIMES, HALF = SCALER.times, functools.partial(scaled, by={"factor": 0.5})


class Base(nn.Module):
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale, self.scales, self.kind = 2.0, [1.0, 2.0], "first"
        self.config = types.SimpleNamespace(scale=3.0)
        self.cache: list[Tensor] = []
        self.flags = {"relu"}
        self.acts = [nn.ReLU()]
        self.numbers = iter([1.0] * 200)
        self.register_buffer("count", torch.zeros(()))
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))

    @property
    def doubled(self) -> float:
        return 2 * self.scale


# ---- what is followed, with everything that it reads guarded ----


def reads_attributes(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) * self.scale * self.scales[0] * self.factor * self.doubled


def reads_a_config(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) * self.config.scale * SETTINGS.scale


def reads_globals(self: Any, x: Tensor) -> Tensor:
    return TABLE["activation"](self.fc(x)) if FLAG else x


def reads_classes(self: Any, x: Tensor) -> Tensor:
    h = self.hidden(x) * Options.scale * Options.scales["first"] * Options.Inner.scale
    return h * Options.doubled() if Options.bias is None else h


def calls_a_method_of_an_object(self: Any, x: Tensor) -> Tensor:
    return TIMES(self.hidden(x))


def calls_functions_that_hold_values(self: Any, x: Tensor) -> Tensor:
    return HALF(scaled(self.hidden(x)))


def computes_with_numpy(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) * float(np.sqrt(np.pi))


def reads_the_mode(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) if self.training else torch.tanh(self.fc(x))


def reads_sizes(self: Any, x: Tensor) -> Tensor:
    rows, columns = x.shape
    more = rows
    more += 1
    return self.hidden(x).view(rows * columns) * math.sqrt(self.fc.in_features) * more + rows


def returns_a_dict(self: Any, x: Tensor) -> dict[str, Tensor]:
    return {f"{self.kind}": self.hidden(x)}


def changes_its_input(self: Any, x: Tensor) -> Tensor:
    x += 1
    return self.hidden(x) + x


def changes_an_output(self: Any, x: Tensor) -> Tensor:
    h = F.leaky_relu(self.fc(x))
    h *= 2
    return F.relu6(self.out(h)).mul_(3)


def uses_a_function(self: Any, x: Tensor) -> Tensor:
    return (lambda z: torch.relu(self.fc(z)))(x)


def loops(self: Any, x: Tensor) -> Tensor:
    return sum([act(self.fc(x)) for act in (torch.relu, torch.tanh)])


def draws_for_its_input(self: Any, x: Tensor) -> Tensor:
    return F.dropout(self.hidden(x), 0.5, self.training) + torch.randn_like(x)


def calls_the_base(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.out(Base.hidden(self, x)))


def slices_a_list(self: Any, x: Tensor) -> Tensor:
    for block in self.blocks[:-1]:
        x = torch.tanh(block(x))
    return torch.relu(self.blocks[-1](self.hidden(x)))


FOLLOWED = [
    *(reads_attributes, reads_a_config, reads_globals, reads_the_mode, reads_sizes),
    *(returns_a_dict, changes_its_input, changes_an_output, uses_a_function, loops),
    *(draws_for_its_input, calls_the_base, slices_a_list, reads_classes),
    *(calls_a_method_of_an_object, calls_functions_that_hold_values, computes_with_numpy),
]

# ---- what is left alone ----


def keeps_a_result(self: Any, x: Tensor) -> Tensor:
    h = self.hidden(x)
    self.cache.append(h)
    return h


def replaces_an_item(self: Any, x: Tensor) -> Tensor:
    self.scales[0] = self.scales[0] + 1
    return self.hidden(x) * self.scales[0]


def sets_an_attribute(self: Any, x: Tensor) -> Tensor:
    self.last = self.hidden(x)
    return self.last


def counts_in_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return self.hidden(x) * self.count


def draws(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) * random.random()


def draws_by_numpy(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) * np.random.random()


def takes_the_next(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) * next(self.numbers)


def draws_a_tensor(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) * torch.rand(())


def is_without_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = self.hidden(x)
    return h + self.out(x)


def casts(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.hidden(x).float()


def asks_for_a_class(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) if isinstance(x, Tensor) else x


def asks_for_the_type(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) if type(x) is Tensor else x


def asks_whether_it_is_a_tensor(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) if torch.is_tensor(x) else x


def asks_for_grad_mode(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) if torch.is_grad_enabled() else self.fc(x)


def asks_for_an_attribute(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) if hasattr(self, "missing") else torch.tanh(self.fc(x))


def branches(self: Any, x: Tensor) -> Tensor:
    return self.hidden(x) if x.shape[0] > 3 else x


def handles_errors(self: Any, x: Tensor) -> Tensor:
    try:
        return self.hidden(x)
    except RuntimeError:
        return x


def changes_an_item_and_reads_a_set(self: Any, x: Tensor) -> Tensor:
    self.scales[0] += 1.0
    return self.hidden(x) * self.scales[0] if "relu" in self.flags else x


def prints(self: Any, x: Tensor) -> Tensor:
    print(end="")
    return self.hidden(x)


def calls_what_is_no_child(self: Any, x: Tensor) -> Tensor:
    return self.acts[0](self.fc(x))


LEFT_ALONE = {
    keeps_a_result: "calls append",
    replaces_an_item: "changes what it reads",
    sets_an_attribute: "calls __setattr__",
    counts_in_a_buffer: "calls __setattr__",
    draws: "calls random",
    draws_by_numpy: "uses random, a cython_function_or_method",
    takes_the_next: "uses numbers, a list_iterator",
    draws_a_tensor: "computes with tensors that do not come from its input",
    is_without_gradients: "handles exceptions",
    casts: "handles exceptions",
    asks_for_a_class: "asks for the type of a tensor",
    asks_for_the_type: "asks for types",
    asks_whether_it_is_a_tensor: "calls is_tensor",
    asks_for_grad_mode: "calls is_grad_enabled",
    asks_for_an_attribute: "asks for an attribute 'missing'",
    branches: "branches on its input",
    handles_errors: "handles exceptions",
    changes_an_item_and_reads_a_set: "reads its flags, a set",
    prints: "calls print",
    calls_what_is_no_child: "cannot be traced by torch.fx: NameError",
}


def made(forward: Callable[..., Any]) -> nn.Module:
    return type("Net", (Base,), {"forward": forward})().double()


def results(model: nn.Module, rows: int = 5) -> list[Any]:
    """Outputs, the input after the call, and gradients, with fixed random numbers."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    leaf = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    x = leaf * 1
    model.zero_grad()
    output = model(x)
    value = output if isinstance(output, Tensor) else next(iter(output.values()))
    value.square().sum().backward()
    return [output, x, leaf.grad, *(p.grad for p in model.parameters())]


def assert_same(fused: nn.Module, native: nn.Module) -> None:
    for rows in (5, 2):
        found, expected = (results(model, rows) for model in (fused, native))
        torch.testing.assert_close(found, expected)


def changes(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[Callable[[Any], Any]]:
    """What may change between two calls, in the model or around it."""
    here = __import__(__name__)
    return [
        lambda m: m.eval(),
        lambda m: m.train(),
        lambda m: setattr(m, "scale", 5.0),
        lambda m: m.scales.__setitem__(0, 7.0),
        lambda m: setattr(m, "scales", [9.0]),
        lambda m: setattr(m, "kind", "second"),
        lambda m: setattr(m, "missing", 1),
        lambda m: setattr(m, "factor", 0.5),
        lambda m: setattr(m.config, "scale", 0.25),
        lambda m: m.acts.__setitem__(0, nn.GELU()),
        lambda m: m.blocks.append(m.out),
        lambda m: m.blocks.__setitem__(0, m.out),
        lambda m: setattr(m, "hidden", lambda x: 2 * m.fc(x)),
        lambda m: monkeypatch.setattr(Base, "factor", 11.0),
        lambda m: monkeypatch.setattr(SETTINGS, "scale", 13.0),
        lambda m: monkeypatch.setattr(Options, "scale", 3.0),
        lambda m: monkeypatch.setitem(Options.scales, "first", 5.0),
        lambda m: monkeypatch.setattr(Options, "bias", 1.0),
        lambda m: monkeypatch.setattr(Options.Inner, "scale", 0.75),
        lambda m: monkeypatch.setattr(SCALER, "scale", 5.0),
        lambda m: monkeypatch.setattr(Scaler, "factor", 7.0),
        lambda m: monkeypatch.setattr(scaled, "scale", 0.5),
        lambda m: monkeypatch.setitem(scaled.__defaults__[0], "factor", 3.0),  # type: ignore[index]
        lambda m: monkeypatch.setitem(HALF.keywords["by"], "factor", 0.25),
        lambda m: monkeypatch.setitem(HALF.keywords, "by", {"factor": 0.125}),
        lambda m: monkeypatch.setitem(TABLE, "activation", torch.tanh),
        lambda m: monkeypatch.setattr(here, "FLAG", False),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("forward", [*FOLLOWED, *LEFT_ALONE], ids=lambda f: f.__name__)
@pytest.mark.parametrize("level", ["layers", "stack"])
def test_results_are_native_whatever_changes(
    forward: Callable[..., Any], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = made(forward)
    fused = mlp_ext.fuse(copy.deepcopy(native), level)
    assert_same(fused, native)
    for change in changes(monkeypatch, fused):
        for model in (native, fused):
            change(model)
        assert_same(fused, native)
    assert len(fused.cache) == len(native.cache)
    assert all(type(x) is Tensor for x in fused.cache)


@pytest.mark.parametrize("forward", FOLLOWED, ids=lambda f: f.__name__)
def test_it_is_fused(forward: Callable[..., Any]) -> None:
    model = mlp_ext.fuse(made(forward))
    assert next(iter(mlp_ext.fusion_report(model))).status == "fused"


@pytest.mark.slow
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_weak_references_of_torch_compile_end() -> None:
    """torch.compile keeps one to each new module, such as a slice, and its callback must run."""
    torch.compile(nn.Linear(1, 1), backend="eager")(torch.ones(1, 1))
    model = mlp_ext.fuse(made(slices_a_list))
    assert next(iter(mlp_ext.fusion_report(model))).status == "fused"


@pytest.mark.parametrize("forward", LEFT_ALONE, ids=lambda f: f.__name__)
def test_the_report_says_why_it_is_not(forward: Callable[..., Any]) -> None:
    model = made(forward)
    before = copy.deepcopy(vars(model))
    (reason,) = {site.reason for site in mlp_ext.fusion_report(model)}
    assert re.fullmatch(f"in a Net, whose forward {re.escape(LEFT_ALONE[forward])}.*", reason)
    assert vars(model).keys() == before.keys()
    assert not model.cache and model.scales == [1.0, 2.0]
    assert len([*model.numbers]) == 200


def test_other_threads_go_on_while_a_forward_is_followed() -> None:
    stop = threading.Event()
    errors: list[Exception] = []
    busy, x = made(loops), torch.randn(3, 4, dtype=torch.float64)
    expected = busy(x)

    def work() -> None:
        while not stop.is_set():
            try:
                torch.testing.assert_close(busy(x), expected)
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(30):
            mlp_ext.fusion_report(made(loops))
    finally:
        stop.set()
        thread.join()
    assert not errors


@pytest.mark.parametrize("value", [0.0, -0.0, False, True, 1, None], ids=str)
def test_constants_among_the_arguments(value: object) -> None:
    def forward(self: Any, x: Tensor, option: Any = 0) -> Tensor:
        h = self.hidden(x) * 0 if option is None else self.hidden(x) * option
        return 1 / (h - 0.0 if option is True else h)

    native = made(forward)
    fused, x = mlp_ext.fuse(copy.deepcopy(native)), torch.randn(3, 4, dtype=torch.float64)
    for option in (0.0, value, -0.0):
        torch.testing.assert_close(fused(x, option), native(x, option))


def test_no_plan_is_made_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that make plans at the same time may pass it."""
    fused = mlp_ext.fuse(made(reads_attributes))
    results(fused)
    plans = vars(fused)["_plans"]
    monkeypatch.setattr(type(plans), "LIMIT", len(plans._plans) - 1)
    fused.scale = 5.0
    results(fused)
    assert len(plans._plans) == plans.LIMIT + 1


def test_a_forward_that_always_changes_stays_right() -> None:
    native = made(reads_attributes)
    fused = mlp_ext.fuse(copy.deepcopy(native))
    for step in range(40):
        native.scale = fused.scale = float(step)
        torch.testing.assert_close(results(fused), results(native))
