"""The examples run as their docstrings say, in processes of their own; what the miniature answers is its own business."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
pytestmark = pytest.mark.slow  # run by `make pages`


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama_index_query_engine.py", ["wanted: card", "Query: but", "reranked", "opened:"]),
        ("llama_index_existing_collection.py", ["wanted: card 7", "score 1.0", "reranked"]),
    ],
)
def test_it_runs(name: str, expected: list[str]) -> None:
    argv = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for words in expected:
        assert words in done.stdout
