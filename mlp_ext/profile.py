"""profile(model, input): what fuse finds in a model, how far its results are from native's, and how
fast they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mlp_ext.fuse import LEVELS, FusionReport, fuse, fusion_report, unfuse
from mlp_ext.nn import type_name
from mlp_ext.train_step import TrainStep

LEVEL_NAMES = dict(zip(LEVELS, ("fused", "stack"), strict=True))  # as `mlp-ext bench` has them
# Of the step whose change of the weights gives TrainStep's gradients: large, so that rounding of
# the weights is not seen.
CHECKED_LR = 1e4


@dataclass(frozen=True)
class Timing:
    """One way to compute the model, beside native."""

    name: str  # native, fused (level "layers"), stack or step (TrainStep)
    left_out: str = ""  # why it is not measured
    median_s: float | None = None  # seconds per call, over the rounds
    q20_s: float | None = None
    q80_s: float | None = None
    ratio_to_native: float | None = None  # native's time / this one's, the median over the rounds
    # Largest |difference| from native / largest |value| of native's; of the step, the loss's.
    output_difference: float | None = None
    gradient_difference: float | None = None  # of the parameters; 0 without train


@dataclass(frozen=True, repr=False)
class Profile:
    """The result of profile; prints as text, to_dict() is for JSON."""

    model: str
    inputs: list[list[int]]
    train: bool
    device: str
    device_name: str
    threads: int
    reports: dict[str, FusionReport]  # of each level
    timings: list[Timing]

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts."""
        fusion = {
            level: [asdict(site) for site in report] for level, report in self.reports.items()
        }
        own = {name: value for name, value in vars(self).items() if name != "reports"}
        return {**own, "timings": [asdict(timing) for timing in self.timings], "fusion": fusion}

    def __str__(self) -> str:
        what = "training step" if self.train else "forward"
        sizes = ", ".join("x".join(map(str, size)) or "scalar" for size in self.inputs)
        place = f"{self.threads} threads" if self.device == "cpu" else self.device
        lines = [f"{self.model}, {what} of {sizes} on {self.device_name}, {place}"]
        for level, report in self.reports.items():
            count = sum(site.status != "not fused" for site in report)
            lines += ["", f'fuse(model, "{level}"): {count} of {len(report)} Linear', str(report)]
        return "\n".join([*lines, "", *self._table()])

    __repr__ = __str__

    def _table(self) -> Iterator[str]:
        from mlp_ext.bench.rows import as_time

        columns = 4 + self.train
        rows = [["", "time", "speed", "output differs by", "gradients by"][:columns]]
        for timing in self.timings:
            if timing.median_s is not None:
                differences = (timing.output_difference, timing.gradient_difference)
                cells = [timing.name, as_time(timing.median_s), f"{timing.ratio_to_native:.2f}x"]
                cells += ["" if timing.name == "native" else f"{d:.1e}" for d in differences]
                rows.append(cells[:columns])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yield from ("  ".join(map(str.rjust, row, widths)).rstrip() for row in rows)
        for timing in self.timings:
            if timing.left_out:
                yield f"{timing.name} is left out: {timing.left_out}"


def profile(model: nn.Module, *inputs: Any, train: bool = False, rounds: int = 20) -> Profile:
    """What fuse finds in `model`, and native, fused, stack and step measured in turn.

    model is called as model(*inputs); anything with tensors is an output. It is copied and not
    changed: copies are set to evaluation or training, without what fuse did to the model before,
    and torch's random state is restored.

    train=False: forward under no_grad. train=True: a training step: forward, mean squared error of
    the outputs against zeros, zero_grad, backward and an update by SGD; the step is
    mlp_ext.TrainStep, for a model that it supports.

    In each of `rounds` rounds, all are called in turn for 20 ms each, so that a drifting machine
    affects all alike.

    Raises TypeError if `model` is not an nn.Module; RuntimeError if it cannot be copied, or native
    fails on these inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"profile: model must be a torch.nn.Module, got {type_name(model)}")
    from mlp_ext.bench.cases import Setting
    from mlp_ext.bench.machine import device_name, now
    from mlp_ext.bench.runner import in_turn, summarize
    from mlp_ext.bench.work import Work

    inputs = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, inputs)
    tensors = [value for value in tree_leaves(inputs) if isinstance(value, Tensor)]
    device = next((t.device for t in [*tensors, *model.parameters()]), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        native = unfuse(_copy(model)).train(train)
        native.zero_grad(set_to_none=True)
        _check_call(native, inputs, train)
        reports = {level: fusion_report(native, level) for level in LEVELS}
        variants, left_out = {"native": _copy(native)}, {}
        for level, name in LEVEL_NAMES.items():
            if any(site.status != "not fused" for site in reports[level]):
                variants[name] = fuse(_copy(native), level)
            else:
                left_out[name] = "nothing to fuse"
        results = {name: _results(copy, inputs, train) for name, copy in variants.items()}
        calls = {name: _call(copy, inputs, train) for name, copy in variants.items()}
        if train:
            try:
                results["step"] = _step_results(native, inputs)
                calls["step"] = _step(_copy(native), inputs, lr=0.0)
            except (TypeError, ValueError, RuntimeError) as error:
                left_out["step"] = _first_line(error)
        setting = Setting("profile", "", device=device.type, threads=torch.get_num_threads())
        works = {name: Work(partial(_same, call), dict) for name, call in calls.items()}
        seconds = summarize(in_turn(works, rounds, partial(now, setting)))

    expected = results["native"]

    def timing(name: str) -> Timing:
        if name in left_out:
            return Timing(name, left_out[name])
        outputs, gradients = results[name]
        compared = [_loss(expected[0])] if name == "step" else expected[0]
        differences = (_difference(outputs, compared), _difference(gradients, expected[1]))
        return Timing(name, "", *seconds[name], *differences)

    return Profile(
        type(native).__name__,
        [list(t.shape) for t in tensors],
        train,
        device.type,
        device_name(device.type),
        setting.threads,
        reports,
        [timing(name) for name in ("native", *LEVEL_NAMES.values(), "step")[: 3 + train]],
    )


Results = tuple[list[Tensor], list[Tensor]]  # outputs, or TrainStep's loss; gradients
Call = Callable[[], Tensor]


def _same(call: Call, turn: int) -> Call:
    return call


def _copy(model: nn.Module) -> nn.Module:
    try:
        return deepcopy(model)
    except Exception as error:
        message = f"profile: the model cannot be copied by copy.deepcopy: {_first_line(error)}"
        raise RuntimeError(message) from error


def _check_call(native: nn.Module, inputs: Sequence[Any], train: bool) -> None:
    """Raises RuntimeError unless it works; initializes lazy modules."""
    try:
        _results(native, inputs, train)
    except Exception as error:
        sizes = ", ".join(
            str([*value.shape]) if isinstance(value, Tensor) else type_name(value)
            for value in inputs
        )
        what = "be trained on" if train else "be called with"
        message = f"profile: the model cannot {what} {sizes}: {_first_line(error)}"
        raise RuntimeError(message) from error


def _outputs(value: object) -> list[Tensor]:
    """The floating-point tensors in what a model returned."""
    leaves = tree_leaves(value)
    found = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise TypeError(f"it returns no floating-point tensor, but a {type_name(value)}")
    return found


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    """The mean squared error against zeros."""
    losses = [nn.functional.mse_loss(output, torch.zeros_like(output)) for output in outputs]
    return sum(losses[1:], losses[0])


def _results(model: nn.Module, inputs: Sequence[Any], train: bool) -> Results:
    torch.manual_seed(0)  # the same masks of dropout for all
    with torch.set_grad_enabled(train):
        outputs = _outputs(model(*inputs))
        if not train:
            return outputs, []
        _loss(outputs).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return [output.detach() for output in outputs], gradients


def _call(model: nn.Module, inputs: Sequence[Any], train: bool) -> Call:
    """What is timed: forward, or a step with lr=0, so that all steps are of the same weights."""
    if not train:
        forward: Call = torch.no_grad()(lambda: model(*inputs))
        return forward
    from mlp_ext.bench.training import sgd_step

    with torch.no_grad():
        output = model(*inputs)
    target, criterion = None, lambda output, target: _loss(_outputs(output))
    if isinstance(output, Tensor):
        target, criterion = torch.zeros_like(output), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step: Any = sgd_step
    return partial(step(lambda inputs: model(*inputs), criterion, optimizer), inputs, target)


def _step(model: nn.Module, inputs: Sequence[Any], lr: float) -> Call:
    """mlp_ext.TrainStep of the model; raises what that raises."""
    if len(inputs) != 1:
        raise ValueError(f"TrainStep takes one input, not {len(inputs)}")
    step = TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=lr))
    (input,) = inputs
    with torch.no_grad():
        return partial(step, input, torch.zeros_like(model(input)))


def _step_results(native: nn.Module, inputs: Sequence[Any]) -> Results:
    copy = _copy(native)
    loss = _step(copy, inputs, CHECKED_LR)()
    pairs = zip(native.parameters(), copy.parameters(), strict=True)
    return [loss], [(p.detach() - q.detach()) / CHECKED_LR for p, q in pairs]


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest |difference| / largest |expected|, finite numbers."""
    differences, values = [torch.zeros(1)], [torch.zeros(1)]
    for a, b in zip(found, expected, strict=True):
        a, b = a.double().cpu().flatten(), b.double().cpu().flatten()
        differences.append((a - b).masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0).abs())
        values.append(b[b.isfinite()].abs())
    difference, largest = (torch.cat(tensors).max().item() for tensors in (differences, values))
    return difference / largest if largest else difference


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
