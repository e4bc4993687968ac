"""Every instruction set that this processor has gives the same values and gradients."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forks import in_forks
from levels import LEVELS, available

from mlp_ext import _C

HERE = Path(__file__).parent


def python(level: str, *arguments: str) -> str:
    """Runs python with the level forced from its start; torch reads it once."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": LEVELS[level][0]}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_kernels_follow_the_level_that_torch_chose() -> None:
    assert _C.instruction_set() == LEVELS[available()[-1]][1]


@pytest.mark.slow
def test_level_can_be_forced() -> None:
    report = "torch.backends.cpu.get_cpu_capability(), mlp_ext._C.instruction_set()"
    code = f"import mlp_ext; print({report})"
    found = in_forks(code, [{"ATEN_CPU_CAPABILITY": LEVELS[level][0]} for level in available()])
    assert [told.split() for told in found] == [[name, LEVELS[name][1]] for name in available()]


@pytest.mark.slow
@pytest.mark.parametrize("level", available()[:-1])
def test_lower_levels_pass_the_tests_with_the_mark_isa(level: str) -> None:
    """The highest level is the one that this process runs the same tests in."""
    files = [path for path in HERE.glob("test_*.py") if "mark.isa\n" in path.read_text()]
    options = ["-x", "-m", "isa", "-o", "addopts=", "-p", "no:cacheprovider"]
    passed = re.search(r"(\d+) passed", python(level, "-m", "pytest", *options, *map(str, files)))
    assert passed is not None
    assert int(passed[1]) > 700
