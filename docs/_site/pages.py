"""What the site shows beside docs/: the README as its first page, and the examples as pages. A hook of mkdocs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    scripts = sorted((ROOT / "examples").glob("*.py"))
    files.append(File.generated(config, "examples.md", content=_contents(scripts)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between README, docs and examples lead to files in the repository, and to pages here."""
    markdown = markdown.replace("](../README.md", "](index.md")
    if page.file.src_uri == "index.md":
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(r"\]\((?:\.\./)?examples/(\w+)\.(?:py|ipynb)\)", lambda m: f"](examples.md#{_anchor(m[1])})", markdown)


def _contents(scripts: list[Path]) -> str:
    parts = ["# Notebooks and examples\n\nEach runs on the miniature checkpoint, without a GPU and without a download.\n"]
    for script in scripts:
        source = script.read_text(encoding="utf-8")
        summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        parts.append(f"## {script.stem}\n\n{summary}\n\n```python\n{source}```\n")
    return "\n".join(parts)


def _anchor(stem: str) -> str:
    return stem.lower()
