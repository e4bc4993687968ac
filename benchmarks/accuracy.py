"""Errors of each path of the CPU kernels beside PyTorch's own, in units in the last place (ULP):

    python benchmarks/accuracy.py results/accuracy.csv

The reference is PyTorch in float64 with the same numbers. A ULP is the distance of neighbouring
numbers of the dtype at the exact result, or at the root mean square of all results where that is
larger: where terms cancel, no sum has digits of its own.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mlp_ext import _C, ACTIVATIONS
from mlp_ext.bench.cases import Case, Layer, Net, Setting
from mlp_ext.bench.machine import commit, device_name
from mlp_ext.bench.plans import paths, plan
from mlp_ext.bench.providers import PATHS, PROVIDERS
from mlp_ext.bench.rows import write_csv
from mlp_ext.bench.training import LAYERS, make_mlp
from mlp_ext.ops import build_info

DTYPES = ("float32", "bfloat16", "float16")
PASSES = ("forward", "backward", "step")
CASES = (  # each path takes the first that it can
    *(Layer(64, 784, 256), Layer(16, 64, 32), Layer(512, 12, 8), Layer(512, 1, 64)),
    Layer(512, 64, 1),
)
NETS = (  # together they have each path of a step
    *(Net((10, 5, 1), 64), Net((64, 64, 64, 10), 256), Net((784, 512, 256, 10), 64)),
    Net((784, 512, 256, 10), 16),
)
LEARNING_RATE = 100.0  # the change outweighs the rounding of the weight that it is added to


@dataclass(frozen=True)
class Row:
    mode: str  # a pass: forward, backward or step
    path: str  # of our kernels
    case: str
    activation: str
    dtype: str
    mean_ulp: float  # over all results of the pass
    max_ulp: float
    torch_mean_ulp: float
    torch_max_ulp: float
    device_name: str
    torch: str
    mlp_ext: str
    commit: str


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float]:
    """Their mean and their maximum, in ULP."""
    ulps = []
    for result, reference in zip(found, exact, strict=True):
        limits = torch.finfo(result.dtype)
        size = reference.abs().clamp(min=max(reference.square().mean().sqrt(), limits.tiny))
        ulp = limits.eps * torch.exp2(size.frexp().exponent.double() - 1)
        ulps.append(((result.double() - reference).abs() / ulp).flatten())
    every = torch.cat(ulps)
    return every.mean().item(), every.max().item()


Compute = Callable[[str, torch.dtype], list[Tensor]]  # of a provider, in a dtype


def of_layer(case: Layer, setting: Setting) -> Compute:
    """The output, or the gradients of input, weight and bias."""
    M, K, N = case
    x, w, b, dy = (torch.randn(s) for s in ((M, K), (N, K), (N,), (M, N)))
    numbers = [t.to(setting.torch_dtype) for t in (x, w * K**-0.5, b * K**-0.5, dy)]

    def compute(provider: str, dtype: torch.dtype) -> list[Tensor]:
        *leaves, grad = (t.to(dtype, copy=True) for t in numbers)
        function = PROVIDERS["layers"][provider].make(setting)
        forced = None if provider == "native" else provider
        _C.force_paths(forced, forced)
        try:
            output = function(*(t.requires_grad_(setting.mode == "backward") for t in leaves))
            if setting.mode == "forward":
                return [output]
            return list(torch.autograd.grad(output, leaves, grad))
        finally:
            _C.force_paths(None, None)

    return compute


def of_step(case: Net, setting: Setting) -> Compute:
    """The loss, and the parameters after a step of SGD."""
    model = make_mlp(case.widths, 0, setting.activation).to(setting.torch_dtype)
    x, y = torch.randn(case.batch, case.widths[0]), torch.rand(case.batch, case.widths[-1])
    x, y = (t.to(setting.torch_dtype) for t in (x, y))

    def compute(provider: str, dtype: torch.dtype) -> list[Tensor]:
        own = deepcopy(model).to(dtype)
        optimizer = torch.optim.SGD(own.parameters(), lr=LEARNING_RATE)
        step = LAYERS["native" if provider == "native" else "step"](own, nn.MSELoss(), optimizer)
        return [step(x.to(dtype), y.to(dtype)), *(p.detach() for p in own.parameters())]

    return compute


def cases(setting: Setting) -> Iterator[tuple[str, Case, Compute]]:
    """Each path with a case of it, which takes the path in this mode and dtype."""
    if setting.mode == "step":
        for net in NETS:
            yield paths(plan(net, setting))["step"], net, of_step(net, setting)
        return
    for path in PATHS["cpu"]:
        for case in CASES:
            if PROVIDERS["layers"][path].takes(case, setting):
                yield path, case, of_layer(case, setting)
                break


def measure() -> Iterator[Row]:
    versions = (torch.__version__, build_info()["mlp_ext"], commit())
    setting = Setting("layers", "forward", threads=1)
    for mode in PASSES:
        for dtype in DTYPES:
            for activation in ACTIVATIONS:
                torch.manual_seed(0)
                one = replace(setting, mode=mode, dtype=dtype, activation=activation)
                for path, case, compute in cases(one):
                    exact = compute("native", torch.float64)
                    numbers = [
                        float(f"{number:.3g}")
                        for provider in (path, "native")
                        for number in errors(compute(provider, one.torch_dtype), exact)
                    ]
                    where = (mode, path, str(case), activation, dtype)
                    yield Row(*where, *numbers, device_name("cpu"), *versions)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    kinds = {field.name: float if field.type == "float" else str for field in fields(Row)}
    return [Row(**{name: kinds[name](value) for name, value in row.items()}) for row in found]


def table(rows: Sequence[Row], name: str, keys: Sequence[str]) -> Iterator[str]:
    """Of a column and some of its values, in Markdown: mean and maximum, of ours and of torch's."""
    heads = [f"{dtype}{who}" for dtype in DTYPES for who in ("", ", torch")]
    yield f"| {' | '.join([name, *heads])} |"
    yield "|---" * (1 + len(heads)) + "|"
    for key in keys:
        cells = []
        for dtype in DTYPES:
            own = [row for row in rows if (getattr(row, name), row.dtype) == (key, dtype)]
            for prefix in ("", "torch_"):
                means = [getattr(row, f"{prefix}mean_ulp") for row in own]
                most = max((getattr(row, f"{prefix}max_ulp") for row in own), default=0)
                cells.append(f"{sum(means) / len(means):.2f}, {most:.3g}" if own else "")
        yield f"| {' | '.join([key, *cells])} |"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    for mode in PASSES:
        own = [row for row in rows if row.mode == mode]
        yield from ("", f"{mode}:", "")
        yield from table(own, "path", list(dict.fromkeys(row.path for row in own)))
    yield from ("", "forward:", "")
    yield from table([row for row in rows if row.mode == "forward"], "activation", ACTIVATIONS)


def main(path: Path) -> None:
    torch.set_num_threads(1)
    rows = list(measure())
    write_csv(rows, path, Row)
    print(*tables(rows), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
