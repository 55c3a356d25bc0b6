"""Every example runs as its docstring says, in a process of its own."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from retrv_r1_retriever.demo.catalogue import SPLITS, make_cards, render

EXAMPLES = Path(__file__).parents[2] / "examples"


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
