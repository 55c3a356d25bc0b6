"""Ranked results made by hand, with the catalogue's pictures: what the report must be able to show."""

from __future__ import annotations

import random

from PIL import Image

from retrv_r1_retriever.demo.catalogue import Card, render
from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.parser import render as render_turn
from retrv_r1_retriever.prompt import NONE_INDEX, build_prompt
from retrv_r1_retriever.report import ReportEntry
from retrv_r1_retriever.trace import ReasoningTrace, Usage
from retrv_r1_retriever.types import (
    Candidate,
    Content,
    Document,
    Query,
    RankedResult,
    RankedResults,
    Signals,
    Status,
    StopReason,
)

COLOURS = ("red", "red", "red", "purple", "blue", "red", "green", "orange", "cyan", "yellow", "black", "red")
SHAPES = ("ring", "ring", "ring", "ring", "circle", "cross", "ring", "square", "ring", "ring", "diamond", "triangle")
CODES = ("471", "472", "417", "118", "902", "335", "471", "472", "640", "059", "226", "781")
VERSIONS = {"checkpoint": "sha256:7c1d09be", "memory": "sha256:41aa0f52", "torch": "2.13.0", "transformers": "5.23.0"}


def card(number: int) -> Image.Image:
    return render(
        Card(("two", COLOURS[number], SHAPES[number], "stripes", "thin"), CODES[number]), random.Random(number)
    )


def picture_candidates() -> list[Candidate]:
    return [
        Candidate(Document(f"90:31000{n:02}", Content(image=card(n))), 0.912 - 0.017 * n, n + 1)
        for n in range(len(CODES))
    ]


def rescued() -> ReportEntry:
    """The right card is third in the first stage; two inspections find it."""
    candidates = picture_candidates()
    verdicts = ["keep", "keep", "keep", "purple", "blue", "cross", "green", "orange", "cyan", "yellow", "black"]
    thought = Thought(
        "two red ring stripes thin a4 b1 c7",
        tuple(Verdict(i, text) for i, text in enumerate([*verdicts, "triangle"])),
        (Check(0, "a4 same b7 differs c1 differs differs", False), Check(2, "a4 same b1 same c7 same match", True)),
        2,
    )
    query = Query.of("two red ring stripes thin a4 b1 c7", None, "Find the card for this text.", "90:3100001")
    order = [2, 1, 5, 11, 3, 4, 6, 7, 8, 9, 10, 0]
    results = []
    for rank, index in enumerate(order, 1):
        check = next((c for c in thought.checks if c.index == index), None)
        signals = Signals(
            keep_logprob=-0.1 * rank,
            verdict=thought.verdicts[index].text,
            opened=check is not None,
            match=check.match if check else None,
        )
        results.append(RankedResult(candidates[index], rank, 0.97 / rank, index == 2, signals))
    trace = ReasoningTrace(
        segments=(*build_prompt(query, candidates).segments, *render_turn(thought)),
        answer=2,
        inspected=(0, 2),
        stop_reason=StopReason.ANSWERED,
        usage=Usage(92, 588, 61, 44),
        timings={"direct_read": 0.0184, "total": 0.0213, "first_stage": 0.0021},
        versions=VERSIONS,
        notes=("think=auto means always here: the checkpoint is not calibrated",),
    )
    return ReportEntry(
        RankedResults(query, tuple(results), Status.RERANKED, trace=trace), "text → image", frozenset({"90:3100002"})
    )


def text_list() -> ReportEntry:
    """A picture query over long texts; the model says that none fits, and was cut short."""
    texts = (
        "two red ring stripes thin a4 b7 c1",
        "A field guide to striped cards, second edition, with forty plates and an index of every code printed since 1998 "
        * 3,
        "one black diamond dots bare a0 b0 c7",
    )
    candidates = [
        Candidate(Document(f"text-{n}", Content(text)), 0.61 - 0.1 * n, n + 1) for n, text in enumerate(texts)
    ]
    query = Query.of(None, card(0), "Find the text for this card.")
    thought = Thought(
        "two red ring", (Verdict(0, "keep"), Verdict(2, "black")), (Check(0, "a4 same b7", None),), NONE_INDEX
    )
    results = tuple(
        RankedResult(c, n + 1, (0.5, 0.3, 0.1)[n], signals=Signals(verdict=(None, None, "black")[n], opened=n == 0))
        for n, c in enumerate(candidates)
    )
    trace = ReasoningTrace(
        segments=(*build_prompt(query, candidates).segments, *render_turn(thought)),
        answer=NONE_INDEX,
        inspected=(0,),
        stop_reason=StopReason.FORCED_BY_BUDGET,
        usage=Usage(40, 190, 33, 9, 1),
        timings={"first stage": 0.0018, "model": 0.0121},
        versions=VERSIONS,
    )
    ranked = RankedResults(query, results, Status.PARTIAL, True, "one candidate was not judged", ("text-1",), trace)
    return ReportEntry(ranked, "image → text")


def fallback() -> ReportEntry:
    candidates = picture_candidates()[:4]
    query = Query.of("but purple", card(1), "Find the card after this change.")
    results = tuple(RankedResult(c, c.rank, None) for c in candidates)
    ranked = RankedResults(query, results, Status.FALLBACK, reason="the engine did not answer within 2.0 s")
    return ReportEntry(ranked, "image + text → image", note="Shown as the first stage returned it.")


def many(count: int) -> list[ReportEntry]:
    """Lists of 50 with pictures, of all states: the page that a day of traces makes."""
    pictures = [card(number) for number in range(len(CODES))]
    return [_one_of_many(number, pictures) for number in range(count)]


def _one_of_many(number: int, pictures: list[Image.Image]) -> ReportEntry:
    words = f"{COLOURS[number % 12]} shoe for trail running, number {number}"
    candidates = [
        Candidate(
            Document(f"sku-{number}-{n}", Content(f"shoe {n} in {COLOURS[n % 12]}", pictures[n % 12])), 0.9, n + 1
        )
        for n in range(50)
    ]
    query = Query.of(words, None, "Find the product.", f"q{number}")
    if number % 10 == 9:
        unranked = tuple(RankedResult(c, c.rank, None) for c in candidates)
        return ReportEntry(RankedResults(query, unranked, Status.FALLBACK, reason="the engine did not answer"))
    verdicts = tuple(Verdict(n, "keep" if n % 5 == 0 else COLOURS[n % 12]) for n in range(20))
    thought = Thought(words, verdicts, (Check(3, "it is a match", True),), 3)
    order = [3, *(n for n in range(50) if n != 3)] if number % 2 else list(range(50))
    results = tuple(
        RankedResult(
            candidates[n], rank, 1 - (rank - 1) / 50, n == 3, Signals(-0.1 * rank, -0.2 * n, None, n == 3, None)
        )
        for rank, n in enumerate(order, 1)
    )
    trace = ReasoningTrace(
        segments=(*build_prompt(query, candidates).segments, *render_turn(thought)),
        candidates=tuple(c.document.id for c in candidates),
        answer=3,
        inspected=(3,),
        stop_reason=StopReason.FORCED_BY_BUDGET if number % 7 == 0 else StopReason.ANSWERED,
        usage=Usage(200, 4000, 90, 80),
        timings={"direct_read": 0.02, "think": 0.3, "total": 0.33},
        versions=VERSIONS,
        cached=number == 1,
    )
    status = Status.PARTIAL if number % 4 == 0 else Status.RERANKED
    reason = "1 of 50 candidates were not judged" if status is Status.PARTIAL else None
    return ReportEntry(RankedResults(query, results, status, reason=reason, trace=trace))
