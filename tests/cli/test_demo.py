"""The demo on a small catalogue and an untrained model: everything but being right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.demo import run as demo
from retrv_r1_retriever.demo.catalogue import LabelledQuery
from retrv_r1_retriever.types import (
    Candidate,
    Content,
    Document,
    Query,
    RankedResult,
    RankedResults,
    Signals,
    Status,
)
from tests.cli.conftest import Run


@pytest.fixture
def small_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = catalogue.combos
    monkeypatch.setattr(catalogue, "combos", lambda part: everything(part)[:16])
    monkeypatch.setitem(catalogue.SPLITS, "test", replace(catalogue.SPLITS["test"], queries=3))


@pytest.mark.usefixtures("small_catalogue")
def test_demo_runs_twice(workplace: Path, run: Run) -> None:
    first = run("demo", "--dir", "d", "--queries", 2)
    assert first.code == 0, first.err
    for words in (
        "text → image",
        "image → text",
        "image + text → image",
        "all 12 scanned queries",
        "64 documents indexed",
    ):
        assert words in first.out
    page = (workplace / "d" / "report.html").read_text()
    assert "All 12 scanned queries" in page
    assert page.count("<img") > 20
    again = run("demo", "--dir", "d", "--queries", 1, "--json")
    assert again.json["scanned"]["all"]["queries"] == "6"
    assert {s["kind"] for s in again.json["shown"]} == set(demo.KINDS.values())
    assert "cards" not in again.err


def ranked(was: int, *, opened: bool, match: bool | None, id: str = "right") -> RankedResults:
    candidate = Candidate(Document(id, Content("x")), 0.5, was)
    result = RankedResult(candidate, 1, 1.0, True, Signals(opened=opened, match=match))
    return RankedResults(Query.of("q"), (result,), Status.RERANKED)


QUERY = LabelledQuery(Query.of("q"), "t2i", "fine", ("right",), "image", "x")


def test_what_counts_as_rescued_by_an_inspection() -> None:
    assert demo.rescued_by_inspection(QUERY, ranked(3, opened=True, match=True))
    assert not demo.rescued_by_inspection(QUERY, ranked(1, opened=True, match=True)), "was right before"
    assert not demo.rescued_by_inspection(QUERY, ranked(3, opened=False, match=None)), "was never opened"
    assert not demo.rescued_by_inspection(QUERY, ranked(3, opened=True, match=False)), "chosen against the check"
    assert not demo.rescued_by_inspection(QUERY, ranked(3, opened=True, match=True, id="wrong"))


def test_shown_queries_are_the_first_rescued_one_and_the_first_one() -> None:
    plain, rescued = ranked(1, opened=False, match=None), ranked(2, opened=True, match=True)
    pairs = [(QUERY, plain), (QUERY, rescued), (QUERY, rescued)]
    shown = demo._pick("t2i", pairs, lambda query: True)
    assert [(s.rescued, s.results) for s in shown] == [(True, rescued), (False, plain)]
    assert not any(s.rescued for s in demo._pick("t2i", pairs, lambda query: False)), "right without an inspection, too"
    assert [s.rescued for s in demo._pick("t2i", pairs[:1], lambda query: True)] == [False]
