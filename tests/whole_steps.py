"""Steps in which memory runs out, or Ctrl-C comes, at one allocation after another.

Run with at_allocation.cpp preloaded. Prints how each case ended, as JSON: the number of runs, of
those that raised, and of those after which parameters and optimizer are not those of whole steps.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import count, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlp_ext import TrainStep, TrainSteps

PRELOADED = ctypes.CDLL(None)


class Case(NamedTuple):
    """Steps of a network, on one batch or several."""

    widths: tuple[int, ...]
    rows: int
    dtype: torch.dtype = torch.float32
    optimizer: str = "momentum"
    threads: int = 1
    batches: int = 1
    networks: int = 1
    dropout: bool = False
    autocast: bool = False
    transposed: bool = False
    accumulate: int = 1
    tensors: bool = False  # whether only allocations of tensors fail


BF16 = torch.bfloat16
CASES = {
    "lanes": Case((10, 5, 1), 32),
    "blocks": Case((64, 64, 64), 96, BF16),
    "blocks on threads": Case((64, 64, 64), 1024, threads=2),
    "panels": Case((512, 256, 10), 128),
    "panels on threads": Case((512, 256, 10), 128, threads=2),
    "layers": Case((600, 300, 10), 100, optimizer="adam"),
    "layers on threads": Case((600, 300, 10), 100, threads=2),
    "layers of 16 bits": Case((96, 300, 200, 10), 72, torch.float16),
    "float64": Case((300, 300, 10), 50, torch.float64, "adam"),
    "library": Case((256, 768, 256), 256, BF16, tensors=True),
    "library between": Case((30, 256, 256, 10), 256, BF16, "adam", tensors=True),
    "fit": Case((10, 5, 1), 32, batches=5, optimizer="adam"),
    "fit by layers": Case((96, 200, 10), 60, BF16, tensors=True, batches=3),
    "dropout": Case((33, 64, 7), 50, dropout=True, optimizer="adam"),
    "autocast": Case((33, 64, 7), 50, tensors=True, autocast=True),
    "composite": Case((33, 64, 7), 50, transposed=True, optimizer="adam", tensors=True),
    "accumulate": Case((33, 64, 7), 50, accumulate=2),
    "many in lanes": Case((10, 5, 1), 10, networks=5, optimizer="adam"),
    "many on cores": Case((64, 64, 64), 10, BF16, networks=3, threads=2),
    "many in turn": Case((96, 200, 10), 60, BF16, tensors=True, networks=2),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
}


def networks(case: Case) -> list[nn.Sequential]:
    torch.manual_seed(0)
    models = []
    for _ in range(case.networks):
        modules: list[nn.Module] = []
        for k, n in pairwise(case.widths):
            layer = nn.Linear(k, n)
            if case.transposed:
                layer.weight.data = layer.weight.data.t().contiguous().t()
            modules += [layer, nn.Tanh(), *([nn.Dropout(0.5)] if case.dropout else [])]
        model = nn.Sequential(*modules).to(case.dtype)
        models.append(model)
    return models


class Run:
    """Networks at their start, to be trained."""

    def __init__(self, case: Case, models: list[nn.Sequential]) -> None:
        self.case, self.models = case, deepcopy(models)
        self.optimizers = [OPTIMIZERS[case.optimizer](m.parameters()) for m in self.models]
        torch.manual_seed(1)
        rows = case.rows * case.batches
        self.x = torch.randn(rows, case.widths[0], dtype=case.dtype)
        self.y = torch.randn(rows, case.widths[-1], dtype=case.dtype)
        if case.networks == 1:
            parts = self.models[0], nn.MSELoss(), self.optimizers[0]
            self.step: Any = TrainStep(*parts, accumulate=case.accumulate)
        else:
            self.step = TrainSteps(self.models, nn.MSELoss(), self.optimizers)
        for _ in range(1, case.accumulate):
            self.step(self.x, self.y)
        torch.manual_seed(2)

    def train(self) -> None:
        with torch.autocast("cpu", enabled=self.case.autocast):
            if self.case.batches > 1:
                self.step.fit(self.x, self.y, 1, self.case.rows)
            else:
                self.step(self.x, self.y)

    def state(self) -> list[list[Tensor]]:
        """Of each network: its parameters, and what its optimizer has of them."""
        found = []
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            states = [optimizer.state.get(p, {}) for p in model.parameters()]
            held = [t for state in states for t in state.values()]
            found.append([t.detach().clone() for t in (*model.parameters(), *held)])
        return found


def is_same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def whole_steps(case: Case, models: list[nn.Sequential]) -> Iterator[list[list[Tensor]]]:
    """The states after 0, 1, ... steps."""
    run = Run(case, models)
    yield run.state()
    batches = zip(run.x.split(case.rows), run.y.split(case.rows), strict=True)
    for run.x, run.y in batches:
        run.case = case._replace(batches=1)
        run.train()
        yield run.state()


def attempts(case: Case, interrupt: bool) -> dict[str, Any]:
    """Runs of the case in which the first, second, ... allocation fails, or has Ctrl-C."""
    torch.set_num_threads(case.threads)
    models = networks(case)
    whole = list(whole_steps(case, models))
    found: dict[str, Any] = {"runs": 0, "raised": 0, "halfway": []}
    for n in count(1):
        run = Run(case, models)
        raised = ""
        try:
            PRELOADED.at_allocation(n, case.tensors, interrupt)
            run.train()
            PRELOADED.allocations_left()  # at a call Python handles Ctrl-C
        except (Exception, KeyboardInterrupt) as error:
            raised = f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            left = PRELOADED.allocations_left()
            PRELOADED.at_allocation(0, 0, 0)
        if left:
            return found
        found["runs"] += 1
        found["raised"] += bool(raised)
        allowed = whole if raised else whole[-1:]
        for network, state in enumerate(run.state()):
            if not any(is_same(state, steps[network]) for steps in allowed):
                found["halfway"].append([n, raised])
    raise AssertionError


def main(interrupt: bool, *names: str) -> None:
    PRELOADED.at_allocation.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    ended = {}
    for name in names or CASES:
        Run(CASES[name], networks(CASES[name])).train()  # threads, and what libraries keep
        ended[name] = attempts(CASES[name], interrupt)
    print(json.dumps(ended))


if __name__ == "__main__":
    main(bool(int(sys.argv[1])), *sys.argv[2:])
