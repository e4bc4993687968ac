"""docs/compatibility.md: each row names a test that exists."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "compatibility.md"
ROWS = [
    line
    for line in PAGE.read_text().splitlines()
    if line.startswith("|") and not line.startswith("|--") and "| Test |" not in line
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_row_names_a_test(row: str) -> None:
    found = re.search(r"\| `(test_\w+\.py)::(test_\w+)(?:\[(\w+)\])?` \|$", row)
    assert found, "the last column must be `test_file.py::test_name`"
    file, name, case = found.groups()
    paths = [path for path in (TESTS / file, TESTS / "clients" / file) if path.exists()]
    assert paths, f"no such file: {file}"
    text = paths[0].read_text()
    assert f"def {name}(" in text, f"no such test: {name}"
    assert case is None or f'"{case}": ' in text, f"no such case: {case}"


def test_every_library_has_a_row() -> None:
    files = {path.name for path in (TESTS / "clients").glob("test_*.py")}
    assert {file for file in files if file not in PAGE.read_text()} == set()
