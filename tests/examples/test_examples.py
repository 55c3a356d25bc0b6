"""Every example runs as its docstring says, in a process of its own."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from retrv_r1_retriever.demo.catalogue import SPLITS, make_cards, render

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.slow  # run by `make pages`


def test_own_pictures(tmp_path):
    cards = [card for card, _ in make_cards(SPLITS["test"])[:30]]
    for i, card in enumerate(cards):
        render(card, random.Random(i)).save(tmp_path / f"card{i:02}.png")
    query = tmp_path.parent / "query.png"
    render(cards[7], random.Random(99)).save(query)
    argv = [sys.executable, str(EXAMPLES / "own_pictures.py"), str(tmp_path), "but two", "--image", str(query)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "30 pictures indexed, 0 failed" in done.stdout
    assert "reranked" in done.stdout
    assert "<think>" in done.stdout


def run(name: str, *arguments: str) -> str:
    argv = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_langchain_rag():
    out = run("langchain_rag.py")
    assert "retrv_r1.retrieved {'candidates': 20}" in out
    assert "retrv_r1.thinking" in out
    assert "retrv_r1.answered reranked" in out
    assert out.count(".png, reranked)") == 3
    assert "Question: two green triangle" in out


def test_langchain_existing_collection():
    out = run("langchain_existing_collection.py")
    for name in ("dense", "hybrid", "named"):
        assert f"{name}, all:" in out
        assert f"{name}, only red:" in out
    assert out.count("unchanged: True") == 3
    assert out.count("reranked") == 18


def test_hosted_vlm():
    out = run("hosted_vlm.py")
    assert out.startswith("reranked")
    assert "1. red-shoe" in out
    assert "opened" in out
    assert "requests: 2" in out


def test_langgraph_agent():
    lines = dict(line.split(": ", 1) for line in run("langgraph_agent.py").splitlines())
    assert lines["answer"] == f"That is {lines['asked for card-7']} [card-7]."
    assert lines["answer to a second question"].endswith("[card-3].")
    assert lines["status"].endswith("| candidates read: 20")
    assert lines["pictures shown to the model"] == "10"
