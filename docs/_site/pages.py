"""What the site shows beside docs/: the README as its first page, and the examples as another one. A hook of mkdocs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    files.append(File.generated(config, "examples.md", content="\n".join(_examples(ROOT / "examples"))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between README, docs and examples lead to files in the repository, and to pages here."""
    markdown = markdown.replace("](../README.md", "](index.md")
    if page.file.src_uri == "index.md":
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(
        r"\]\((?:\.\./)?examples/(\w+)\.(?:py|ipynb)\)", lambda m: f"](examples.md#{_anchor(m[1])})", markdown
    )


def _examples(folder: Path) -> Iterable[str]:
    yield "# Notebooks and examples\n\nEach runs on the miniature checkpoint, without a GPU and without a download.\n"
    for notebook in sorted(folder.glob("*.ipynb"), reverse=True):
        yield f"## {notebook.stem}\n"
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            yield _cell(cell)
    for script in sorted(folder.glob("*.py")):
        source = script.read_text(encoding="utf-8")
        summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        yield f"## {script.stem}\n\n{summary}\n\n```python\n{source}```\n"


def _cell(cell: dict[str, Any]) -> str:
    """Words, code, what it printed and showed; pages within pages are left to the notebook itself."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return re.sub(r"^#+ (.*)", r"### \1", source, flags=re.M) + "\n"
    printed = "".join("".join(output.get("text", ())) for output in cell["outputs"])
    shown = "".join("".join(output.get("data", {}).get("text/html", ())) for output in cell["outputs"])
    if "<iframe" in shown:
        shown = "*A page stands here in the notebook.*"
    return f"```python\n{source}\n```\n" + (f"\n```text\n{printed}```\n" if printed else "") + f"\n{shown}\n"


def _anchor(stem: str) -> str:
    return stem.lower()
