"""The notebooks run from top to bottom, and those in the repository hold what a run with the shipped checkpoint printed.

`make notebooks` runs them and stores what they print.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    NotebookClient(
        book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()  # raises what a cell raises
    if os.environ.get("RETRV_KEEP_NOTEBOOKS"):
        for cell in book.cells:
            cell.metadata = {}
            if cell.cell_type == "code":  # warnings name folders of this machine
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(book, path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_before_it_was_stored(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)


def test_the_stored_pages_are_of_the_shipped_checkpoint() -> None:
    manifest = json.loads((ROOT / "retrv_r1_retriever/demo/checkpoint/retrv/manifest.json").read_text(encoding="utf-8"))
    stored = {path.stem: path.read_text(encoding="utf-8") for path in NOTEBOOKS}
    assert set(stored) == {"quickstart", "existing_collection", "agent"}
    for name in ("quickstart", "agent"):
        assert f"<code>{manifest['checkpoint_digest']}</code>" in stored[name], f"{name} is older: make notebooks"
