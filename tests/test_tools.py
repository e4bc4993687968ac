"""PyTorch's own tools on fused models: each gives what it gives on the native model."""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import EXAMPLES
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as torch_module
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

import mlp_ext

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*treespec:FutureWarning"),
]

close = torch.testing.assert_close
Model = Callable[[Tensor], Any]


def sequential() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


MODELS = {
    "sequential": sequential,
    "functional": EXAMPLES["Functional"].model,
    "methods": EXAMPLES["Methods"].model,
    "loop": EXAMPLES["Loop"].model,
}


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def x(count: int = 5) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, function: Model | None = None) -> list[Any]:
    """The output, and the gradients of input and parameters."""
    model.zero_grad()
    data = x().requires_grad_()
    output = (model if function is None else function)(data)
    output.float().square().sum().backward()
    return [output, data.grad, *(p.grad for p in model.parameters())]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x()).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)  # type: ignore[arg-type]
    return [p.detach() for p in model.parameters()]


# Compilers and exporters


def compiled(**options: Any) -> Callable[[nn.Module], Any]:
    def run(model: nn.Module) -> Any:
        function = torch.compile(model, **{"fullgraph": True, "backend": "aot_eager", **options})
        return gradients(model, function), function(x(7)), function(x(2))

    return run


def exported(strict: bool) -> Callable[[nn.Module], Any]:
    def run(model: nn.Module) -> Any:
        shapes = ({0: torch.export.Dim("batch", min=2)},)
        program = torch.export.export(model, (x(),), dynamic_shapes=shapes, strict=strict)
        module = program.run_decompositions().module()
        return module(x()), module(x(9))

    return run


def compiled_step(model: nn.Module) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    @torch.compile(backend="aot_eager")
    def step() -> None:
        optimizer.zero_grad()
        model(x()).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step()
    return [p.detach() for p in model.parameters()]


def traced_functions(model: nn.Module) -> Any:
    graph = make_fx(lambda data: model(data).square().sum())(x())
    return graph(x()), graph(2 * x())


# Derivatives


def functional(model: nn.Module) -> Any:
    state = {name: p.detach() for name, p in model.named_parameters()}

    def loss(state: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, state, (row,)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x())


def jacobians(model: nn.Module) -> Any:
    row = x(1)[0]
    return [f(model)(row) for f in (torch.func.jacrev, torch.func.jacfwd)]


def hessian(model: nn.Module) -> Any:
    return torch.func.hessian(lambda row: model(row).square().sum())(x(1)[0])


def ensemble(model: nn.Module) -> Any:
    models = [copy.deepcopy(model) for _ in range(3)]
    for index, each in enumerate(models):
        with torch.no_grad():
            for p in each.parameters():
                p.mul_(1 + index)
    parameters, buffers = torch.func.stack_module_state(models)

    def call(parameters: Any, buffers: Any, data: Tensor) -> Any:
        return torch.func.functional_call(model, (parameters, buffers), (data,))

    return torch.func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x())


def tangent(model: nn.Module) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x(), torch.ones(5, 8)))).tangent


def gradient_penalty(model: nn.Module) -> Any:
    data = x().requires_grad_()
    (slope,) = torch.autograd.grad(model(data).sum(), data, create_graph=True)
    model.zero_grad()
    (slope.norm(dim=-1) - 1).square().mean().backward()
    return [slope, *(p.grad for p in model.parameters())]


def jacobian_vector(model: nn.Module) -> Any:
    return torch.autograd.functional.jacobian(model, x(2)), torch.autograd.functional.vjp(
        model, x(), torch.ones_like(model(x()))
    )


# Memory


def checkpointed(reentrant: bool) -> Callable[[nn.Module], Any]:
    return lambda model: gradients(model, lambda d: checkpoint(model, d, use_reentrant=reentrant))


def checkpointed_parts(model: nn.Module) -> Any:
    if not isinstance(model, nn.Sequential):
        return checkpointed(False)(model)
    return gradients(model, lambda d: checkpoint_sequential(model, 2, d, use_reentrant=False))


def saved_on_cpu(model: nn.Module) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return gradients(model)


def packed(model: nn.Module) -> Any:
    with saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        return gradients(model)


def optimizer_in_backward(model: nn.Module) -> Any:
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    for _ in range(3):
        model(x()).square().sum().backward()
    for handle in handles:
        handle.remove()
    return [p.detach().clone() for p in model.parameters()]


# Modes and precision


def in_autocast(dtype: torch.dtype) -> Callable[[nn.Module], Any]:
    def run(model: nn.Module) -> Any:
        with torch.autocast("cpu", dtype):
            return tree_map(lambda t: t.float(), gradients(model))

    return run


def scaled(model: nn.Module) -> Any:
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(model(x()).square().sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return [p.detach() for p in model.parameters()]


def anomaly(model: nn.Module) -> Any:
    with torch.autograd.set_detect_anomaly(True):
        return gradients(model)


def inference(model: nn.Module) -> Any:
    with torch.inference_mode():
        inside = model(x())
    with torch.no_grad():
        outputs = [inside.clone(), model(x())]
    return outputs, gradients(model)


def seen_by_modes(model: nn.Module) -> Any:
    class Functions(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return f(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return f(*args, **(kwargs or {}))

    with Functions(), Operators():
        return gradients(model)


def flops(model: nn.Module) -> Any:
    with FlopCounterMode(display=False) as counter:
        gradients(model)
    return counter.get_total_flops()


def global_hooks(model: nn.Module) -> Any:
    seen: list[Any] = []
    handle = torch_module.register_module_forward_hook(
        lambda m, args, y: seen.append({type(m).__name__: y.detach()})
    )
    try:
        return gradients(model), seen
    finally:
        handle.remove()


# Initialization, copies, ensembles, threads


def from_meta(model: nn.Module) -> Any:
    empty = copy.deepcopy(model).to("meta")
    assert empty(x().to("meta")).is_meta
    loaded = empty.to_empty(device="cpu")
    loaded.load_state_dict(model.state_dict())
    return gradients(loaded)


def averaged(model: nn.Module) -> Any:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        trained(model, optimizer, 1)
        average.update_parameters(model)
    return average(x()), model(x())


def shared(model: nn.Module) -> Any:
    """Hogwild: threads that train one model in shared memory, here one after the other."""
    model.share_memory()
    for _ in range(2):
        thread = threading.Thread(target=gradients, args=(model,))
        thread.start()
        thread.join()
    return gradients(model)


def data_parallel(model: nn.Module) -> Any:
    return gradients(model, nn.DataParallel(model))


def lbfgs(model: nn.Module) -> Any:
    return trained(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3), 2)


def foreach_adam(model: nn.Module) -> Any:
    return trained(model, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True))


ACTIONS: dict[str, Callable[[nn.Module], Any]] = {
    "compile": compiled(),
    "compile_dynamic": compiled(dynamic=True),
    "compile_eager": compiled(backend="eager"),
    "compile_step": compiled_step,
    "export": exported(strict=False),
    "export_strict": exported(strict=True),
    "make_fx": traced_functions,
    "fx": lambda m: torch.fx.symbolic_trace(m)(x()),
    "jit_trace": lambda m: torch.jit.trace(m, x())(2 * x()),
    "vmap_of_grad": functional,
    "jacobians": jacobians,
    "hessian": hessian,
    "ensemble": ensemble,
    "forward_ad": tangent,
    "double_backward": gradient_penalty,
    "autograd_functional": jacobian_vector,
    "checkpoint": checkpointed(False),
    "checkpoint_reentrant": checkpointed(True),
    "checkpoint_sequential": checkpointed_parts,
    "save_on_cpu": saved_on_cpu,
    "saved_tensor_hooks": packed,
    "optimizer_in_backward": optimizer_in_backward,
    "autocast_bfloat16": in_autocast(torch.bfloat16),
    "autocast_float16": in_autocast(torch.float16),
    "grad_scaler": scaled,
    "bfloat16": lambda m: m.bfloat16()(x().bfloat16()).float(),
    "float64": lambda m: m.double()(x().double()),
    "anomaly": anomaly,
    "inference": inference,
    "modes": seen_by_modes,
    "flops": flops,
    "global_hooks": global_hooks,
    "meta": from_meta,
    "averaged_model": averaged,
    "shared_memory": shared,
    "data_parallel": data_parallel,
    "lbfgs": lbfgs,
    "foreach": foreach_adam,
}
LOOSE = {"autocast_bfloat16": 3e-2, "autocast_float16": 3e-3, "bfloat16": 3e-2}


def _marks(name: str, model: str, level: str) -> list[pytest.MarkDecorator]:
    """Dynamo takes half a second, AOTAutograd seconds: both with one of the models alone."""
    if name in ("compile_eager", "export", "export_strict"):
        is_quick = name != "export_strict" and (model, level) == ("sequential", "stack")
        return [] if is_quick else [pytest.mark.slow]
    if name in ("compile", "compile_dynamic", "compile_step"):
        return [pytest.mark.slow if model in ("sequential", "functional") else pytest.mark.release]
    return []


@pytest.mark.parametrize(
    ("name", "make", "level"),
    [
        pytest.param(
            name, make, level, id=f"{name}-{model}-{level}", marks=_marks(name, model, level)
        )
        for name in ACTIONS
        for model, make in MODELS.items()
        for level in ("layers", "stack")
    ],
)
def test_tool(name: str, make: Callable[[], nn.Module], level: str) -> None:
    native, fused = make(), mlp_ext.fuse(make(), level=level)
    gradients(fused)  # it has run before
    fused.zero_grad()
    expected = ACTIONS[name](native)
    torch._dynamo.reset()
    result = ACTIONS[name](fused)
    tolerance = LOOSE.get(name, 1e-5)
    close(result, expected, rtol=10 * tolerance, atol=tolerance)
    if name not in ("bfloat16", "float64"):
        close(gradients(fused), gradients(native), rtol=10 * tolerance, atol=tolerance)
