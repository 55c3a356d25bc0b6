from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrv_r1_retriever.errors import InputError
from retrv_r1_retriever.evaluation.metrics import values
from retrv_r1_retriever.evaluation.runs import (
    read_qrels,
    read_run,
    read_scored_run,
    run_lines,
    run_of,
    run_tag,
    write_qrels,
    write_run,
)
from retrv_r1_retriever.types import Candidate, Content, Document, Query, RankedResult, RankedResults, Status


def test_run_round_trip(tmp_path: Path) -> None:
    run = {"q1": ["90:3", "90:1", "90:2"], "q2": ["é"]}
    write_run(tmp_path / "run.txt", run, "retrv-hybrid")
    assert read_run(tmp_path / "run.txt") == run
    assert (tmp_path / "run.txt").read_text(encoding="utf-8").splitlines()[0] == "q1 Q0 90:3 1 -1 retrv-hybrid"


def test_neighbouring_scores_stay_apart(tmp_path: Path) -> None:
    """Two float32 with nothing between them: read back as equal, tools that order ties by id would swap them."""
    higher = float(np.nextafter(np.float32(0.7), np.float32(1)))
    (tmp_path / "run.txt").write_text("".join(run_lines("q", [("a", higher), ("b", float(np.float32(0.7)))], "t")))
    (_, first), (_, second) = read_scored_run(tmp_path / "run.txt")["q"]
    assert first > second


def test_the_tag_of_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run.txt", {"q": ["d"]}, "bm25.v2")
    (tmp_path / "run.json").write_text('{"q": {"d": 1}}')
    (tmp_path / "bare.txt").write_text("q Q0 d 1 0.5\n")
    assert [run_tag(tmp_path / name) for name in ("run.txt", "run.json", "bare.txt")] == ["bm25.v2", "", ""]


def test_run_is_ordered_by_score_not_by_line(tmp_path: Path) -> None:
    (tmp_path / "run.txt").write_text("q Q0 low 1 0.1 t\nq Q0 high 2 0.9 t\n")
    assert read_run(tmp_path / "run.txt") == {"q": ["high", "low"]}


def test_qrels_round_trip_and_mbeir_fifth_column(tmp_path: Path) -> None:
    qrels = {"q1": {"a": 1, "b": 0}, "q2": {"c": 2}}
    write_qrels(tmp_path / "qrels.txt", qrels)
    assert read_qrels(tmp_path / "qrels.txt") == qrels
    (tmp_path / "mbeir.txt").write_text("90:1 0 90:7 1 7\n\n")
    assert read_qrels(tmp_path / "mbeir.txt") == {"90:1": {"90:7": 1}}


def test_bad_lines_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text("q 0 d 1\nq 0 d\n")
    with pytest.raises(InputError, match=r"qrels\.txt:2: expected query 0 document grade, got 'q 0 d'"):
        read_qrels(path)
    path.write_text("q 0 d yes\n")
    with pytest.raises(InputError, match=r"qrels\.txt:1: expected a number, got 'yes'"):
        read_qrels(path)
    path.write_text("q 0 d 0.5\n")
    with pytest.raises(InputError, match=r"qrels\.txt:1: expected a whole number as grade, got 0\.5"):
        read_qrels(path)
    path.write_text("q 0 d 1\nq 0 d 1\nq 0 d 0\n")
    with pytest.raises(
        InputError, match=r"qrels\.txt:3: expected one grade per document, got 'd' of query 'q' as 1 and 0"
    ):
        read_qrels(path)
    path.write_bytes("q Q0 é 1 0.5 t\n".encode("latin-1"))
    for read in (read_qrels, read_run):
        with pytest.raises(InputError, match=r"qrels\.txt: expected a readable file, in UTF-8"):
            read(path)
    with pytest.raises(InputError, match="expected ids without spaces, got 'two words'"):
        write_run(path, {"q": ["two words"]}, "t")


def test_a_run_cut_off_inside_a_score_is_no_run(tmp_path: Path) -> None:
    """-11 cut to -1 would carry the document from place 11 to place 1."""
    path = tmp_path / "run.txt"
    write_run(path, {"q": [f"d{n}" for n in range(11)]}, "t")
    path.write_text(path.read_text().removesuffix("1 t\n"))
    with pytest.raises(InputError, match=r"run\.txt:11: expected 6 columns as in the first line, got 'q Q0 d10 11 -1'"):
        read_run(path)
    path.write_text("q Q0 a 1 -1\nq Q0 b 2 -1")
    with pytest.raises(InputError, match=r"run\.txt:2: expected a newline behind the last score, got 'q Q0 b 2 -1'"):
        read_run(path)
    path.write_text("q Q0 a 1 -1\nq Q0 b 2 -2\n\n")
    assert read_run(path) == {"q": ["a", "b"]}
    path.write_text("q Q0 a 1 -1 my tag\nq Q0 b 2 -2 tag")
    assert read_run(path) == {"q": ["a", "b"]}
    path.write_text("")
    assert read_run(path) == {}


def test_what_cannot_be_measured_or_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "qrels.txt"
    path.write_text("q 0 d 1000\nq 0 e 5000\n")
    with pytest.raises(InputError, match=r"qrels\.txt:2: expected a grade of at most 1000, got 5000"):
        read_qrels(path)
    with pytest.raises(InputError, match="grade: expected at most 1000, got 5000"):
        values({"q": ["d"]}, {"q": {"d": 5000}}, "ndcg@10")
    assert values({"q": ["d"]}, {"q": dict.fromkeys(["d", *map(str, range(9))], 1000)}, "ndcg@10")["q"] < 1
    with pytest.raises(InputError, match="expected ids in valid Unicode"):
        write_run(path, {"\ud800": ["d"]}, "t")


def test_run_of_needs_query_ids() -> None:
    result = RankedResult(Candidate(Document("d", Content("x")), None, 1), 1, None)
    assert run_of([RankedResults(Query.of("x", id="q"), (result,), Status.RERANKED)]) == {"q": ["d"]}
    with pytest.raises(InputError, match="query: expected an id, got None"):
        run_of([RankedResults(Query.of("x"), (result,), Status.RERANKED)])
