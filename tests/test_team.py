"""The loops that threads share, csrc/cpu/team.cpp, without torch."""

import re
import subprocess
from pathlib import Path

from processors import CSRC, compiled

PROGRAM = Path(__file__).parent / "team"


def test_each_piece_of_a_loop_runs_once(tmp_path: Path) -> None:
    """Beside late threads, fewer threads, errors and other regions, and with loops in pieces."""
    sources = [PROGRAM / "main.cpp", CSRC / "cpu" / "team.cpp"]
    command = compiled(tmp_path / "team", sources, "here", "-O1", f"-I{PROGRAM}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"\d{4,} loops are right\n", done.stdout)
