"""`eval mbeir` with a model: what was lost between two runs, whose results stand where, what is printed."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.cli.conftest import Run
from tests.evaluation.mbeir_root import write_root

COMMAND = ("eval", "mbeir", "--root", "data", "--tasks", "webqa_task1", "--mode", "never/logits", "--json")


def _rows(pattern: str) -> list[dict]:
    [path] = Path("mbeir-eval/lists").glob(pattern)
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_mbeir_makes_lost_memory_again(workplace: Path, run: Run) -> None:
    """It is more than one call may make again for itself (`max_recompute`): the rest would not be judged."""
    write_root(workplace / "data", 14, 2)
    command = (*COMMAND, "--top-k", 12)
    first = run(*command).json
    assert first["tasks"]["webqa_task1"]["systems"]["K=12 never/logits"]["statuses"] == {"reranked": 2}
    [memory] = Path("mbeir-eval/index").glob("*/memory.sqlite")
    [reranked] = Path("mbeir-eval/lists").glob("*K12*")
    memory.unlink()
    reranked.unlink()
    assert run(*command).json == first


def test_mbeir_keeps_no_row_of_candidates_without_memory(workplace: Path, run: Run) -> None:
    write_root(workplace / "data", 14, 2)
    run(*COMMAND, "--top-k", 1)  # the index
    [memory] = Path("mbeir-eval/index").glob("*/memory.sqlite")
    right = memory.read_bytes()
    with closing(sqlite3.connect(memory)) as file, file:
        file.execute("""UPDATE memory SET note = json_set(note, '$.content_hash', 'of other content')""")
    ran = run(*COMMAND, "--top-k", 12)
    assert ran.code == 1
    problems = ran.json["tasks"]["webqa_task1"]["problems"]
    assert [line.partition(": ")[2] for line in problems] == [
        "not as asked for: 4 of 12 candidates have no usable memory"
    ] * 2
    assert _rows("*K12*") == []
    memory.write_bytes(right)
    again = run(*COMMAND, "--top-k", 12).json["tasks"]["webqa_task1"]
    assert again["problems"] == []
    assert again["systems"]["K=12 never/logits"]["statuses"] == {"reranked": 2}


def test_mbeir_says_which_recalls_a_small_k_cannot_change(workplace: Path, run: Run) -> None:
    write_root(workplace / "data", 14, 1)
    tasks = "webqa_task1,cirr_task7,fashioniq_task7"
    command = ("eval", "mbeir", "--root", "data", "--tasks", tasks, "--mode", "never/logits", "--top-k", "5,6,11")
    notes = [
        "K=5: reranking the first 5 cannot change R@5 (2 tasks) and R@10 (1 tasks); take a larger --top-k",
        "K=6: reranking the first 6 cannot change R@10 (1 tasks); take a larger --top-k",
    ]
    out = " ".join(run(*command, "--report", "page.html").out.split())
    assert all(note in out for note in notes)
    assert "K=11: reranking" not in out
    assert all(note in Path("page.html").read_text() for note in notes)
    assert run(*command, "--json").json["notes"] == notes
