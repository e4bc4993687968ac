"""No function that the linker merges is compiled for a processor that may not be there.

Of the copies of an inline function in many files the linker keeps any. One that was compiled for
AVX-512 would then run, and fail, on every processor. So the kernels of an instruction set are
local, and what they share with other files is compiled before the target is set.
"""

import platform
import re
import subprocess
from pathlib import Path

import pytest
from cuda_kernels import CSRC, compiler

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set")
FILES = sorted(path.stem for path in (CSRC / "cpu" / "targets").glob("avx*.cpp"))
# Inline functions are kept as functions, and loops become vectors, so that each shows its target.
FLAGS = ["-std=c++20", "-O1", "-fno-inline", "-ftree-vectorize", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=fast", "-Wno-psabi", "-Wno-unknown-pragmas"]


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(file: Path) -> dict[str, str]:
    """The instructions of each function of an object file."""
    text = output("objdump", "--disassemble", "--no-show-raw-insn", file)
    parts = re.split(r"^[0-9a-f]+ <(.+)>:$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def merged(file: Path) -> set[str]:
    """The symbols of which the linker keeps one: weak, unique and common ones that are defined."""
    lines = (line.split() for line in output("nm", "--defined-only", file).splitlines())
    return {name for _, kind, name in lines if kind in "WVuC"}


def vector_instructions(code: str) -> list[str]:
    """Those that need AVX: all their names begin with v, and no other's does."""
    return re.findall(r"^\s*[0-9a-f]+:\s+(v\w+.*)$", code, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_shared_functions_run_on_every_processor(name: str, tmp_path: Path) -> None:
    file = tmp_path / "object.o"
    compiler(*FLAGS, f"-I{CSRC}", "-c", CSRC / "cpu" / "targets" / f"{name}.cpp", "-o", file)
    code, shared = functions(file), merged(file)
    assert any(vector_instructions(code[f]) for f in code.keys() - shared)
    assert code.keys() & shared
    wrong = {f: found[:3] for f in code.keys() & shared if (found := vector_instructions(code[f]))}
    assert not wrong, wrong
