"""docs/training-data.md from top to bottom in one folder: every block runs, and prints what the page says it prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from retrv_r1_training import cli

from retrv_r1_retriever.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "training-data.md"


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    pytest.importorskip("qdrant_edge")
    printed = ""
    for language, code in re.findall(r"^```(py|bash|text)\n(.*?)^```", PAGE.read_text("utf-8"), re.S | re.M):
        if language == "text":
            assert printed == code
        elif language == "py":
            exec(compile(code, "block", "exec"), {"__name__": "block"})
        else:
            for line in code.replace("\\\n", "").splitlines():
                program, *words = shlex.split(line)
                assert {"retrv-r1-train": cli.main, "retrv-r1": app.main}[program](words) == 0
        printed = capsys.readouterr().out
    assert printed.count("card by ACME") == 4, "two lists of two"
