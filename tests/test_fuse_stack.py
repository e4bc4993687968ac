"""fuse(level="stack") changes how a model's Sequentials compute and nothing else, and back."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypotheses import given, settings
from test_fuse import (
    FUSIBLE,
    MyLinear,
    Net,
    fused_names,
    identities,
    linear,
    mlp,
    results,
    sites,
    trees,
)
from torch import Tensor, nn

import mlp_ext

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fuse changed nothing"),
]

close = torch.testing.assert_close


def stacked(model: nn.Module) -> list[str]:
    """The modules whose forward fuse has replaced."""
    return [name for name, m in model.named_modules() if "fused_from" in vars(type(m))]


def fuse(model: nn.Module) -> nn.Module:
    return mlp_ext.fuse(model, level="stack")


def stack_sites(model: nn.Module) -> dict[str, tuple[str | None, str, str]]:
    report = mlp_ext.fusion_report(model, level="stack")
    return {s.name: (s.activation, s.status, s.reason) for s in report}


def test_every_sequential_becomes_a_stack_in_place_and_back() -> None:
    model = Net()
    before, text, expected = identities(model), repr(model), results(copy.deepcopy(model))
    assert fuse(model) is model
    assert stacked(model) == ["body", "body.2", "head"]
    assert identities(model) == before and repr(model) == text
    close(results(model), expected)
    assert mlp_ext.unfuse(model) is model
    assert stacked(model) == [] and type(model.head) is nn.Sequential
    assert identities(model) == before
    assert "_plan" not in vars(model.head)
    close(results(model), expected)


def test_root_is_changed_in_place_too() -> None:
    model = mlp()
    expected = results(copy.deepcopy(model))
    assert fuse(model) is model and isinstance(model, nn.Sequential)
    assert model(torch.randn(3, 6, dtype=torch.float64)).grad_fn.name() == "MlpBackward"
    close(results(model), expected)
    assert type(mlp_ext.unfuse(model)) is nn.Sequential


def test_fuse_again_changes_nothing() -> None:
    model = fuse(Net())
    once = [(type(m), id(m)) for m in model.modules()]
    assert [(type(m), id(m)) for m in fuse(model).modules()] == once


@settings(max_examples=40, deadline=None)
@given(trees())
def test_fuse_and_back_on_any_tree(model: nn.Module) -> None:
    before, expected = identities(model), results(copy.deepcopy(model))
    types = [type(m) for m in model.modules()]
    planned = [n for n, (_, status, _) in stack_sites(model).items() if status == "would fuse"]
    fuse(model)
    done = stack_sites(model).items()
    assert [n for n, (_, status, _) in done if status == "fused"] == planned
    close(results(model), expected)
    assert identities(mlp_ext.unfuse(model)) == before
    assert [type(m) for m in model.modules()] == types


# Levels on one another


def test_stack_over_fused_layers_runs_them() -> None:
    model = mlp()
    before, expected = identities(model), results(copy.deepcopy(model))
    fuse(mlp_ext.fuse(model, level="layers"))
    assert fused_names(model) == ["0", "2"] and stacked(model) == [""]
    x = torch.randn(3, 6, dtype=torch.float64)
    assert type(model(x).grad_fn) is type(fuse(mlp())(x).grad_fn)
    close(results(model), expected)
    assert identities(mlp_ext.unfuse(model)) == before
    assert stacked(model) == []


def test_stack_written_by_the_user_stays() -> None:
    model = mlp_ext.Sequential(*mlp())
    assert mlp_ext.unfuse(fuse(model)) is model and type(model) is mlp_ext.Sequential
    assert sites(model) == {"0": ("relu", "fused", ""), "2": ("sigmoid", "fused", "")}


# What goes on working


def test_optimizer_and_hooks_of_the_model_go_on() -> None:
    native = mlp()
    model = copy.deepcopy(native)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (native, model)]
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    for change in (fuse, mlp_ext.unfuse, fuse):
        change(model)
        for m, optimizer in zip((native, model), optimizers, strict=True):
            results(m)
            optimizer.step()
    close(model.state_dict(), native.state_dict())
    assert len(seen) == 3


def test_checkpoints_load_in_both_directions() -> None:
    native, fused = Net(), fuse(Net())
    fused.load_state_dict(native.state_dict())
    close(results(fused), results(native))
    other = Net()
    other.load_state_dict(fused.state_dict())
    close(results(other), results(native))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_of_a_fused_model_can_be_unfused(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = fuse(Net())
    expected = results(model)
    twin = copied(model)
    assert stacked(twin) == stacked(model)
    mlp_ext.unfuse(twin)
    assert stacked(twin) == [] and stacked(model) == ["body", "body.2", "head"]
    close(results(twin), expected)


def test_children_may_be_changed_while_fused() -> None:
    model = fuse(mlp())
    results(model)
    model[0] = linear()
    model.append(nn.Softplus())
    expected = results(mlp_ext.unfuse(copy.deepcopy(model)))
    close(results(model), expected)


def test_compiled_model_compiles_anew() -> None:
    torch.compiler.reset()
    model = mlp()
    expected = results(copy.deepcopy(model))["output"]
    compiled = torch.compile(model, backend="eager")
    for change in (fuse, mlp_ext.unfuse):
        close(results(compiled)["output"], expected)
        change(compiled)
    close(results(compiled)["output"], expected)


def test_layer_in_two_places_is_no_obstacle() -> None:
    first = linear()
    model = nn.Sequential(first, nn.ReLU(inplace=True), first, nn.ReLU(inplace=True))
    expected = results(copy.deepcopy(model))
    assert {status for _, status, _ in stack_sites(fuse(model)).values()} == {"fused"}
    close(results(model), expected)


# The report


class Block(nn.Sequential):
    pass


class Doubled(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_report_tells_of_every_linear() -> None:
    code = "its output is not read by an activation alone"
    acts = dict(zip(FUSIBLE, ["relu", "tanh", "sigmoid"], strict=True))
    acts |= {"body.3": "identity", "head.2": "identity"}
    model = Net()
    left = {"skips.0": (None, "not fused", code)}
    assert stack_sites(model) == left | {n: (act, "would fuse", "") for n, act in acts.items()}
    fuse(model)
    assert stack_sites(model) == left | {n: (act, "fused", "") for n, act in acts.items()}


@pytest.mark.parametrize("sequential", [Block, Doubled])
def test_subclass_of_sequential_is_fused(sequential: type[nn.Sequential]) -> None:
    model = sequential(linear(), nn.ReLU())
    expected = results(copy.deepcopy(model))
    assert stack_sites(fuse(model)) == {"0": ("relu", "fused", "")}
    assert isinstance(model, sequential) and type(model).__name__ == sequential.__name__
    close(results(model), expected)


def test_sequential_without_a_layer_for_a_run_is_left_alone() -> None:
    hooked = linear()
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(hooked, nn.ReLU(), MyLinear(6, 6), nn.Dropout(0.0))
    assert type(fuse(model)) is nn.Sequential
    assert {status for _, status, _ in stack_sites(model).values()} == {"not fused"}


def test_child_with_a_hook_is_reported_and_called() -> None:
    model = mlp()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    fuse(model)
    assert sites(model) == {
        "0": (None, "not fused", "has forward hooks"),
        "2": ("sigmoid", "fused", ""),
    }
    model(torch.randn(3, 6, dtype=torch.float64))
    assert len(seen) == 1


def test_unknown_level_is_refused() -> None:
    for function in (mlp_ext.fuse, mlp_ext.fusion_report):
        message = f"{function.__name__}: level must be one of layers, stack, got 'all'"
        with pytest.raises(ValueError, match=f"^{message}"):
            function(mlp(), level="all")
