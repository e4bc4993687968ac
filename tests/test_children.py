"""fuse changes how a model calls its children, never the children: what is done to one counts.

Each test does the same to a native and to a fused Sequential, before or after it has run.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import mlp_ext

pytestmark = [
    pytest.mark.usefixtures("one_thread", "float64"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.(weight|spectral)_norm`:FutureWarning"),
]

close = torch.testing.assert_close


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


levels = pytest.mark.parametrize("level", ["layers", "stack"])


def native() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 4)
    return nn.Sequential(*layers)


def fused(level: str) -> nn.Sequential:
    return mlp_ext.fuse(native(), level=level)


def x(count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 8, generator=generator)


def results(model: nn.Module) -> dict[str, Any]:
    model.zero_grad()
    data = x().requires_grad_()
    output = model(data)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output, "input": data.grad, **gradients}


# Children stay what they were


@levels
def test_children_keep_identity_type_and_keys(level: str) -> None:
    model = native()
    before = [(name, id(child), type(child)) for name, child in model.named_modules()][1:]
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    text = repr(model)
    mlp_ext.fuse(model, level=level)(x())
    assert [(name, id(child), type(child)) for name, child in model.named_modules()][1:] == before
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert isinstance(model, nn.Sequential) and repr(model) == text
    assert [*model.state_dict()] == [name for name, _ in parameters]


PARTS: dict[str, Callable[[nn.Sequential], Tensor]] = {
    "first": lambda m: m[0](x()),
    "activation": lambda m: m[1](x()),
    "slice_after_linear": lambda m: m[:1](x()),
    "slice_after_activation": lambda m: m[:2](x()),
    "slice_from_activation": lambda m: m[1:](m[0](x())),
    "tail": lambda m: m[3:](torch.ones(5, 16) - 2),
    "loop": lambda m: [y := x(), *[y := child(y) for child in m]][-1],
    "another_sequential": lambda m: nn.Sequential(*m[:3])(x()),
    "without_the_head": lambda m: nn.Sequential(*[*m.children()][:-1])(x()),
    "module_list": lambda m: nn.ModuleList(m)[0](x()),
    "submodule": lambda m: m.get_submodule("2")(torch.ones(5, 16)),
    "functional_call": lambda m: torch.func.functional_call(
        m[:3], {k: 2 * v for k, v in m[:3].state_dict().items()}, (x(),)
    ),
    "sum": lambda m: (m[:2] + m[2:])(x()),
    "forward": lambda m: m.forward(x()),
}


@levels
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts(level: str, part: Callable[[nn.Sequential], Tensor], ran_before: bool) -> None:
    model = fused(level)
    if ran_before:
        model(x())
    close(part(model), part(native()))


@levels
def test_inputs_and_outputs_that_hooks_see(level: str) -> None:
    """Feature extraction: the output of the Linear is the value before the activation."""
    seen: list[list[Tensor]] = []
    for model in (native(), fused(level)):
        model(x())
        values: list[Tensor] = []
        for child in model:
            child.register_forward_hook(lambda m, args, y, v=values: v.extend([args[0], y]))
        model(x())
        seen.append(values)
    assert len(seen[0]) == 10
    close(seen[1], seen[0])


@levels
def test_factors_of_curvature(level: str) -> None:
    """K-FAC: the input of each Linear, and the gradient of its output before the activation."""
    factors: list[dict[str, Tensor]] = []
    for model in (native(), fused(level)):
        model(x())
        found: dict[str, Tensor] = {}

        def add(module: nn.Module, args: Any, name: str, found: dict[str, Tensor] = found) -> None:
            found[name] = args[0].t() @ args[0]

        for name, child in model.named_modules():
            if isinstance(child, nn.Linear):
                child.register_forward_pre_hook(
                    lambda m, args, n=f"{name}.A", add=add: add(m, args, n)
                )
                child.register_full_backward_hook(
                    lambda m, _, grads, n=f"{name}.G", add=add: add(m, grads, n)
                )
        model(x().requires_grad_()).square().sum().backward()
        factors.append(found)
    assert len(factors[0]) == 6
    close(factors[1], factors[0])


@levels
def test_traced_by_fx_as_modules(level: str) -> None:
    """torch.fx and the tools on it see each child."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, nn.Linear | nn.ReLU | nn.LeakyReLU)

    outside = nn.Sequential(fused(level))
    graph = Tracer().trace(outside)
    expected = Tracer().trace(nn.Sequential(native()))
    calls = [[n.target for n in g.nodes if n.op == "call_module"] for g in (graph, expected)]
    assert calls[0] == calls[1] and len(calls[0]) == 5
    close(torch.fx.GraphModule(outside, graph)(x()), native()(x()))


# What is done to a child counts from the next call on


class Adapter(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * x.sum(-1, keepdim=True)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Plain(nn.Linear):
    """Computes what nn.Linear computes."""


class Weight(Tensor):
    """A tensor subclass that computes as usual."""


def replace_linear(m: nn.Sequential) -> None:
    m[0] = nn.Linear(8, 16)
    nn.init.constant_(m[0].weight, 0.1)
    nn.init.constant_(m[0].bias, -0.2)


def swap_all_activations(m: nn.Sequential) -> None:
    for key, child in m.named_children():
        if isinstance(child, nn.ReLU):
            setattr(m, key, nn.ELU(0.3))


def convert_all_linears(m: nn.Sequential) -> None:
    """As quantizers and low-rank libraries convert a model."""
    for key, child in m.named_children():
        if isinstance(child, nn.Linear):
            new = Doubled(child.in_features, child.out_features)
            new.load_state_dict(child.state_dict())
            setattr(m, key, new)


def init_by_type(m: nn.Sequential) -> None:
    def init(module: nn.Module) -> None:
        if type(module) == nn.Linear:  # noqa: E721  as in PyTorch's documentation
            nn.init.constant_(module.weight, 0.05)
            module.bias.data.fill_(0.01)

    m.apply(init)


def init_by_name(m: nn.Sequential) -> None:
    for module in m.modules():
        if module.__class__.__name__.find("Linear") != -1:
            nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))


def own_forward(m: nn.Sequential) -> None:
    weight, bias = m[0].weight, m[0].bias
    m[0].forward = lambda input: F.linear(input, 2 * weight, bias)


def own_forward_of_the_activation(m: nn.Sequential) -> None:
    m[1].forward = lambda input: input.abs()


def special_weight(m: nn.Sequential) -> None:
    m[0].weight = nn.Parameter(m[0].weight.detach().as_subclass(Weight))


def frozen(m: nn.Sequential) -> None:
    for p in m[0].parameters():
        p.requires_grad_(False)


def pruned(m: nn.Sequential) -> None:
    prune.l1_unstructured(m[0], "weight", amount=0.5)
    prune.ln_structured(m[2], "weight", amount=2, n=2, dim=0)


def pruned_for_good(m: nn.Sequential) -> None:
    pruned(m)
    prune.remove(m[0], "weight")


def parametrized(m: nn.Sequential) -> None:
    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.triu() + w.triu(1).transpose(-1, -2)

    nn.utils.parametrize.register_parametrization(m[2], "weight", Symmetric())


def without_parametrization(m: nn.Sequential) -> None:
    parametrized(m)
    m(x())
    nn.utils.parametrize.remove_parametrizations(m[2], "weight")


def removed_hook(m: nn.Sequential) -> None:
    handle = m[0].register_forward_hook(lambda module, args, y: y - 0.3)
    m(x())
    handle.remove()


def saturating(m: nn.Sequential) -> None:
    m[3].negative_slope = 0.9


def class_changed(m: nn.Sequential) -> None:
    m[0].__class__ = Doubled


def weight_clipped_after_each_step(m: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    optimizer.register_step_post_hook(
        lambda *_: [p.data.clamp_(-0.1, 0.1) for p in m.parameters()] and None
    )
    for _ in range(3):
        results(m)
        optimizer.step()


def resized(m: nn.Sequential) -> None:
    """More neurons, as networks that grow."""
    with torch.no_grad():
        m[0].weight = nn.Parameter(torch.cat([m[0].weight, torch.ones(4, 8)]))
        m[0].bias = nn.Parameter(torch.cat([m[0].bias, torch.zeros(4)]))
        m[2].weight = nn.Parameter(torch.cat([m[2].weight, torch.ones(16, 4)], 1))


def tied(m: nn.Sequential) -> None:
    m.insert(4, nn.Linear(16, 16))
    m[4].weight = m[2].weight


def data_branch(m: nn.Sequential) -> None:
    m[1].register_forward_pre_hook(lambda module, args: (args[0] * (args[0] > 0.1),))


CHANGES: dict[str, Callable[[Any], object]] = {
    "replace_linear": replace_linear,
    "replace_activation": lambda m: m.__setitem__(1, nn.GELU()),
    "replace_activation_by_unknown": lambda m: m.__setitem__(1, nn.Softsign()),
    "replace_by_module_list": lambda m: m.__setitem__(1, nn.Sequential(nn.Tanh(), nn.ReLU())),
    "replace_by_identity": lambda m: m.__setitem__(3, nn.Identity()),
    "swap_all_activations": swap_all_activations,
    "convert_all_linears": convert_all_linears,
    "adapter": lambda m: m.__setitem__(0, Adapter(m[0])),
    "adapter_around_activation": lambda m: m.__setitem__(1, Adapter(m[1])),
    "adapter_around_each": lambda m: [m.__setitem__(i, Adapter(m[i])) for i in range(5)],
    "plain_subclass": lambda m: setattr(m[0], "__class__", Plain),
    "class_changed": class_changed,
    "init_by_type": init_by_type,
    "init_by_name": init_by_name,
    "reset_parameters": lambda m: [torch.manual_seed(3), m[0].reset_parameters()],
    "hook": lambda m: m[0].register_forward_hook(lambda module, args, y: y - 0.3),
    "hook_on_activation": lambda m: m[1].register_forward_hook(lambda module, args, y: y - 0.3),
    "pre_hook": lambda m: m[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "data_branch": data_branch,
    "backward_hook": lambda m: m[0].register_full_backward_hook(lambda _, g, __: (2 * g[0],)),
    "backward_pre_hook": lambda m: m[1].register_full_backward_pre_hook(lambda _, g: (2 * g[0],)),
    "removed_hook": removed_hook,
    "own_forward": own_forward,
    "own_forward_of_the_activation": own_forward_of_the_activation,
    "weight": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(16, 8))),
    "no_bias": lambda m: setattr(m[0], "bias", None),
    "special_weight": special_weight,
    "weight_data": lambda m: setattr(m[0].weight, "data", torch.ones(16, 8)),
    "parameter_hook": lambda m: m[0].weight.register_hook(lambda g: 3 * g),
    "frozen": frozen,
    "pruned": pruned,
    "pruned_for_good": pruned_for_good,
    "parametrized": parametrized,
    "without_parametrization": without_parametrization,
    "spectral_norm": lambda m: parametrizations.spectral_norm(m[0]).eval(),
    "weight_norm": lambda m: nn.utils.weight_norm(m[0]),
    "orthogonal": lambda m: parametrizations.orthogonal(m[2]),
    "negative_slope": saturating,
    "in_place": lambda m: setattr(m[1], "inplace", True),
    "appended": lambda m: m.append(nn.ReLU()),
    "inserted": lambda m: m.insert(1, nn.LayerNorm(16)),
    "extended": lambda m: m.extend([nn.Sigmoid(), nn.Linear(4, 4, bias=False), nn.ReLU()]),
    "popped": lambda m: m.pop(1),
    "deleted": lambda m: m.__delitem__(3),
    "deleted_slice": lambda m: m.__delitem__(slice(1, 4)),
    "added_by_name": lambda m: m.add_module("last", nn.Tanh()),
    "twice_the_same": lambda m: m.__setitem__(3, m[1]),
    "tied": tied,
    "resized": resized,
    "clipped": weight_clipped_after_each_step,
    "requires_grad": lambda m: m.requires_grad_(False)[0].requires_grad_(),
    "float32_and_back": lambda m: m.float().double(),
    "compiled_child": lambda m: m[0].compile(backend="eager"),
}


@levels
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_counts(level: str, change: Callable[[Any], object], ran_before: bool) -> None:
    models = native(), fused(level)
    for model in models:
        torch.manual_seed(5)
        if ran_before:
            model(x())
        change(model)
    close(results(models[1]), results(models[0]))
    close(results(models[1]), results(models[0]))


@levels
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_before_fuse_and_unfuse_after(level: str, change: Callable[[Any], object]) -> None:
    models = native(), native()
    for model in models:
        torch.manual_seed(5)
        change(model)
    close(results(mlp_ext.fuse(models[1], level=level)), results(models[0]))
    names = [type(child).__name__ for child in models[0].modules()]  # parametrized: other classes
    assert [type(child).__name__ for child in mlp_ext.unfuse(models[1]).modules()] == names
    close(results(models[1]), results(models[0]))


@levels
def test_gradients_arrive_layer_by_layer(level: str) -> None:
    """At level "layers" the last layer's gradients are there before the first layer's are computed,
    so that DDP sends and optimizers in backward free them early."""
    model = fused(level)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda q: order.append((id(q), sum(r.grad is not None for r in model.parameters())))
        )
    for _ in range(2):
        order: list[tuple[int, int]] = []
        model.zero_grad(set_to_none=True)
        model(x()).sum().backward()
        assert sorted(i for i, _ in order) == sorted(id(p) for p in model.parameters())
    if level == "layers":
        layers = [{id(m[0]), id(m[1])} for m in (tuple(c.parameters()) for c in model) if m]
        assert [{order[i][0], order[i + 1][0]} for i in (0, 2, 4)] == layers[::-1]
        assert nodes(model(x())) >= 3


def nodes(y: Tensor) -> int:
    """The nodes of the graph that have parameters of their own."""
    seen, todo, count = set(), [y.grad_fn], 0
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            inputs = [following for following, _ in node.next_functions]
            count += any("AccumulateGrad" in i.name() for i in inputs if i)
            todo += inputs
    return count
