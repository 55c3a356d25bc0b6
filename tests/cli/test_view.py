"""`retrv-r1 view` over what `--traces` stored."""

from __future__ import annotations

from pathlib import Path

from retrv_r1_retriever.tracelog import to_line
from retrv_r1_retriever.types import Query, RankedResults, Status
from tests.cli.conftest import Run, checkpoint

__all__ = ["checkpoint"]


def test_searches_are_stored_and_shown(run: Run, workplace: Path) -> None:
    run("index", "items")
    for words in ("a red circle", "<b>two</b>"):
        run("search", "--text", words, "--traces", "traces.jsonl")
    viewed = run("view", "traces.jsonl")
    assert viewed.out == "2 calls: traces.html\n"
    page = (workplace / "traces.html").read_text(encoding="utf-8")
    assert "a red circle" in page
    assert "&lt;b&gt;two&lt;/b&gt;" in page
    assert "card1" in page
    assert page.count("<img") > 3  # pictures are read again from where the config says
    assert run("view", "traces.jsonl", "--last", 1, "--out", "new/last.html", "--json").json == {
        "report": "new/last.html", "calls": 1, "stored": 2,
    }  # fmt: skip
    assert "a red circle" not in (workplace / "new" / "last.html").read_text(encoding="utf-8")


def test_a_page_has_the_last_thousand_and_says_so(run: Run, workplace: Path) -> None:
    lines = [to_line(RankedResults(Query.of(f"query {n}"), (), Status.FALLBACK, reason="none")) for n in range(1001)]
    (workplace / "many.jsonl").write_text("\n".join(lines) + "\n")
    assert run("view", "many.jsonl").out == "1,000 calls of 1,001, --last N shows more: many.html\n"
    page = (workplace / "many.html").read_text(encoding="utf-8")
    assert "query 1000<" in page
    assert "query 0<" not in page
    assert run("view", "many.jsonl", "--last", 2000).out == "1,001 calls: many.html\n"


def test_what_is_no_trace_is_named(run: Run, workplace: Path) -> None:
    (workplace / "newer.jsonl").write_text('{"record_version": 2}\n')
    newer = run("view", "newer.jsonl")
    assert (newer.code, newer.err) == (
        2,
        "retrv-r1: newer.jsonl:1: record_version: expected 1, got 2. "
        "Read it with the release that wrote it, or a newer one.\n",
    )
    (workplace / "empty.jsonl").write_text("")
    assert "expected at least one trace, got none" in run("view", "empty.jsonl").err
    assert "expected a file of traces" in run("view", "none.jsonl").err
    assert run("search", "--text", "x", "--traces", "no/t.jsonl").code == 2
