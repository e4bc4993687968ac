"""The committed notebooks: executed, without traces of a machine, both languages alike.

`make notebooks` executes them.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path: Path, kind: str) -> list[str]:
    return ["".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == kind]


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in read(path)["cells"] for output in cell.get("outputs", [])]


@notebooks
def test_every_cell_was_executed_once_in_order(path: Path) -> None:
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))


@notebooks
def test_outputs_are_free_of_errors_and_warnings(path: Path) -> None:
    assert outputs(path)
    for output in outputs(path):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output


@notebooks
def test_outputs_are_small(path: Path) -> None:
    assert max(len(json.dumps(output)) for output in outputs(path)) < 100_000


@notebooks
def test_no_trace_of_a_machine(path: Path) -> None:
    notebook = read(path)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert [cell["metadata"] for cell in notebook["cells"]] == [{}] * len(notebook["cells"])
    for output in outputs(path):
        text = "".join(output.get("text", [])) + json.dumps(
            output.get("data", {}).get("text/plain")
        )
        assert not re.search(r"/(home|root|tmp|usr|opt|work|Users|private)/|[A-Z]:\\", text), text


@notebooks
def test_no_version_that_grows_old(path: Path) -> None:
    """A version in the text or in an output would be wrong after the next release."""
    texts = [*sources(path, "markdown"), *("".join(o.get("text", [])) for o in outputs(path))]
    assert [text for text in texts if re.search(r"\bv?\d+\.\d+\.\d+\b", text)] == []


@notebooks
def test_links_lead_somewhere(path: Path) -> None:
    text = "\n".join(sources(path, "markdown"))
    headings = {h.replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        assert not name or (path.parent / name).is_file(), target
        assert name or anchor in headings, target


class NoText(ast.NodeTransformer):
    """Leaves out the strings and the docstrings: what a translation may change."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("" if isinstance(node.value, str) else node.value)


def test_both_tutorials_have_the_same_code() -> None:
    english, spanish = (
        [ast.dump(NoText().visit(ast.parse(code))) for code in sources(path, "code")]
        for path in (EXAMPLES / "tutorial.ipynb", EXAMPLES / "tutorial_es.ipynb")
    )
    assert english == spanish


def test_readme_lists_each_notebook() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(.*)\]\(\1\)", text, flags=re.MULTILINE)
    assert sorted(listed) == [path.name for path in NOTEBOOKS]
