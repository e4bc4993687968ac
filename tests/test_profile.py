"""profile: what fuse finds in a model, differences from native, times. The model stays."""

import json
import math
import re
import sys
import threading
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mlp_ext
from mlp_ext.bench import noise
from mlp_ext.profile import Profile, Timing
from mlp_ext_cli import main

MODULE = sys.modules["mlp_ext.profile"]  # mlp_ext.profile is the function
pytestmark = pytest.mark.usefixtures("one_thread")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3), nn.Tanh())


class TwoInputs(nn.Module):
    """Not a Sequential, with two inputs, dropout and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Dropout())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
        return {"out": self.head(self.body(x)) + y, "rows": len(x)}


def timings(profile: Profile) -> dict[str, Timing]:
    return {timing.name: timing for timing in profile.timings}


def test_forward_of_a_stack() -> None:
    found = mlp_ext.profile(mlp(), torch.randn(5, 8), rounds=2)
    assert [*timings(found)] == ["native", "fused", "stack"]
    for timing in found.timings:
        assert timing.median_s and timing.q20_s <= timing.median_s <= timing.q80_s
        assert timing.output_difference is not None and timing.output_difference < 1e-6
        assert not timing.left_out
    assert timings(found)["native"].ratio_to_native == 1
    for level in ("layers", "stack"):
        assert str(found.reports[level]) == str(mlp_ext.fusion_report(mlp(), level))
        assert str(found.reports[level]) in str(found)


def test_training_compares_gradients_and_the_step() -> None:
    found = mlp_ext.profile(mlp(), torch.randn(5, 8), train=True, rounds=2)
    assert [*timings(found)] == ["native", "fused", "stack", "step"]
    for timing in found.timings:
        assert timing.output_difference is not None and timing.output_difference < 1e-6
        assert timing.gradient_difference is not None and timing.gradient_difference < 1e-5
        assert timing.name in str(found)


def test_differences_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """fuse and TrainStep that compute something else, in outputs and in gradients."""

    def wrong_fuse(model: nn.Sequential, level: str) -> nn.Module:
        with torch.no_grad():
            model[0].bias += 0.1
        return model

    class WrongStep(mlp_ext.TrainStep):
        def __call__(self, input: Tensor, target: Tensor) -> Tensor:
            return super().__call__(1.1 * input, target)

    monkeypatch.setattr(MODULE, "fuse", wrong_fuse)
    monkeypatch.setattr(MODULE, "TrainStep", WrongStep)
    found = timings(mlp_ext.profile(mlp(), torch.randn(5, 8), train=True, rounds=1))
    for name in ("fused", "stack", "step"):
        assert found[name].output_difference > 1e-3
        assert found[name].gradient_difference > 1e-3


@pytest.mark.parametrize("value, shown", [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_result_that_is_not_finite_is_a_difference(
    monkeypatch: pytest.MonkeyPatch, value: float, shown: str
) -> None:
    def wrong_fuse(model: nn.Sequential, level: str) -> nn.Module:
        nn.init.constant_(model[2].bias, value)
        return model[:3]

    monkeypatch.setattr(MODULE, "fuse", wrong_fuse)
    found = mlp_ext.profile(mlp(), torch.randn(5, 8), rounds=1)
    assert f"{timings(found)['fused'].output_difference}" == shown


def test_several_inputs_and_other_outputs() -> None:
    inputs = torch.randn(5, 8), torch.randn(5, 3)
    found = mlp_ext.profile(TwoInputs(), *inputs, train=True, rounds=1)
    assert found.inputs == [[5, 8], [5, 3]]
    assert "TwoInputs, training step of 5x8, 5x3" in str(found)
    fused, step = timings(found)["fused"], timings(found)["step"]
    assert fused.output_difference < 1e-6 and fused.gradient_difference < 1e-5  # the same masks
    assert step.median_s is None and step.left_out == "TrainStep takes one input, not 2"
    assert f"step skipped: {step.left_out}" in str(found)


def test_nothing_to_fuse() -> None:
    found = mlp_ext.profile(nn.Conv1d(2, 2, 3), torch.randn(5, 2, 8), rounds=1)
    assert [timing.left_out for timing in found.timings] == ["", *2 * ["nothing to fuse"]]
    assert "no Linear in this model" in str(found)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_state_stay(train: bool, training: bool) -> None:
    model = nn.Sequential(*mlp(), nn.Dropout(), nn.BatchNorm1d(3)).train(training)
    mlp_ext.fuse(model, level="stack")
    x = torch.randn(5, 8, requires_grad=True)
    model(x).sum().backward()
    before, state = deepcopy(model), torch.get_rng_state()
    grads = {"x": x.grad.clone(), **{n: p.grad.clone() for n, p in model.named_parameters()}}

    with torch.no_grad():
        mlp_ext.profile(model, x, train=train, rounds=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(model) == repr(before) and type(model) is type(before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    after = {"x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    torch.testing.assert_close(after, grads, rtol=0, atol=0)


def test_a_fused_model_is_compared_with_native() -> None:
    model = mlp_ext.fuse(mlp())
    found = mlp_ext.profile(model, torch.randn(5, 8), rounds=1)
    assert {site.status for site in found.reports["layers"]} == {"would fuse"}


def test_errors_say_what_does_not_work() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got builtins\.int"):
        mlp_ext.profile(3, torch.randn(5, 8))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"cannot be called with \[5, 7\]: mat1 and mat2"):
        mlp_ext.profile(mlp(), torch.randn(5, 7))
    with pytest.raises(RuntimeError, match=r"cannot be trained on \[5, 8\]: .*require grad"):
        mlp_ext.profile(mlp().requires_grad_(False), torch.randn(5, 8), train=True)
    model = mlp()
    model.lock = threading.Lock()
    with pytest.raises(RuntimeError, match=r"cannot be copied by copy\.deepcopy: .*lock"):
        mlp_ext.profile(model, torch.randn(5, 8))
    with pytest.raises(RuntimeError, match=r"returns no floating-point tensor"):
        mlp_ext.profile(Counts(), torch.randn(5, 8))


class Counts(nn.Module):
    def forward(self, x: Tensor) -> int:
        return len(x)


# ---- The command ----

MODELS = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

class Zoo:
    model = mlp()

number = 4
def three(): return 3
def fails(): raise KeyError("no such\\nkey")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of models."""
    (tmp_path / "own_models.py").write_text(MODELS)
    (tmp_path / "broken_models.py").write_text("import surely_not_installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_command_prints_and_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["own_models:mlp", "--input", "5x8", "--train", "--rounds", "1"]
    assert main(["profile", *arguments, "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Sequential, training step of 5x8 on ")
    record = json.loads((folder / "found.json").read_text())
    assert [timing["name"] for timing in record["timings"]] == ["native", "fused", "stack", "step"]
    assert [site["status"] for site in record["fusion"]["stack"]] == 2 * ["would fuse"]
    for model in ("own_models:Zoo.model", "own_models.py:Zoo.model"):
        assert main(["profile", model, "--input", "2x5x8", "--rounds", "1"]) == 0


@pytest.mark.usefixtures("folder")
def test_command_does_not_cite_noisy_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["profile", "own_models:mlp", "--input", "5x8", "--rounds", "1"]
    monkeypatch.setattr(noise, "OTHER_CPUS", -math.inf)
    assert main(args) == 0
    *_, line, _, sentence = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Timings unreliable: other processes used .+ of \d+ CPUs", line)
    assert sentence.startswith("Results differ by at most ")
    monkeypatch.setattr(noise, "OTHER_CPUS", math.inf)
    assert main(args) == 0
    assert "times as fast as torch; results differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    "factory, sizes, says",
    [
        ("own_models.mlp", "5x8", "must be module:name or FILE.py:name, got 'own_models.mlp'"),
        ("own_models:", "5x8", "must be module:name or FILE.py:name, got 'own_models:'"),
        ("own_models:mlp", "5*8", "must be a shape, e.g. 64x784, got '5*8'"),
        ("own_models:mlp", "0x8", "must be a shape, e.g. 64x784, got '0x8'"),
        ("nowhere.models:mlp", "5x8", "there is no module nowhere in this folder"),
        ("own_models:mlpp", "5x8", "own_models has no attribute 'mlpp'; did you mean mlp?"),
        ("nowhere.py:mlp", "5x8", "there is no file nowhere.py"),
        ("broken_models.py:mlp", "5x8", "broken_models.py fails: ModuleNotFoundError: No module"),
        ("own_models:number", "5x8", "own_models:number is a builtins.int, not a function"),
        ("own_models:three", "5x8", "returns a builtins.int, not a torch.nn.Module"),
        ("own_models:fails", "5x8", "own_models:fails fails: KeyError: "),
        ("broken_models:mlp", "5x8", "broken_models fails: ModuleNotFoundError: No module"),
        ("own_models:mlp", "5x7", "the model cannot be called with [5, 7]: mat1 and mat2 shapes"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_command_explains_in_one_line(
    factory: str, sizes: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", factory, "--input", sizes]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mlp-ext profile: error: ") and says in err
    assert err.count("\n") == 1
