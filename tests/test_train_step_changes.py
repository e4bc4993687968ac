"""What is replaced, shared or broken under a TrainStep or a Sequential is noticed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

import mlp_ext
from mlp_ext import _C


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def append_pop_set(model: nn.Sequential) -> None:
    model.append(nn.Tanh())
    model.pop(3)  # replaces the dict of children
    model[1] = nn.Tanh()


def replace_parameters(model: nn.Sequential) -> None:
    model[0].__dict__["_parameters"] = dict(nn.Linear(4, 3)._parameters)


def replace_children(model: nn.Sequential) -> None:
    model._modules = OrderedDict(nn.Sequential(nn.Linear(4, 2))._modules)


@pytest.mark.parametrize("change", [append_pop_set, replace_parameters, replace_children])
def test_replaced_dicts_are_noticed(change: Callable[[nn.Sequential], None]) -> None:
    x, y = torch.randn(5, 4), torch.rand(5, 2)
    stack = mlp_ext.fuse(network(), level="stack")
    model = network()
    step = mlp_ext.TrainStep(
        model, nn.MSELoss(), torch.optim.SGD([*model.parameters(), torch.zeros(1)], lr=0.0)
    )
    stack(x)
    step(x, y)
    change(stack)
    change(model)
    torch.testing.assert_close(stack(x), nn.Sequential(*stack)(x))
    if change is replace_children:  # the optimizer has none of the new parameters
        with pytest.raises(ValueError, match="none of the model's parameters"):
            step(x, y)
    else:
        torch.testing.assert_close(step(x, y), nn.MSELoss()(model(x), y).detach())


def test_hooks_after_their_dict_was_replaced_are_called() -> None:
    stack, x, calls = mlp_ext.fuse(network(), level="stack"), torch.randn(5, 4), []
    stack(x)
    stack[0]._forward_hooks = OrderedDict()
    stack[0].register_forward_hook(lambda *_: calls.append(1))
    stack(x)
    assert calls


def test_another_class_is_noticed() -> None:
    model = network()
    step = mlp_ext.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.0))
    x, y = torch.randn(5, 4), torch.rand(5, 2)
    step(x, y)
    model[1].__class__ = nn.Tanh
    torch.testing.assert_close(step(x, y), nn.MSELoss()(model(x), y).detach())


def test_symbolic_trace_of_a_new_stack() -> None:
    stack, x = mlp_ext.fuse(network(), level="stack"), torch.randn(5, 4)
    assert torch.equal(torch.fx.symbolic_trace(stack)(x), stack(x))


def test_bias_of_a_layer_without_inputs_learns() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 600)).double()
    eager = deepcopy(model)
    x, y = torch.randn(8, 4).double(), torch.randn(8, 600).double()
    mlp_ext.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=1.0))(x, y)
    nn.MSELoss()(eager(x), y).backward()
    torch.optim.SGD(eager.parameters(), lr=1.0).step()
    torch.testing.assert_close(model[1].bias, eager[1].bias)


def overlapping(model: nn.Sequential, optimizer: torch.optim.SGD) -> None:
    model[0].weight.data = torch.ones(1).expand(3, 4)


def listed_momentum(model: nn.Sequential, optimizer: torch.optim.SGD) -> None:
    optimizer.state[model[0].weight]["momentum_buffer"] = [1.0]


def listed_state(model: nn.Sequential, optimizer: torch.optim.SGD) -> None:
    optimizer.state = [1.0]


def number_as_state(model: nn.Sequential, optimizer: torch.optim.SGD) -> None:
    optimizer.state[model[0].weight] = 7


def text_as_lr(model: nn.Sequential, optimizer: torch.optim.SGD) -> None:
    optimizer.param_groups[0]["lr"] = "0.1"


def number_as_step(model: nn.Sequential, optimizer: torch.optim.Adam) -> None:
    optimizer.state[model[0].weight]["step"] = 1


def number_as_betas(model: nn.Sequential, optimizer: torch.optim.Adam) -> None:
    optimizer.param_groups[0]["betas"] = 0.9


def tuple_of_groups(model: nn.Sequential, optimizer: torch.optim.SGD) -> None:
    optimizer.param_groups = tuple(optimizer.param_groups)


def tuple_of_parameters(model: nn.Sequential, optimizer: torch.optim.SGD) -> None:
    optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (overlapping, "more than one element"),
        (listed_momentum, "momentum_buffer in optimizer.state must be a tensor, got list"),
        (listed_state, "optimizer.state must be a dict, got list"),
        (number_as_state, "entry in optimizer.state must be a dict, got int"),
        (text_as_lr, "optimizer.param_groups has lr = str; it must be a number"),
        (number_as_step, "step in optimizer.state must be a tensor, got int"),
        (number_as_betas, "optimizer.param_groups has betas = float; it must be a tuple of 2 num"),
        (tuple_of_groups, "param_groups is a builtins.tuple; make it a list"),
        (tuple_of_parameters, r"param_groups\[0\]\['params'\] is a builtins.tuple"),
    ],
)
def test_what_cannot_be_updated_changes_nothing(
    breaks: Callable[[nn.Sequential, torch.optim.Optimizer], None], message: str
) -> None:
    model = network()
    if breaks in (number_as_step, number_as_betas):
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = mlp_ext.TrainStep(model, nn.MSELoss(), optimizer)
    breaks(model, optimizer)
    before = deepcopy(model.state_dict())
    with pytest.raises((RuntimeError, TypeError), match=message):
        step(torch.randn(5, 4), torch.rand(5, 2))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_inference_tensors_change_nothing() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    before = model.weight.clone()
    step = mlp_ext.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="inference tensor"):
        step(torch.randn(4, 3), torch.randn(4, 2))
    assert torch.equal(model.weight, before)


def test_input_in_a_parameters_memory_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    step = mlp_ext.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="must not share memory with a parameter"):
        step(model[1].weight.detach(), torch.randn(3, 3))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_views_of_one_parameter_are_refused(momentum: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias.data = model[0].weight.data[2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    before = deepcopy(model.state_dict())
    step = mlp_ext.TrainStep(model, nn.MSELoss(), optimizer)
    with pytest.raises(RuntimeError, match=r"^TrainStep: a parameter .* must not share memory"):
        step(torch.randn(5, 4), torch.rand(5, 4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_momentum_in_a_parameters_memory_is_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[model[0].weight]["momentum_buffer"] = model[0].weight.detach()
    step = mlp_ext.TrainStep(model, nn.MSELoss(), optimizer)
    with pytest.raises(RuntimeError, match=r"^TrainStep: a .* must not share memory"):
        step(torch.randn(5, 4), torch.rand(5, 2))


@pytest.mark.parametrize("container", [{1}, "text", None], ids=repr)
def test_watch_takes_dicts_and_lists_alone(container: object) -> None:
    with pytest.raises(TypeError, match="container must be a dict, a list, or an object"):
        _C.Guards([(container, 0, 1)], [])
    with pytest.raises(TypeError, match="container must be a dict, a list, or an object"):
        _C.Guards([], [(container, 2)])


@pytest.mark.parametrize("container", [[], None], ids=repr)
def test_guards_of_what_is_no_longer_a_dict_do_not_hold(container: object) -> None:
    """Also where a list now stands for it, and without a Python error left set."""
    owner = nn.Module()
    owner.entries = {"key": 1}
    items = _C.Guards([((owner, "entries"), "key", owner.entries["key"])], [])
    sizes = _C.Guards([], [((owner, "entries"), 1)])
    assert items.holds() and sizes.holds()
    owner.entries = container
    assert not items.holds() and not sizes.holds()


def test_state_may_be_a_plain_dict() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state = {}
    mlp_ext.TrainStep(model, nn.MSELoss(), optimizer)(torch.randn(5, 4), torch.rand(5, 2))
    assert len(optimizer.state) == 4
