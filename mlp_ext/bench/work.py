"""Sets up what is timed: a case for every mode and provider."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import cache, partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlp_ext import _C
from mlp_ext.bench.cases import Case, Layer, Net, Nets, Setting, networks
from mlp_ext.bench.providers import Function, Provider
from mlp_ext.bench.training import OPTIMIZERS, make_mlp

Call = Callable[[], Tensor]
SETS = 4  # sets of random inputs, fewer if they are large
SET_BYTES = 2**28  # in total
LEARNING_RATE = 0.01
# Optimizer options while results are compared: a large lr, so that updates exceed the rounding of
# weights; a large eps, so that updates are proportional to gradients, whose sign may be a rounding
# error.
CHECKED = {"eps": 1.0, "weight_decay": 0.0}
CHECKED_RATE = 1e4  # times LEARNING_RATE
# Of a call that runs several steps: at most so many FLOPs, and steps of one network.
CALL_OPERATIONS = 2 * 10**9
CALL_STEPS = 10**6


class Work(NamedTuple):
    """One provider's part in a case."""

    prepare: Callable[[int], Call]  # the call to time, on the inputs of that round
    results: Callable[[], dict[str, Tensor]]  # results of one call, to compare with native's
    steps: int = 1  # steps per call
    rounds_to: str | None = None  # see Provider


def set_up(case: Case, setting: Setting) -> Callable[[Provider], Work]:
    """Draws the inputs of a case, the same for every provider that is then set up.

    Raises RuntimeError if out of memory.
    """
    generator = torch.Generator(setting.device).manual_seed(0)
    kind = {"device": setting.device, "dtype": setting.torch_dtype}
    draw = partial(torch.randn, generator=generator, **kind)
    if isinstance(case, Layer):
        return _layer(case, setting, draw)
    return _networks(case, setting, draw)


def _layer(
    case: Layer, setting: Setting, draw: Callable[..., Tensor]
) -> Callable[[Provider], Work]:
    M, K, N = case
    learns = setting.mode != "forward"
    weight = draw(N, K).mul_(K**-0.5)
    bias = draw(N).mul_(K**-0.5)
    bytes_of_a_set = (M * K + M * N) * weight.element_size()
    sets = [(draw(M, K), draw(M, N)) for _ in range(max(1, min(SETS, SET_BYTES // bytes_of_a_set)))]

    def start(provider: Provider) -> Work:
        function = provider.make(setting)
        # Own leaves on shared memory: graphs must not see each other's gradients.
        w, b, *x = (
            t.detach().requires_grad_(learns) for t in (weight, bias, *(input for input, _ in sets))
        )

        def call(i: int) -> Call:
            return MODES[setting.mode](function, [x[i], w, b], sets[i][1])

        if provider.path and setting.device == "cpu":
            call = partial(_forced, call, provider.path)
        elif provider.captured:
            leaves = [[x[i], w, b] for i in range(len(sets))]
            call = cache(lambda i, make=call: _captured(partial(make, i), leaves[i], provider.path))

        def prepare(turn: int) -> Call:
            if setting.device == "cpu":
                return call(turn % len(sets))
            calls = cycle([call(i) for i in range(len(sets))])  # so that inputs are not in L2
            return lambda: next(calls)()

        def results() -> dict[str, Tensor]:
            output = call(0)()
            leaves = {"input": x[0], "weight": w, "bias": b}
            found = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
            return {"output": output, **{k: v for k, v in found.items() if v is not None}}

        return Work(prepare, results)

    return start


def _forward(function: Function, leaves: list[Tensor], grad_output: Tensor) -> Call:
    """Nothing requires a gradient."""
    return partial(function, *leaves)


def _backward(function: Function, leaves: list[Tensor], grad_output: Tensor) -> Call:
    """The forward pass is not timed."""
    output = function(*leaves)

    def call() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        output.backward(grad_output, retain_graph=True)
        return output

    return call


def _full(function: Function, leaves: list[Tensor], grad_output: Tensor) -> Call:
    """Forward and backward, with the gradient of the input."""

    def call() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        output = function(*leaves)
        output.backward(grad_output)
        return output

    return call


def _forced(call: Callable[[int], Call], path: str, i: int) -> Call:
    """By this path of the CPU, forward and backward, where it takes them."""

    def forced() -> Tensor:
        _C.force_paths(path, path)
        try:
            return run()
        finally:
            _C.force_paths(None, None)

    run = call(i)
    return forced


def _captured(make: Callable[[], Call], leaves: list[Tensor], path: str | None) -> Call:
    """Captures the call as a CUDA graph; output and gradients stay in the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    _C.force_cuda_path(path)
    try:
        with torch.cuda.stream(stream):
            eager = make()
            for _ in range(3):  # libraries allocate their workspaces in the first calls
                eager()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = eager()
    finally:
        _C.force_cuda_path(None)
    gradients = [leaf.grad for leaf in leaves]

    def call() -> Tensor:
        graph.replay()
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        return output

    return call


MODES = {"full": _full, "forward": _forward, "backward": _backward}


def _networks(
    case: Net | Nets, setting: Setting, draw: Callable[..., Tensor]
) -> Callable[[Provider], Work]:
    E = networks(case)
    models = [
        make_mlp(case.widths, seed, setting.activation).to(setting.device, setting.torch_dtype)
        for seed in range(E)
    ]
    rates = [LEARNING_RATE * (1 + i / E) for i in range(E)]  # of each network its own
    sets = [
        (draw(case.batch, case.widths[0]), draw(case.batch, case.widths[-1]).sigmoid_())
        for _ in range(SETS)
    ]
    several = min(1000, CALL_STEPS // E, CALL_OPERATIONS // case.operations(setting.mode))

    def start(provider: Provider) -> Work:
        copies = deepcopy(models)
        parameters: list[Tensor] = [p for model in copies for p in model.parameters()]
        options = provider.options(setting)
        optimizers = [
            OPTIMIZERS[setting.optimizer](model.parameters(), lr=lr, **options)
            for model, lr in zip(copies, rates, strict=True)
        ]
        parts = (copies, optimizers) if isinstance(case, Nets) else (copies[0], optimizers[0])
        step = provider.make(parts[0], nn.MSELoss(), parts[1])
        epochs = {"epochs": int(max(4, several))} if provider.has_epochs else {}

        def prepare(turn: int) -> Call:
            return partial(step, *sets[turn % SETS], **epochs)

        def results() -> dict[str, Tensor]:
            """All updates in one tensor (16-bit rounding may erase single ones); undoes them."""
            before = [p.detach().clone() for p in parameters]
            states = [(t, t.clone()) for t in _states(optimizers)]
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            usual = [dict(group) for group in groups]
            for group in groups:
                checked = {name: value for name, value in CHECKED.items() if name in group}
                group.update(checked, lr=CHECKED_RATE * group["lr"])
            load: Callable[[], None] = getattr(step, "load", lambda: None)  # of peers with copies
            load()
            losses = _as_tensor(step(*sets[0])).flatten()
            getattr(step, "save", lambda: None)()
            for group, options in zip(groups, usual, strict=True):
                group.update(options)
            after = [p.detach().clone() for p in parameters]
            changes = [(a - b).flatten() for a, b in zip(after, before, strict=True)]
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)
                found = {id(t): old for t, old in states}
                for t in _states(optimizers):
                    t.copy_(found[id(t)]) if id(t) in found else t.zero_()
            load()
            return {"loss": losses, "change of the weights": torch.cat(changes)}

        return Work(prepare, results, E * epochs.get("epochs", 1), provider.rounds_to)

    return start


def _as_tensor(loss: Any) -> Tensor:
    """A loss, or those of many networks, each of which may be a tensor or a JAX array."""
    if isinstance(loss, list):
        return torch.stack([_as_tensor(one) for one in loss])
    numbers = loss.tolist() if hasattr(loss, "tolist") else loss
    return torch.tensor(numbers, dtype=torch.float64)


def _states(optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [t for state in states for t in state.values() if t is not None]
