"""README and docs: links lead somewhere, code runs and prints what is said, figures are rows."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlp_ext import nn
from mlp_ext.bench.rows import geometric_mean, read_csv

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
README, PERFORMANCE = ROOT / "README.md", DOCS / "performance.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted(DOCS.glob("*.md")),
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """The text without blocks of code."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Those to files of the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if not re.match(r"https?://", target)]


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{target} does not exist"
        assert found.is_relative_to(ROOT), f"{target} leaves the repository"
        if anchor:
            assert anchor in anchors(found), f"{target}: no such heading"


def test_readme_is_one_screen() -> None:
    assert len(README.read_text().splitlines()) <= 120


def test_every_page_is_reached_from_readme() -> None:
    reached, found = set(), [README]
    while found:
        page = found.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        found += [target for target in targets - reached if target.suffix == ".md"]
    assert reached >= set(PAGES)


EXAMPLE = re.compile(
    r"```python\n(?P<code>.*?)```(?:\n+It prints(?::\n+```\n(?P<lines>.*?)```| `(?P<line>.*?)`))?",
    flags=re.DOTALL,
)


# The pages with code, and what comes before it where it is a part of a program.
CODE = {
    README: "",
    DOCS / "usage.md": "",
    DOCS / "data.md": "",
    DOCS / "many-networks.md": "",
    DOCS / "sklearn.md": "",
    DOCS / "train-step.md": """
import mlp_ext, torch
from mlp_ext import TrainStep
model = torch.nn.Linear(3, 1)
criterion, optimizer = torch.nn.MSELoss(), torch.optim.SGD(model.parameters())
input, target, parameters, calls = torch.ones(2, 3), torch.ones(2, 1), [*model.parameters()], 4
step = TrainStep(model, criterion, optimizer)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
x, y, x_valid, y_valid, loader = input, target, input, target, [(input, target)]
""",
}
ELSEWHERE = {  # in tests of their own
    DOCS / "adding-things.md",
    DOCS / "distributed.md",
    ROOT / "benchmarks" / "README.md",
}


@pytest.mark.parametrize("page", CODE, ids=lambda page: page.stem)
def test_code_runs_and_prints_what_is_said(
    page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(CODE[page], names)
    examples = list(EXAMPLE.finditer(page.read_text()))
    assert examples
    for example in examples:
        exec(example["code"], names)
        said = example["lines"] or (f"{example['line']}\n" if example["line"] else "")
        assert capsys.readouterr().out == said


def test_all_code_runs() -> None:
    assert {page for page in PAGES if "```python" in page.read_text()} == {*CODE} | ELSEWHERE


def says(text: str, value: float) -> bool:
    """Whether `text`, such as 1.35, 50.6x, 335 us or 1.64 ms, is `value` rounded."""
    match = re.fullmatch(r"(\d+(?:\.(\d+))?)(x| us| ms|)", text)
    assert match, f"{text!r} is no number"
    scale = {" us": 1e6, " ms": 1e3}.get(match[3], 1.0)
    return abs(float(match[1]) - scale * value) <= 0.5001 * 10.0 ** -len(match[2] or "")


class Table(NamedTuple):
    head: list[str]
    body: list[list[str]]
    csv: str | None  # the last one named above it


def tables(page: Path) -> Iterator[Table]:
    csv, lines = None, []
    for line in [*page.read_text().splitlines(), ""]:
        if line.strip().startswith("|"):
            lines.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        if lines:
            yield Table(lines[0], lines[2:], csv)
            csv, lines = None, []
        if named := re.search(r"\(([^)]*\.csv)\)", line):
            csv = named[1]


class Rows:
    """The rows of a file, by provider and case."""

    def __init__(self, path: Path) -> None:
        rows = read_csv(path)
        self.ratio = {(row.provider, row.case): row.ratio_to_native for row in rows}
        self.seconds = {(row.provider, row.case): row.median_s for row in rows}

    def ratios(self, provider: str) -> dict[str, float]:
        return {case: ratio for (p, case), ratio in self.ratio.items() if p == provider}

    def expected(self, column: str, case: str) -> float | None:
        """What the column of that name has for a case; None where it is not of figures."""
        if column == "fused in a graph over native in a graph":
            return self.seconds["cudagraph", case] / self.seconds["fused-cudagraph", case]
        provider, _, what = re.sub(",", "", column).partition(" ")
        ratios = self.ratios(provider)
        if not ratios:
            return None
        if what == "mean":
            return geometric_mean(list(ratios.values()))
        if what == "least":
            return min(ratios.values())
        return self.seconds[provider, case] if what == "time" else ratios[case]


@pytest.mark.parametrize(
    "page, least", [(PERFORMANCE, 100), (DOCS / "compare.md", 40)], ids=["performance", "compare"]
)
def test_tables_are_rows(page: Path, least: int) -> None:
    checked = 0
    for table in tables(page):
        for cells in table.body:
            own = re.search(r"\(([^)]*\.csv)\)", " ".join(cells))
            csv = own[1] if own else table.csv
            if csv is None:
                continue
            rows = Rows(DOCS / csv)
            for column, before, text in zip(table.head, ["", *table.head], cells, strict=False):
                if column == "at":
                    ratios = rows.ratios(before.partition(",")[0])
                    assert text == min(ratios, key=ratios.__getitem__), cells
                elif (value := rows.expected(column, cells[0])) is not None:
                    assert says(text, value), f"{column} of {cells}: {value} in {csv}"
                    checked += 1
    assert checked > least  # they were found


def test_table_of_the_demo_is_what_it_wrote() -> None:
    (table,) = (t for t in tables(PERFORMANCE) if t.head[0] == "data")
    for name, cells in zip(("breast_cancer", "tutorial"), table.body, strict=True):
        results = json.loads((RESULTS / f"demo-{name}.json").read_text())["results"]
        said = dict(zip(table.head, cells, strict=True))
        assert says(said["native"], results["native"]["ms_per_epoch"] / 1e3)
        for kind in ("fused", "stack", "step"):
            assert says(said[kind], results[kind]["speed_up"]), (name, kind)
        assert said[table.head[-1]] == f"{results['step']['largest_difference']:.2g}"


def test_tables_of_accuracy_are_rows() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "accuracy.py"))
    rows = script["read"](RESULTS / "sapphire_rapids" / "accuracy.csv")
    said = (DOCS / "accuracy.md").read_text().splitlines()
    assert [
        line for line in script["tables"](rows) if line.startswith("|") and line not in said
    ] == []


def test_gains_in_readme_are_the_least_and_the_most_of_their_rows() -> None:
    (table,) = (t for t in tables(README) if t.head[0] == "You have")
    train, layers = "train-step-relu.csv", "layers-full-relu.csv"
    sources = [(train, p) for p in ("fit", "step", "stack", "fused")] + [(layers, "fused")]
    for (csv, provider), cells in zip(sources, table.body, strict=True):
        ratios = Rows(RESULTS / csv).ratios(provider).values()
        least, most = re.findall(r"[\d.]+x", cells[2])
        assert says(least, min(ratios)) and says(most, max(ratios)), cells


def test_figures_in_readme_are_rows() -> None:
    text = prose(README)
    rows = [Rows(RESULTS / name) for name in ("train-step-relu.csv", "layers-full-relu.csv")]
    ratios = [value for r in rows for value in r.ratio.values()]
    seconds = [value for r in rows for value in r.seconds.values()]
    figures = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:x| us| ms)\b", text)
    assert figures
    for figure in figures:
        values = ratios if figure.endswith("x") else seconds
        assert any(says(figure, value) for value in values), figure


def test_each_file_of_rows_has_one_command_and_one_name() -> None:
    commands: dict[Path, set[str]] = {}
    names: dict[str, set[Path]] = {}
    for page in PAGES:
        text = prose(page)
        for name, target in re.findall(r"\[(\S+\.csv)\]\((\S+)\)", text):
            names.setdefault(name, set()).add((page.parent / target).resolve())
        for target, command in re.findall(r"\((\S+\.csv)\)\. Command:\s+`([^`]+)`", text):
            path = (page.parent / target).resolve()
            commands.setdefault(path, set()).add(" ".join(command.split()))
    assert len(commands) >= 4  # they were found
    assert [c for c in commands.values() if len(c) > 1] == []
    assert [files for files in names.values() if len(files) > 1] == []


def test_table_of_layers_is_complete() -> None:
    (table,) = (t for t in tables(DOCS / "api.md") if t.head[0] == "Layer")
    said = {
        layer.strip("`"): (module.strip("`"), re.findall(r"(\w+)=([^`]+)`", options))
        for layer, module, options in table.body
    }
    assert said.keys() == {layer.__name__ for layer in nn.LinearAct.by_module.values()}
    for name, (module, options) in said.items():
        layer = getattr(nn, name)
        assert module == f"nn.{layer.torch_module.__name__}"
        taken = inspect.signature(layer.torch_module).parameters
        assert [option for option, _ in options] == [o for o in layer.options if o in taken]
        assert all(getattr(layer(1, 1), key) == ast.literal_eval(value) for key, value in options)
