"""docs/training.md from a CSV to a served checkpoint, and docs/click-logs.md: every block runs, and prints what the page says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("qdrant_edge")

from retrv_r1_training import cli
from transformers import Qwen2_5_VLForConditionalGeneration

from retrv_r1_retriever.cli import app
from retrv_r1_retriever.model.checkpoint import read_manifest

DOCS = Path(__file__).parents[2] / "docs"
PROGRAMS = {"retrv-r1-train": cli.main, "retrv-r1": app.main}


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.S | re.M)


def run(language: str, code: str) -> None:
    if language == "py":
        exec(compile(code, "block", "exec"), {"__name__": "block"})
    elif language == "bash":
        for line in code.replace("\\\n", "").splitlines():
            program, *words = shlex.split(line)
            assert PROGRAMS[program](words) == 0, line
    else:  # a file, named in its first line
        name = re.match(r"# (\S+)\n", code)
        assert name, code
        Path(name[1]).write_text(code)


def test_from_a_csv_to_a_served_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    page = (DOCS / "training.md").read_text("utf-8")
    section = page.split("## From a CSV to a served checkpoint\n")[1].split("\n## ")[0]
    for language, code in blocks(section):
        run(language, code)
        printed = capsys.readouterr().out
    assert "card" in printed or "photos" in printed or ".png" in printed, printed
    served, start = read_manifest(Path("shop-model")), read_manifest(Path("runs/sft/checkpoint"))
    assert served.memory_digest == start.memory_digest, "the index is still valid"
    assert served.think_margin is not None
    assert served.trained_top_k == 8
    assert served.teachers == {"words": ""}
    Qwen2_5_VLForConditionalGeneration.from_pretrained("shop-model")
    rows = [json.loads(line) for line in Path("runs/distill/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_direct" in row] == [0, 2], "before and after"
    card = Path("shop-model/README.md").read_text()
    assert "| thoughts it was trained on | words | that of the data: rules, no model |" in card
    for stage in ("sft", "grpo", "distill"):
        assert f"### {stage}\n" in card


def test_the_page_on_clicks_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (_, code), (_, text) = blocks((DOCS / "click-logs.md").read_text("utf-8"))
    run("py", code)
    assert capsys.readouterr().out == text
