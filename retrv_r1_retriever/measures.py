"""What is counted about a ranked list, under one set of names for Prometheus (`serve`) and OpenTelemetry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from retrv_r1_retriever.types import RankedResults

#: Part of a reason -> its label; the first that fits. A test holds them against what the core writes.
REASONS = (
    ("timed out", "timeout"),
    ("the thought failed", "thought_failed"),
    ("no usable memory", "no_memory"),
    ("has usable memory", "no_memory"),
    ("could not be opened", "not_opened"),
    ("were not named", "not_named"),
    ("no candidates", "no_candidates"),
    ("nothing to rank", "no_candidates"),
    ("neither a text nor a picture", "blank_documents"),
)
#: Bounds of the histograms, in seconds.
SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TOKENS = ("prompt", "uncompressed", "sampled", "inspected")


@dataclass(frozen=True, slots=True)
class Measure:
    """One instrument. No label can take on more than a handful of values."""

    name: str
    kind: Literal["counter", "histogram"]
    words: str
    labels: tuple[str, ...] = ()


CALL_SECONDS = Measure("retrv_call_seconds", "histogram", "Whole call", ("route",))
STAGES = Measure("retrv_stage_seconds", "histogram", "Stages of a call", ("stage",))
RESULTS = Measure("retrv_results", "counter", "Ranked lists, by who decided", ("route", "status", "reason"))
THOUGHTS = Measure("retrv_thoughts", "counter", "Lists the model thought about; / retrv_results = think share")
INSPECTIONS = Measure("retrv_inspections", "counter", "Candidates opened in full")
STALE = Measure("retrv_stale_memory", "counter", "Stored documents whose memory was missing or stale")
NONE_CHOSEN = Measure("retrv_none_chosen", "counter", "Lists of which the model chose none")
CACHE_HITS = Measure("retrv_cache_hits", "counter", "Lists answered from the result cache")
TOKEN_COUNT = Measure("retrv_tokens", "counter", "Tokens; uncompressed = with every candidate in full", ("kind",))
#: Everything that `counted` gives.
OF_RESULTS = (STAGES, RESULTS, THOUGHTS, INSPECTIONS, STALE, NONE_CHOSEN, CACHE_HITS, TOKEN_COUNT)


def reason_label(reason: str | None) -> str:
    if reason is None:
        return "none"
    return next((label for words, label in REASONS if words in reason), "engine")


def counted(
    results: RankedResults, route: str, reason: str, status: str, inline: int = 0
) -> Iterator[tuple[Measure, float, tuple[str, ...]]]:
    """Instrument, amount, label values. inline: documents that came with the call and can have no stored memory."""
    yield RESULTS, 1, (route, status, reason)
    yield NONE_CHOSEN, int(results.none_chosen), ()  # a boolean is no amount: OTLP refuses the whole batch
    trace = results.trace
    if trace is None:
        return
    for stage, seconds in trace.timings.items():
        yield STAGES, seconds, (stage,)
    yield CACHE_HITS, int(trace.cached), ()
    if trace.cached:
        return  # the rest was spent and counted when the list was made
    yield THOUGHTS, int("think" in trace.timings), ()
    yield INSPECTIONS, len(trace.inspected), ()
    yield STALE, max(0, trace.usage.stale_memories - inline), ()
    for kind in TOKENS:
        yield TOKEN_COUNT, getattr(trace.usage, f"{kind}_tokens"), (kind,)
