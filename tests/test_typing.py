"""mypy --strict on a user's program: every public name has its types, and mistakes are errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlp_ext

ROOT = Path(__file__).parents[1]

# "R:" is the revealed type of the line, "E:" the code of its error.
PROGRAM = """
import torch
from torch import Tensor, nn

import mlp_ext
from mlp_ext import (
    ACTIVATIONS, FitResult, FusionReport, Level, LinearELU, LinearGELU, LinearHardtanh,
    LinearLeakyReLU, LinearMish, LinearReLU, LinearReLU6, LinearSELU, LinearSiLU, LinearSigmoid,
    LinearSoftplus, LinearTanh, Profile, Sequential, Site, Timing, TrainStep, TrainSteps,
    build_info, empty_cache, fuse, fusion_report, linear_act, linear_relu, linear_sigmoid,
    linear_tanh, predict, profile, unfuse,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Sequential(LinearReLU(10, 5), nn.Linear(5, 5), nn.Tanh())
        self.out = LinearSoftplus(5, 1, bias=False, dtype=torch.float64, beta=2.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.body(x))
        return y


# Layers and functions
layers: list[nn.Linear] = [
    LinearELU(3, 4, alpha=0.5), LinearGELU(3, 4, approximate="tanh"), LinearHardtanh(3, 4),
    LinearLeakyReLU(3, 4, negative_slope=0.2), LinearMish(3, 4), LinearReLU6(3, 4),
    LinearSELU(3, 4), LinearSiLU(3, 4), LinearSigmoid(3, 4), LinearTanh(3, 4, device="cpu"),
]
reveal_type(LinearGELU.from_linear(nn.Linear(3, 4), approximate="tanh"))  # R: mlp_ext.nn.LinearGELU
LinearReLU("3", 4)  # E: arg-type
LinearReLU.from_linear(nn.ReLU())  # E: arg-type
x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
reveal_type(linear_act(x, w, b, ACTIVATIONS[4], parameters=[0.2]))  # R: torch._tensor.Tensor
reveal_type(linear_relu(x, w))  # R: torch._tensor.Tensor
reveal_type(linear_sigmoid(x, w, bias=b))  # R: torch._tensor.Tensor
reveal_type(linear_tanh(x, w, None))  # R: torch._tensor.Tensor
linear_relu([1.0], w)  # E: arg-type
mlp_ext.linear_gelu(x, w)  # E: attr-defined

# fuse
model = Net()
level: Level = "stack"
reveal_type(fuse(model))  # R: {module}.Net
reveal_type(unfuse(fuse(model, level)))  # R: {module}.Net
fuse(model, level="stacks")  # E: arg-type
fusion_report(model, "all")  # E: arg-type
report: FusionReport = fusion_report(model, level="layers")
for site in report:
    reveal_type(site)  # R: mlp_ext.fuse.Site
    text: str = f"{site.name}: {site.activation or 'none'}, {site.reason}"
    if site.status == "fusd":  # E: comparison-overlap
        pass
sites: list[Site] = report.sites
count: int = len(report)

# TrainStep
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
step = TrainStep(model, nn.MSELoss(), optimizer, max_norm=1.0, accumulate=4)
function = TrainStep(model, nn.functional.mse_loss, optimizer)
reveal_type(step(x, x))  # R: torch._tensor.Tensor
losses = step.fit(x, x, epochs=3, batch_size=2, shuffle=True, generator=None, progress=False)
reveal_type(losses)  # R: torch._tensor.Tensor
step.fit(x, x, epochs="3")  # E: call-overload
result = step.fit([(x, x)], epochs=3, validation=(x, x), metric=lambda y, target: y.mean())
reveal_type(result.metrics)  # R: torch._tensor.Tensor | None
best: FitResult = step.fit(x, x, validation=[(x, x)], on_epoch=lambda *losses: None)
reveal_type(best.best_epoch)  # R: int | None
step.fit(x, x, patience=3)  # E: call-overload
step(x)  # E: call-arg
TrainStep(model, optimizer, nn.MSELoss())  # E: arg-type

# TrainSteps
steps = TrainSteps([model], nn.MSELoss(), [optimizer])
reveal_type(steps(x, x))  # R: torch._tensor.Tensor
found_losses = steps.fit(x, x, generators=[torch.Generator()], rows=[b.long()])
reveal_type(found_losses)  # R: torch._tensor.Tensor
reveal_type(predict([model], x))  # R: torch._tensor.Tensor
reveal_type(empty_cache)  # R: def ()
TrainSteps(model, nn.MSELoss(), [optimizer])  # E: arg-type

# profile
found: Profile = profile(model, x, train=True, rounds=2)
reveal_type(found.reports["layers"])  # R: mlp_ext.fuse.FusionReport
found.reports["stacks"]  # E: index
timing: Timing = found.timings[0]
reveal_type(timing.median_s)  # R: float | None
reveal_type(found.to_dict())  # R: dict[str, Any]
reveal_type(build_info())  # R: dict[str, Any]
reveal_type(mlp_ext.__version__)  # R: str
"""


def test_the_program_uses_every_public_name() -> None:
    uses = {name: len(re.findall(rf"\b{name}\b", PROGRAM)) for name in mlp_ext.__all__}
    assert [name for name, count in uses.items() if count < 2] == []  # one is the import


@pytest.mark.slow
def test_types_of_a_users_program(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", program.name]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    says = r"program\.py:(\d+): (?:note: Revealed type is \"(.*)\"|error: .*\[(.*)\])"
    said = {}
    for line in result.stdout.splitlines():
        if match := re.fullmatch(says, line):
            said[int(match[1])] = match[2] or match[3]
        else:
            assert ": note: " in line, line + result.stderr
    expected = {
        number: line.rpartition(": ")[2].format(module="program")
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        if re.search("# [RE]: ", line)
    }
    assert said == expected, result.stdout + result.stderr
