"""A fused model keeps nothing alive, and what it has cached belongs to it alone."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from models import EXAMPLES
from torch import Tensor, nn

import mlp_ext

pytestmark = pytest.mark.usefixtures("one_thread", "small_heap")

close = torch.testing.assert_close
WIDTH = 8


def sequential() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)]
    return nn.Sequential(*layers)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sequential": sequential,
    "nested": lambda: nn.Sequential(sequential(), nn.ReLU()),
    "code": EXAMPLES["Functional"].model,
    "loop": EXAMPLES["Loop"].model,
}
LEVELS = ["layers", "stack"]
fused_models = [
    pytest.mark.parametrize("level", LEVELS),
    pytest.mark.parametrize("make", MODELS.values(), ids=MODELS),
]


def every_model(test: Callable[..., None]) -> Callable[..., None]:
    for mark in fused_models:
        test = mark(test)
    return test


def x() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def used(make: Callable[[], nn.Module], level: str) -> nn.Module:
    """Fused, and called with and without gradients."""
    model = mlp_ext.fuse(make(), level=level)
    with torch.no_grad():
        model(x())
    model(x()).sum().backward()
    return model


def linear(model: nn.Module) -> nn.Linear:
    return next(m for m in model.modules() if isinstance(m, nn.Linear))


# What is freed


@every_model
def test_model_children_and_parameters_are_freed(make: Callable[[], nn.Module], level: str) -> None:
    model = used(make, level)
    parts = [*model.modules(), *model.parameters()]
    seen = [weakref.ref(part) for part in parts]
    del model, parts
    gc.collect()
    assert [ref() for ref in seen if ref() is not None] == []


@every_model
def test_copies_are_freed(make: Callable[[], nn.Module], level: str) -> None:
    model = used(make, level)
    twin = copy.deepcopy(model)
    twin(x())
    seen = [weakref.ref(part) for part in (twin, *twin.parameters())]
    del twin
    gc.collect()
    assert [ref() for ref in seen if ref() is not None] == []
    close(model(x()), make()(x()))


@every_model
def test_replaced_weight_is_freed(make: Callable[[], nn.Module], level: str) -> None:
    model = used(make, level)
    layer = linear(model)
    old = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.ones_like(layer.weight))
    gc.collect()
    assert old() is None


@every_model
def test_replaced_child_is_freed(make: Callable[[], nn.Module], level: str) -> None:
    model = used(make, level)
    parent = next(m for m in model.modules() if linear(model) in m.children())
    name = next(name for name, child in parent.named_children() if child is linear(model))
    old = weakref.ref(linear(model)), weakref.ref(linear(model).weight)
    setattr(parent, name, nn.Linear(*linear(model).weight.shape[::-1]))
    gc.collect()
    assert [ref() for ref in old] == [None, None]


@every_model
def test_outputs_and_their_graph_are_freed(make: Callable[[], nn.Module], level: str) -> None:
    model = used(make, level)
    data = x().requires_grad_()
    output = model(data)
    seen = weakref.ref(data), weakref.ref(output)
    del data, output
    assert [ref() for ref in seen] == [None, None]  # at once, without the collector


@pytest.mark.parametrize("ran", [False, True])
def test_step_kept_on_its_model_is_freed(ran: bool) -> None:
    model = sequential()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.step = mlp_ext.TrainStep(model, nn.MSELoss(), optimizer)
    if ran:
        model.step(x(), torch.zeros(5, 4))
    seen = [weakref.ref(part) for part in (model, model.step, optimizer, *model.parameters())]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in seen if ref() is not None] == []


# What belongs to one model


@every_model
def test_replica_computes_with_its_own_weights(make: Callable[[], nn.Module], level: str) -> None:
    """As DataParallel makes replicas: each module a copy of __dict__, then other parameters."""

    def replica(module: nn.Module) -> nn.Module:
        made = module._replicate_for_data_parallel()
        made._modules = {name: replica(child) for name, child in module._modules.items()}
        made._parameters = {
            name: p if p is None else nn.Parameter(torch.zeros_like(p))
            for name, p in module._parameters.items()
        }
        return made

    model = used(make, level)
    expected = model(x())
    assert not replica(model)(x()).any()
    close(model(x()), expected)


@every_model
def test_shallow_copy(make: Callable[[], nn.Module], level: str) -> None:
    model = used(make, level)
    twin = copy.copy(model)
    close(twin(x()), model(x()))
    expected = model(x())
    twin._modules = copy.deepcopy(model._modules)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not twin(x()).any()
    close(model(x()), expected)


@every_model
def test_threads_share_a_model(make: Callable[[], nn.Module], level: str) -> None:
    model, results = mlp_ext.fuse(make(), level=level), []

    def run() -> None:
        for _ in range(20):
            results.append(model(x()))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = make()(x())
    assert len(results) == 80
    for result in results:
        close(result, expected)


# How parameters may be replaced


def swapped(model: nn.Module) -> None:
    for p in [*model.parameters()]:
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 0.5))


def swapped_on_conversion(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        model.float()
        model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def assigned(model: nn.Module) -> None:
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}, assign=True)


def emptied(model: nn.Module) -> None:
    state = {k: v * 0.5 for k, v in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)


def data_replaced(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 0.5


def vector(model: nn.Module) -> None:
    nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()) * 0.5, model.parameters()
    )


def parameters_by_name(model: nn.Module) -> None:
    for name, p in [*model.named_parameters()]:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(p.detach() * 0.5))


REPLACED = [swapped, swapped_on_conversion, assigned, emptied]
REPLACED += [data_replaced, vector, parameters_by_name]


@every_model
@pytest.mark.parametrize("replace", REPLACED, ids=lambda f: f.__name__)
def test_replaced_parameters(
    make: Callable[[], nn.Module], level: str, replace: Callable[[nn.Module], None]
) -> None:
    native, model = make(), mlp_ext.fuse(make(), level=level)
    with torch.no_grad():
        model(x())
    for m in (native, model):
        replace(m)
        m.zero_grad()
        m(x()).square().sum().backward()
    close(model(x()), native(x()))
    gradients = [{name: p.grad for name, p in m.named_parameters()} for m in (model, native)]
    close(*gradients)
