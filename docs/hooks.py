"""mkdocs: README is the home page, notebooks are pages, files that pages link to are copied."""

from __future__ import annotations

import os
import re
from pathlib import Path

from markdown.extensions.toc import slugify
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "examples/README.md",
)
NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))
LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")
ANCHOR = re.compile(r"\]\(#([^)]+)\)")


def in_site(path: Path) -> str:
    """Where a file of the repository is in the site: files of docs/ are at its top."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    return name.removeprefix("docs/").replace(".ipynb", ".md")


def pages_of_notebooks(config: MkDocsConfig) -> list[File]:
    """With the outputs as they are committed: nothing is executed."""
    files = []
    for path in NOTEBOOKS:
        names = {"unique_key": path.stem, "output_files_dir": "outputs"}
        body, resources = MarkdownExporter().from_filename(str(path), resources=names)
        files.append(File.generated(config, in_site(path), content=body))
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
        for output, content in resources["outputs"].items():
            files.append(File.generated(config, f"examples/{output}", content=content))
    return files


def on_config(config: MkDocsConfig) -> None:
    # Its links start at the root of a host, and the site may be in any folder of one.
    config.theme.static_templates.discard("404.html")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in pages_of_notebooks(config):
        files.append(file)
    outside = {ROOT / name for name in PAGES}
    for page in [*outside, *ROOT.glob("docs/*.md")]:
        outside |= {
            (page.parent / target).resolve() for _, target, _ in LINK.findall(page.read_text())
        }
    for path in sorted(outside):
        if path.is_file() and in_site(path) not in files.src_uris:
            files.append(File.generated(config, in_site(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = Path(page.file.src_uri)
    notebook = ROOT / uri.with_suffix(".ipynb")
    is_notebook = notebook in NOTEBOOKS
    source = notebook if is_notebook else Path(page.file.abs_src_path)

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups("")
        path = (source.parent / target).resolve()
        if not path.exists():  # an output of a notebook
            return match[0]
        if path.is_dir():
            return text
        return f"[{text}]({os.path.relpath(in_site(path), uri.parent)}{anchor})"

    markdown = LINK.sub(link, markdown)
    if is_notebook:  # Jupyter's anchors are its headings with hyphens
        markdown = ANCHOR.sub(lambda m: f"](#{slugify(m[1], '-')})", markdown)
        markdown += f"\n\n---\n\n[Download this notebook]({notebook.name})\n"
    return markdown
