"""Runs hostile calls: each must do as torch, or raise an error of one line without data.

The calls are rows of the tables in hostile_*.py, run by test_hostile_input.py in child processes.
"""

import contextlib
import importlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from eager_steps import Eager
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import mlp_ext

TABLES = ("layers", "steps", "optimizers", "fits", "others")
SECRET = 0.8675309  # is in all data, so that a message that shows data is found


class Row(NamedTuple):
    """A call, made with our functions and with torch's. Without an error, ours must do as torch:
    compute the same, or raise the same class."""

    call: Callable[[Any], object]  # of OURS or NATIVE
    error: type[BaseException] | None = None
    message: str = ""  # the error's begins with it


Table = dict[str, Row]


def rows(table: str) -> Table:
    found: Table = importlib.import_module(f"hostile_{table}").ROWS
    return found


OURS = SimpleNamespace(
    relu=mlp_ext.linear_relu,
    act=mlp_ext.linear_act,
    LinearReLU=mlp_ext.LinearReLU,
    Sequential=mlp_ext.Sequential,
    fuse=mlp_ext.fuse,
    TrainStep=mlp_ext.TrainStep,
)
NATIVE = SimpleNamespace(
    relu=lambda x, w, b=None: F.relu(F.linear(x, w, b)),
    act=lambda x, w, b, name, numbers=(): getattr(F, name)(F.linear(x, w, b), *numbers),
    LinearReLU=lambda *sizes: nn.Sequential(nn.Linear(*sizes), nn.ReLU()),
    Sequential=nn.Sequential,
    fuse=lambda model, level="layers": model,
    TrainStep=Eager,
)


# ---- data, made anew for each call ----


def _drawn(*sizes: int) -> Tensor:
    found = torch.rand(sizes, generator=torch.Generator().manual_seed(sum(sizes)))
    found.view(-1)[0] = SECRET
    return found


def x() -> Tensor:
    return _drawn(6, 4) - 0.5


def y() -> Tensor:
    return _drawn(6, 3)


def w() -> Tensor:
    return _drawn(3, 4) - 0.4


def b() -> Tensor:
    return _drawn(3)


def classes(*values: int) -> Tensor:
    return torch.tensor(values or (0, 1, 2, 0, 1, 2))


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), *(layers or [nn.ReLU()]), nn.Linear(5, 3))


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.1)


class Parts(NamedTuple):
    model: Any
    criterion: Any
    optimizer: Any
    step: Any
    parameters: list[nn.Parameter]  # as they were at first

    def state(self) -> list[Tensor]:
        """Copies of parameters and optimizer states, as far as these are such."""
        entries = getattr(self.optimizer, "state", None)
        states = tree_leaves(list(entries.values()) if isinstance(entries, dict) else [])
        tensors = [t for t in [*self.parameters, *states] if isinstance(t, Tensor)]
        return [t.detach().clone() for t in tensors if t.is_cpu]


Change = Callable[[Parts], object]


def step(
    change: Change | None = None,
    data: Callable[[], tuple[Any, ...]] | None = None,
    *,
    model: Callable[[], nn.Module] = net,
    criterion: Callable[[], Any] = nn.MSELoss,
    optimizer: Callable[[Any], Any] = momentum,
    call: Callable[[Parts], object] | None = None,
    first: bool = True,
    may_train: bool = False,
    **settings: Any,
) -> Callable[[Any], object]:
    """A step, a change of its parts, and two steps with the data, or the call. An error must leave
    everything as it was.

    first: whether there is a step before the change. may_train: whether errors come after steps.
    """

    def run(library: Any) -> object:
        torch.manual_seed(0)
        made = model()
        loss = criterion()
        chosen = optimizer(made.parameters())
        trained = library.TrainStep(made, loss, chosen, **settings)
        parts = Parts(made, loss, chosen, trained, [*made.parameters()])
        takes_classes = isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss))
        usual = (x(), classes() if takes_classes else y())
        if first:
            parts.step(*usual)
        if change:
            change(parts)
        before = parts.state()
        try:
            if call:
                return call(parts), parts.state()
            return [parts.step(*(data() if data else usual)) for _ in range(2)], parts.state()
        except BaseException:
            if not may_train:
                torch.testing.assert_close(parts.state(), before, rtol=0, atol=0, equal_nan=True)
            raise

    return run


# ---- runs a table ----


def _outcome(call: Callable[[Any], object], library: Any) -> object:
    """What the call returns, or the exception that it raises."""
    torch.manual_seed(0)
    try:
        return call(library)
    except BaseException as error:
        return error


def _flaw_of_message(error: BaseException) -> str:
    message = str(error)
    flaws = {
        "several lines": "\n" in message,
        "too long": len(message) > 500,
        "data": "0.867" in message or "tensor([" in message,
        "C++": ".cpp" in message or "pybind" in message.lower(),
    }
    return ", ".join(flaw for flaw, is_there in flaws.items() if is_there)


def _failure(row: Row) -> str:
    """What is wrong with the outcome of a row; "" if nothing is."""
    ours = _outcome(row.call, OURS)
    got = f"{type(ours).__name__}: {ours}"
    if isinstance(ours, AssertionError) and row.error is not AssertionError:
        return f"half-made, or {got}"
    if row.error is not None:
        if type(ours) is not row.error or not str(ours).startswith(row.message):
            return f"expected {row.error.__name__}: {row.message}, got {got}"
        return _flaw_of_message(ours)
    native = _outcome(row.call, NATIVE)
    if isinstance(native, BaseException):
        if type(ours) is not type(native):
            return f"expected {type(native).__name__}: {native}, got {got}"
        return "" if str(ours) == str(native) else _flaw_of_message(ours)  # type: ignore[arg-type]
    if isinstance(ours, BaseException):
        return f"torch computes this, got {got}"
    try:
        torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-5, equal_nan=True)
    except AssertionError as error:
        return str(error)
    return ""


def run(table: str, after: str) -> None:
    """Prints a line of JSON before each row, [name], and after it, [name, failure].

    after: the row after which to begin; "" for all.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    todo = rows(table)
    names = [*todo]
    for name in names[names.index(after) + 1 if after else 0 :]:
        print(json.dumps([name]), flush=True)
        with _quiet():
            failure = _failure(todo[name])
        print(json.dumps([name, failure]), flush=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":  # python tests/hostile.py layers: to see all failures
    run(sys.argv[1], "")
