"""profile(model, input): what fuse finds in a model, how much the results differ from native's, and
how fast the model gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mlp_ext.errors import check_tensor
from mlp_ext.fuse import LEVELS, FusionReport, Level, fuse, fusion_report, unfuse
from mlp_ext.nn import type_name
from mlp_ext.step_text import positive
from mlp_ext.train_step import TrainStep

LEVEL_NAMES = dict(zip(LEVELS, ("fused", "stack"), strict=True))  # as `mlp-ext bench` has them
# Learning rate of the one SGD step from whose weight change TrainStep's gradients are computed:
# large, so that rounding of the weights does not matter.
CHECKED_LR = 1e4


@dataclass(frozen=True)
class Timing:
    """The time of one variant of a model, in a `Profile`.

    Attributes:
        name (str): "native", "fused" (`fuse` at level "layers"), "stack", or "step" (`TrainStep`).
        left_out (str): why it was not measured, or "". If not measured, all numbers are None.
        median_s (float): seconds per call, the median over the rounds.
        q20_s (float): the 20% quantile, in seconds.
        q80_s (float): the 80% quantile, in seconds.
        ratio_to_native (float): native's time / this one's, the median over the rounds. Above 1 is
            faster than native.
        ratio_q20 (float): the 20% quantile of the ratio over the rounds.
        ratio_q80 (float): the 80% quantile of the ratio over the rounds.
        output_difference (float): largest |difference| from native's output / largest |value| of
            native's output. For the step, the same for the loss.
        gradient_difference (float): the same for gradients of the parameters; 0 without `train`.

    Examples:
        >>> found = mlp_ext.profile(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8), rounds=1)
        >>> [timing.name for timing in found.timings if timing.left_out]
        ['fused']
    """

    name: str
    left_out: str = ""
    median_s: float | None = None
    q20_s: float | None = None
    q80_s: float | None = None
    ratio_to_native: float | None = None
    ratio_q20: float | None = None
    ratio_q80: float | None = None
    output_difference: float | None = None
    gradient_difference: float | None = None


@dataclass(frozen=True, repr=False)
class Profile:
    """The result of `profile`. Prints as text with tables.

    Attributes:
        model (str): the class of the model.
        inputs (list of list of int): the shape of each input.
        train (bool): whether training steps were measured, or forward.
        device (str): "cpu" or "cuda".
        device_name (str): the name of the processor or GPU.
        threads (int): `torch.get_num_threads()`.
        reports (dict of str to FusionReport): what `fuse` finds at each level.
        timings (list of Timing): native, fused, stack and, with `train`, step.
        noise (str): why the timings are unreliable, or "".

    Examples:
        >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 1))
        >>> found = mlp_ext.profile(model, torch.randn(64, 20), rounds=1)
        >>> found.model, found.inputs, len(found.reports["layers"])
        ('Sequential', [[64, 20]], 2)
    """

    model: str
    inputs: list[list[int]]
    train: bool
    device: str
    device_name: str
    threads: int
    reports: dict[Level, FusionReport]
    timings: list[Timing]
    noise: str

    def to_dict(self) -> dict[str, Any]:
        """Gives the profile as numbers, strings, lists and dicts, for JSON.

        Returns:
            dict: the attributes by name, with `reports` as lists of sites under "fusion".

        Examples:
            >>> found = mlp_ext.profile(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8), rounds=1)
            >>> found.to_dict()["fusion"]["layers"][0]["reason"]
            'last in its Sequential'
        """
        fusion = {
            level: [asdict(site) for site in report] for level, report in self.reports.items()
        }
        own = {name: value for name, value in vars(self).items() if name != "reports"}
        return {**own, "timings": [asdict(timing) for timing in self.timings], "fusion": fusion}

    def __str__(self) -> str:
        what = "training step" if self.train else "forward"
        sizes = ", ".join("x".join(map(str, size)) or "scalar" for size in self.inputs)
        place = f"{self.threads} CPU threads" if self.device == "cpu" else self.device
        lines = [f"{self.model}, {what} of {sizes} on {self.device_name}, {place}"]
        for level, report in self.reports.items():
            count = sum(site.status != "not fused" for site in report)
            layers = f"{count} of {len(report)} Linear layers"
            lines += ["", f'fuse(model, "{level}") fuses {layers}', str(report)]
        return "\n".join([*lines, "", *self._table()])

    __repr__ = __str__

    def _table(self) -> Iterator[str]:
        from mlp_ext.bench.rows import as_number, as_range, as_time

        columns = 5 + self.train
        rows = [["", "time", "speed", "20-80%", "output diff", "gradient diff"][:columns]]
        for timing in self.timings:
            if timing.median_s is not None and timing.ratio_to_native is not None:
                differences = (timing.output_difference, timing.gradient_difference)
                compared = [as_range(timing.ratio_q20, timing.ratio_q80)]
                compared += [f"{difference:.1e}" for difference in differences]
                if timing.name == "native":
                    compared = ["", "", ""]
                speed = f"{as_number(timing.ratio_to_native)}x"
                rows.append([timing.name, as_time(timing.median_s), speed, *compared][:columns])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yield from ("  ".join(map(str.rjust, row, widths)).rstrip() for row in rows)
        for timing in self.timings:
            if timing.left_out:
                yield f"{timing.name} skipped: {timing.left_out}"
        if self.noise:
            yield f"Timings unreliable: {self.noise}"


def profile(model: nn.Module, *inputs: Any, train: bool = False, rounds: int = 20) -> Profile:
    """Measures how much faster a model gets with `fuse`, at both levels, and with `TrainStep`.

    The model is copied and not changed, and PyTorch's random state is restored. In each round, the
    variants take turns of 20 ms, so that drift of the machine affects all alike.

    Args:
        model (nn.Module): the model. If it is fused, the copies are unfused first.
        *inputs: the arguments of the model, usually tensors.
        train (bool): False measures forward in eval mode under no_grad. True measures a training
            step with SGD and the mean squared error of the outputs against zeros, also with
            `TrainStep` if it supports the model. Default: False.
        rounds (int): number of samples per variant. Default: 20.

    Returns:
        Profile: what `fuse` finds, the largest differences from native, and times in seconds.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `rounds` not an int.
        ValueError: `rounds` is not positive.
        RuntimeError: the model cannot be copied, or fails on these inputs.

    Examples:
        >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 1))
        >>> found = mlp_ext.profile(model, torch.randn(64, 20), train=True, rounds=1)
        >>> [timing.name for timing in found.timings]
        ['native', 'fused', 'stack', 'step']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"profile: model must be a torch.nn.Module, got {type_name(model)}")
    from mlp_ext.bench.cases import Setting
    from mlp_ext.bench.machine import cpus, device_name, now, other_cpus
    from mlp_ext.bench.noise import busy, wide
    from mlp_ext.bench.runner import in_turn, summarize
    from mlp_ext.bench.work import Work

    inputs = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, inputs)
    tensors = [value for value in tree_leaves(inputs) if isinstance(value, Tensor)]
    for tensor in tensors:
        check_tensor("profile", "an input", tensor)
    rounds = positive("profile", "rounds", rounds)
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
        others = other_cpus()
        seconds = summarize(in_turn(works, rounds, partial(now, setting)))
        used = others()
    threads = setting.threads if device.type == "cpu" else 1
    spread = wide(
        (name, s.ratio_q20, s.ratio_q80) for name, s in seconds.items() if name != "native"
    )
    noise = "; ".join(filter(None, (busy(used, threads, len(cpus())), spread)))

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
        noise,
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
