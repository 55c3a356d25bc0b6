"""`retrv-r1 view` over what `--traces` stored."""

from __future__ import annotations

from pathlib import Path

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
        "report": "new/last.html", "calls": 1,
    }  # fmt: skip
    assert "a red circle" not in (workplace / "new" / "last.html").read_text(encoding="utf-8")


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
