"""The report: self-contained, escaped, and complete in what it says."""

from __future__ import annotations

import base64
import hashlib
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image

from retrv_r1_retriever.images import LocalImages, image_reference
from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.parser import render as render_turn
from retrv_r1_retriever.prompt import NONE, build_prompt, label
from retrv_r1_retriever.report import ReportEntry, ReportTable, render_report, write_report
from retrv_r1_retriever.report.markup import html
from retrv_r1_retriever.report.pictures import loader
from retrv_r1_retriever.trace import ReasoningTrace
from retrv_r1_retriever.types import Candidate, Content, Document, Query, RankedResult, RankedResults, Signals, Status
from tests.report.samples import card, fallback, rescued, text_list

ATTACK = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>"


class Elements(HTMLParser):
    """Every start tag with its attributes, and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def attacked() -> ReportEntry:
    """The payload in every place that foreign text can reach."""
    query = Query.of(ATTACK, None, ATTACK, ATTACK)
    candidates = [Candidate(Document(ATTACK + str(n), Content(ATTACK)), 0.5, n + 1) for n in range(2)]
    thought = Thought(ATTACK, (Verdict(0, ATTACK), Verdict(1, "keep")), (Check(0, ATTACK, None),), 0)
    trace = ReasoningTrace(
        (*build_prompt(query, candidates).segments, *render_turn(thought)),
        answer=0,
        inspected=(0,),
        versions={ATTACK: ATTACK},
        notes=(ATTACK,),
        timings={ATTACK: 1.0},
    )
    signals = Signals(verdict=ATTACK)
    results = tuple(RankedResult(c, c.rank, 0.5, signals=signals) for c in candidates)
    return ReportEntry(
        RankedResults(query, results, Status.FALLBACK, reason=ATTACK, trace=trace), ATTACK, frozenset(), ATTACK
    )


def test_foreign_text_never_becomes_markup() -> None:
    table = ReportTable(ATTACK, (ATTACK, ATTACK), ((ATTACK, ATTACK),), ATTACK)
    page = Elements(render_report([attacked(), rescued()], title=ATTACK, intro=ATTACK, tables=[table]))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 15


def test_foreign_text_stays_text_on_a_page_of_many() -> None:
    """There the page has one script, which its policy names by its hash: no other one could run."""
    source = render_report([attacked()] * 20, title=ATTACK)
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", source, re.S)
    code = (resources.files("retrv_r1_retriever.report") / "report.js").read_text(encoding="utf-8")
    assert scripts == ["[]", code]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in source
    assert "script-src 'none'" in render_report([attacked()])
    page = Elements(source.replace(code, ""))
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 20 * 10


def test_page_needs_nothing_from_outside() -> None:
    source = render_report([rescued(), text_list(), fallback()])
    page = Elements(source)
    references = [attrs[name] for _, attrs in page.tags for name in ("src", "href") if name in attrs]
    assert references
    assert all(r and r.startswith(("data:image/", "#q")) for r in references)
    assert "url(" not in source
    assert "@import" not in source


def test_opened_candidates_show_picture_check_and_verdict() -> None:
    source = render_report([rescued()])
    text = Elements(source).text
    assert "The right answer rose from rank 3 to rank 1 after opening 2 candidates in full." in text
    assert "Opens #1 in full" in text
    assert "Opens #3 in full" in text
    assert "a4 same b7 differs c1 differs differs" in text
    opened = re.findall(r"<li class='opened (\w+)'>.*?</li>", source, re.S)
    assert opened == ["differs", "match"]
    assert "92 prompt tokens instead of 588" in text
    assert "sha256:7c1d09be" in text


def test_timings_follow_the_pipeline() -> None:
    text = Elements(render_report([rescued()])).text
    assert "first stage 2.1 msdirect read 18.4 mstotal 21.3 ms" in text


def test_scores_stand_beside_each_other() -> None:
    text = Elements(render_report([rescued()])).text
    assert "0.970 retrieval 0.878" in text
    assert "▲ 2was 3" in text


def test_a_fallback_is_not_presented_as_a_reranking() -> None:
    text = Elements(render_report([fallback()])).text
    assert "Not reranked, first-stage order shown: the engine did not answer within 2.0 s" in text
    assert "reranked by the model" not in text


def test_none_chosen_forced_and_unjudged_are_said() -> None:
    text = Elements(render_report([text_list()])).text
    for words in ("no candidate fits", "answer forced: budget spent", "1 not judged", "undecided"):
        assert words in text


def test_none_fits_is_said_of_what_the_reranker_returns() -> None:
    """Its trace has no answer then: the answer is in `none_chosen`."""
    entry = text_list()
    trace = entry.results.trace
    assert trace is not None
    usage = replace(trace.usage, unknown_labels=3, without_verdict=1)
    ranked = replace(entry.results, trace=replace(trace, answer=None, usage=usage))
    text = Elements(render_report([replace(entry, results=ranked)])).text
    assert "No candidate fits." in text
    assert "No answer was given" not in text
    assert "The model answered that no candidate fits after opening 1 candidate in full; its next-best order is" in text
    assert "verdicts on unknown labels 3" in text
    assert "candidates without a verdict 1" in text
    known = Elements(render_report([replace(entry, results=ranked, positives=frozenset({"text-1"}))])).text
    assert "no candidate fits after opening 1 candidate in full. The right answer stayed at rank 2." in known
    cut = Elements(render_report([replace(entry, results=replace(ranked, none_chosen=False))])).text
    assert "No answer was given." in cut


def test_queries_in_the_contents_can_be_told_apart() -> None:
    """Pictures alone have no words, and the same may have happened to them."""
    entry = text_list()

    def pictured(image: object, id: str | None = None) -> ReportEntry:
        return replace(entry, results=replace(entry.results, query=Query.of(None, image, None, id)))  # type: ignore[arg-type]

    uri = image_reference(card(1))
    asked = [pictured("a/query1.png"), pictured(Path("a/query2.png"), "q"), pictured(card(0), "id-7"), pictured(uri)]
    source = render_report([*asked, pictured(card(2))])
    items = re.findall(r"<li><a href='#q\d'>.*?</li>", source)
    named = [re.findall(r"<b>(.*?)</b>", item)[0] for item in items]
    assert named == ["query1.png", "query2.png", "id-7", "a picture", "a picture"]
    assert ["<img" in item for item in items] == [False, False, True, True, True], "no file is read here"
    assert len(set(items)) == 5
    folded = render_report([*asked] * 3)
    assert re.findall(r"<span class='asked'>.*?<b>(.*?)</b>", folded)[:4] == named[:4]


def test_a_reason_against_a_candidate_is_said_to_be_one() -> None:
    assert "the model&#x27;s first reason against it; keep means none was found" in render_report([rescued()])


def test_cells_carry_their_columns_name() -> None:
    table = ReportTable("t", ("", "R@1", "R@5"), (("all", "0.1", "0.5"),))
    source = render_report([], tables=[table])
    assert "<td data-name='R@1'>0.1</td><td data-name='R@5'>0.5</td>" in source


def test_checks_are_shown_without_labels() -> None:
    candidates = [Candidate(Document(f"d{n}", Content("x")), 0.5, n + 1) for n in range(3)]
    thought = Thought("x", (), (Check(1, f"a4 differs{label(2)}{NONE}{NONE}{NONE}", None),), 1)
    trace = ReasoningTrace(render_turn(thought), answer=1, inspected=(1,), candidates=("d0", "d1", "d2"))
    results = tuple(RankedResult(c, c.rank, 0.5) for c in candidates)
    page = render_report([ReportEntry(RankedResults(Query.of("q"), results, Status.RERANKED, trace=trace))])
    assert "<p class='check'>a4 differs #3 none (×3)</p>" in page


def test_right_answer_outside_the_candidates_is_said() -> None:
    text = Elements(render_report([replace(rescued(), positives=frozenset({"elsewhere"}))])).text
    assert "The right answer is not among the results" in text


def test_tiny_pictures_stay_sharp_and_large_ones_are_shrunk(tmp_path: Path) -> None:
    noise = random.Random(0).randbytes(1200 * 900 * 3)
    large = Image.frombytes("RGB", (1200, 900), noise)
    large.save(tmp_path / "large.png")
    card(1).save(tmp_path / "tiny.png")
    documents = [Document(name, Content(image=name)) for name in ("large.png", "tiny.png", "missing.png")]
    results = tuple(RankedResult(Candidate(d, 0.5, n + 1), n + 1, 0.5) for n, d in enumerate(documents))
    entry = ReportEntry(RankedResults(Query.of("x"), results, Status.RERANKED))
    path = write_report(tmp_path / "sub" / "page.html", [entry], images=LocalImages(tmp_path))
    images = [attrs for tag, attrs in Elements(path.read_text(encoding="utf-8")).tags if tag == "img"]
    assert [i["class"] for i in images] == ["pic", "pic tiny"]
    assert path.stat().st_size < 150_000


@pytest.mark.parametrize(
    "location", ["../secret.png", "/etc/hostname", "http://host/x.png", "data:image/png;base64,AAAA", b"junk"]
)
def test_pictures_outside_the_root_or_broken_are_left_out(tmp_path: Path, location: str | bytes) -> None:
    (tmp_path / "root").mkdir()
    card(0).save(tmp_path / "secret.png")
    assert loader(LocalImages(tmp_path / "root"))(location) is None


def test_markup_escapes_quotes() -> None:
    assert html("<a title='{}'>", "' onclick='x") == "<a title='&#x27; onclick=&#x27;x'>"


def test_labels_are_translated_to_first_stage_ranks() -> None:
    """A candidate without usable memory has no label: label 0 is then the second of the first stage."""
    entry = rescued()
    trace = entry.results.trace
    assert trace is not None
    ids = tuple(f"90:31000{n:02}" for n in range(1, 12))
    shifted = replace(entry, results=replace(entry.results, trace=replace(trace, candidates=ids)))
    text = Elements(render_report([shifted])).text
    assert "Opens #2 in full" in text
    assert "Opens #4 in full" in text
    assert "#4 is the one." in text


def test_a_source_that_raises_anything_costs_its_picture_only() -> None:
    class Remote:
        async def load(self, image: object) -> object:
            raise ConnectionError("no route to host")

    assert loader(Remote())("a.png") is None  # type: ignore[arg-type]
