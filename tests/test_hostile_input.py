"""Hostile input gives what torch gives, or one clear line: the tables of hostile_*.py.

Each table runs in a child process. If that dies, the row which it was at has failed, and the next
child goes on after it.
"""

import json
import os
from pathlib import Path

import hostile
import pytest
from forks import in_forks
from once import Once

TESTS = Path(__file__).parent
NAMES = [(table, name) for table in hostile.TABLES for name in hostile.rows(table)]


def run_all(folder: Path) -> None:
    """Writes what is wrong with each row, "" if nothing is."""
    path = os.pathsep.join(map(str, (TESTS, TESTS.parent, folder)))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    code = "import os, hostile; hostile.run(os.environ['TABLE'], os.environ['AFTER'])"
    found: dict[str, dict[str, str]] = {table: {} for table in hostile.TABLES}
    after = dict.fromkeys(hostile.TABLES, "")
    while after:
        cases = [{"TABLE": table, "AFTER": name} for table, name in after.items()]
        for table, text in zip([*after], in_forks(code, cases, env=env), strict=True):
            lines, died, status = text.partition("the process died")
            for line in lines.splitlines():
                assert line.startswith("["), text  # else the traceback of an import
                name, *failure = json.loads(line)
                found[table][name] = failure[0] if failure else "not finished"
                after[table] = name
            if died:
                assert lines, text  # else the next child would die, too
                found[table][name] = died + status.strip()
            if after[table] == [*hostile.rows(table)][-1]:
                del after[table]
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(once: Once) -> dict[str, dict[str, str]]:
    path = once("hostile", run_all) / "found.json"
    outcomes: dict[str, dict[str, str]] = json.loads(path.read_text())
    return outcomes


@pytest.mark.parametrize(("table", "name"), NAMES, ids=[f"{t}-{n}" for t, n in NAMES])
def test_is_right_or_one_clear_line(
    table: str, name: str, found: dict[str, dict[str, str]]
) -> None:
    assert found[table][name] == ""


@pytest.mark.slow
def test_crash_is_attributed_to_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a table whose second row ends the process."""
    (tmp_path / "hostile_crash.py").write_text(
        "import os\nfrom hostile import Row\n"
        "def call(lib, name):\n    return name != 'b' or os.kill(os.getpid(), 11)\n"
        "ROWS = {name: Row(lambda lib, n=name: call(lib, n)) for name in 'abc'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hostile, "TABLES", ("crash",))
    run_all(tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"crash": {"a": "", "b": "the process died: status 11", "c": ""}}
