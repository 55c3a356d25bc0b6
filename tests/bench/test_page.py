"""The page of benchmarks: as committed it is what the files give, and what was not measured is said."""

from __future__ import annotations

import json
from pathlib import Path

from retrv_r1_retriever.bench import page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_made_of_the_files_beside_it():
    assert (DOCS / "benchmarks.md").read_text("utf-8") == page.page(DOCS / "bench", DOCS)


def test_what_has_no_file_is_not_measured_and_a_missed_goal_is_said(tmp_path):
    assert page.page(tmp_path, tmp_path).count("Not measured.") == len(page.SECTIONS)
    rows = [
        {"task": "image + text", "mode": mode, "ms": ms}
        for mode, ms in (("U", 100.0), ("U'", 45.0), ("C", 50.0), ("F", 5.0))
    ]
    shape = {"ceiling": {"flops": 3e10, "bytes": 2e9}, "modes": rows, "stages": []}
    (tmp_path / "ratio").mkdir()
    (tmp_path / "ratio/bench.json").write_text(json.dumps({"command": "python -m x", "rounds": 7, "shapes": [shape]}))
    text = page.page(tmp_path, tmp_path)
    assert "`python -m x`" in text
    assert "U/C without thought: 2.0, goal 2.5 (missed by 0.5)." in text
    assert "U/F without thought: 20.0, goal 8.0 (met)." in text
    assert "With the same caches, U'/F: 9.0." in text
    calls = [
        {"task": "t2i", "mode": mode, "outside the model ms": ms, "fetch ms": ms / 2, "prompt ms": 0.5, "rest ms": 0.5}
        for mode, ms in (("a", 4.0), ("b", 4.9), ("b", 7.5), ("c", 9.0))
    ]
    (tmp_path / "outside.json").write_text(json.dumps({"command": "python -m y", "calls": calls, "fetch": calls}))
    text = page.page(tmp_path, tmp_path)
    assert (
        "a: everything outside the model takes at most 4.0 ms, goal 5.0 (met); fetch, prompt and rest together at most 3.0, "
        "goal 5.0 (met)." in text
    )
    assert (
        "at most 7.5 ms, goal 5.0 (missed by 2.5); fetch, prompt and rest together at most 4.8, goal 5.0 (met)." in text
    )
    assert "fetch, prompt and rest together at most 5.5, goal 5.0 (missed by 0.5)." in text
