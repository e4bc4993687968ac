"""The CPU kernels without torch equal plain loops in double, here and on ARM."""

import re
import subprocess
from pathlib import Path

import pytest
from processors import ARM, CSRC, SANITIZERS, compiled

PROGRAM = Path(__file__).parent / "cpu_kernels"


def run_generic_kernels(folder: Path, processor: str, *flags: str) -> None:
    """Of every dtype: layers, losses, updates and steps; nothing is written out of bounds."""
    kernels = sorted((CSRC / "cpu" / "targets").glob("generic_*.cpp"))
    sources = [*kernels, *sorted(PROGRAM.glob("*.cpp")), CSRC / "cpu" / "machines.cpp"]
    target = ["-DTARGET=generic", '-DTARGET_HEADER="cpu/targets/generic.h"']
    command = compiled(folder / "kernels", sources, processor, *target, *flags)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = re.fullmatch(r"(\d+) results, 0 wrong\n", done.stdout)
    assert results is not None
    assert int(results[1]) > 40_000


@pytest.mark.parametrize("processor", [pytest.param("here", marks=pytest.mark.slow), ARM])
def test_generic_kernels_match_plain_loops(processor: str, tmp_path: Path) -> None:
    run_generic_kernels(tmp_path, processor, "-O3")


@pytest.mark.slow
def test_generic_kernels_pass_the_sanitizers(tmp_path: Path) -> None:
    run_generic_kernels(tmp_path, "here", *SANITIZERS)
