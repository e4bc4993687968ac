"""mkdocs: README is the home page, and the site has the files outside docs/ that pages link to."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "examples/README.md",
)
LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")


def in_site(path: Path) -> str:
    """Where a file of the repository is in the site: files of docs/ are at its top."""
    name = path.relative_to(ROOT).as_posix()
    return "index.md" if name == "README.md" else name.removeprefix("docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
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
    source = Path(page.file.abs_src_path)

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups("")
        path = (source.parent / target).resolve()
        if path.is_dir():
            return text
        uri = os.path.relpath(in_site(path), Path(page.file.src_uri).parent)
        return f"[{text}]({uri}{anchor})"

    return LINK.sub(link, markdown)
