"""The loops that threads share, csrc/cpu/team.cpp, without torch."""

import re
import subprocess
from pathlib import Path

import pytest
from processors import CSRC, SANITIZERS, compiled

PROGRAM = Path(__file__).parent / "team"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["-O1"], SANITIZERS], ids=["plain", "sanitized"])
def test_each_piece_of_a_loop_runs_once(flags: list[str], tmp_path: Path) -> None:
    """Beside late threads, fewer threads, errors and other regions, and with loops in pieces."""
    sources = [PROGRAM / "main.cpp", CSRC / "cpu" / "team.cpp"]
    command = compiled(tmp_path / "team", sources, "here", *flags, f"-I{PROGRAM}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d{4,} loops are right\n", done.stdout)
