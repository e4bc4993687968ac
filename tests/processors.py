"""Programs compiled for this processor or, where `make arm-check` installed the tools, for ARM."""

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = ["-std=c++20", "-ffp-contract=fast", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ARM = pytest.param(
    "aarch64",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(
            not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
            reason="needs aarch64-linux-gnu-g++ and qemu-aarch64: make arm-check installs them",
        ),
    ],
)


def compiled(program: Path, sources: Sequence[Path], processor: str, *flags: str) -> list[str]:
    """Compiles the sources for `processor`, "aarch64" or this one; returns the command to run."""
    is_arm = processor == "aarch64"
    compiler = "aarch64-linux-gnu-g++" if is_arm else "g++"

    def call(*arguments: str | Path) -> None:
        command = [compiler, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    def compile_one(source: Path) -> Path:
        to = program.with_name(f"{source.stem}.o")
        call(*FLAGS, *flags, f"-I{CSRC}", "-c", source, "-o", to)
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    call(*(["-static"] if is_arm else []), *flags, *objects, "-o", program)
    return ["qemu-aarch64", str(program)] if is_arm else [str(program)]
