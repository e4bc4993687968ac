"""The functions of csrc/cpu/simd/vec-inl.h keep the accuracy that they state, on each processor."""

import subprocess
from pathlib import Path

import pytest
import torch
from processors import ARM, compiled

TARGETS = {"DEFAULT": "generic", "AVX2": "avx2", "AVX512": "avx512"}
MAX_ULP = {"exp": 2, "expm1": 2, "tanh": 2, "erf": 2, "log": 1, "log1p": 2, "sqrt": 0.5}


def targets() -> list[str]:
    """Those that this processor runs."""
    names = list(TARGETS)
    capability = torch.backends.cpu.get_cpu_capability()
    count = names.index(capability) + 1 if capability in names else 1
    return list(TARGETS.values())[:count]


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [pytest.param(name, marks=pytest.mark.slow) for name in targets()[:-1]]
    + [*targets()[-1:], ARM],
)
def test_errors_stay_within_those_stated(target: str, tmp_path: Path) -> None:
    """Beside libm in a wider type; special values, signs of zero, overflow and subnormals too."""
    header = "generic" if target == "aarch64" else target
    flags = ["-O1", f'-DTARGET="cpu/targets/{header}.h"']
    source = Path(__file__).parent / "vector_functions.cpp"
    command = compiled(tmp_path / target, [source], target, *flags)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {(name, dtype) for name, dtype, *_ in lines} == {
        (name, dtype) for name in MAX_ULP for dtype in ("float", "double")
    }
    wrong = [
        f"{name} {dtype}: {ulp} ULP at {x}"
        for name, dtype, ulp, x in lines
        if float(ulp) > MAX_ULP[name]
    ]
    assert not wrong, wrong
