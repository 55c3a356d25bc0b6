"""The same candidates under every mode: what each one made of them, as records, and what a reader should look at."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from retrv_r1_retriever.evaluation.metrics import Qrels
from retrv_r1_retriever.evaluation.records import LostBy, Record, lost_by, positives, record_of
from retrv_r1_retriever.images import ImageSource, load_content
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.reranker import as_candidates
from retrv_r1_retriever.retriever import Reranker
from retrv_r1_retriever.store import Filter, FirstStage
from retrv_r1_retriever.types import Candidate, Query, RankedResults

#: (what, done, total)
ProgressFn = Callable[[str, int, int], None]

ROWS_SHOWN = 5  # of a list on a page, beside what was opened, chosen or right


def label(options: RerankOptions) -> str:
    """A mode's name in tables: `K=50 always/hybrid`."""
    return f"K={options.top_k} {options.think}/{options.ranking}"


def tag(options: RerankOptions) -> str:
    """The same without spaces, for run files."""
    return f"retrv-r1.K{options.top_k}.{options.think}.{options.ranking}"


@dataclass(frozen=True, slots=True)
class Shown:
    """A query for the page. kind: why it is there; positives: its right answers, if known"""

    mode: str
    kind: str
    results: RankedResults
    positives: frozenset[str]


@dataclass(slots=True)
class Measured:
    """records: mode -> one per query; seconds: of the first stage, per query; notes: what all traces of a mode note

    shown: queries whose first place the reranking changed, and those it left wrong, at most `limit` per mode and kind
    """

    limit: int
    records: dict[str, list[Record]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    shown: dict[tuple[str, str], list[Shown]] = field(default_factory=dict)

    def add(self, mode: str, results: RankedResults, record: Record, grades: Mapping[str, int] | None) -> None:
        self.records.setdefault(mode, []).append(record)
        notes = list(results.trace.notes) if results.trace else []
        self.notes[mode] = [note for note in self.notes.get(mode, notes) if note in notes]
        right = positives(grades or {})
        step = lost_by(record, right) if grades else None
        kind = _kind(record, right, step)
        kept = self.shown.setdefault((mode, kind), []) if kind else []
        if kind and len(kept) < self.limit:
            kept.append(Shown(mode, kind, _cut(results, right), frozenset(right)))


async def measure(
    stage: FirstStage,
    reranker: Reranker,
    images: ImageSource,
    queries: Sequence[Query],
    modes: Sequence[RerankOptions],
    *,
    filter: Filter | None = None,
    qrels: Qrels | None = None,
    concurrency: int = 1,
    shown: int = 20,
    progress: ProgressFn | None = None,
) -> Measured:
    """Candidates are fetched once per query, as many as the mode with the largest `top_k` takes. qrels: None = no labels"""
    measured = Measured(shown)
    top_k = max(options.top_k for options in modes)
    for start in range(0, len(queries), concurrency):
        asked = queries[start : start + concurrency]
        found = await asyncio.gather(*(_find(stage, images, query, top_k, filter) for query in asked))
        measured.seconds += [seconds for *_, seconds in found]
        for options in modes:
            ranked = await reranker.arerank_batch(
                [query for query, *_ in found],
                [candidates[: options.top_k] for _, candidates, _ in found],
                options=options,
                concurrency=concurrency,
            )
            for query, results, (_, candidates, seconds) in zip(asked, ranked, found, strict=True):
                grades = None if qrels is None else qrels[query.id or ""]
                rest = [candidate.document.id for candidate in candidates[options.top_k :]]
                measured.add(label(options), replace(results, query=query), record_of(results, seconds, rest), grades)
        if progress:
            progress("evaluating", start + len(asked), len(queries))
    return measured


async def _find(
    stage: FirstStage, images: ImageSource, query: Query, top_k: int, filter: Filter | None
) -> tuple[Query, tuple[Candidate, ...], float]:
    started = time.monotonic()
    content, _ = await load_content(images, query.content)
    decoded = replace(query, content=content)
    candidates = as_candidates(tuple(await stage(decoded, top_k=top_k, filter=filter))[:top_k])
    return decoded, candidates, time.monotonic() - started


def _kind(record: Record, right: set[str], step: LostBy | None) -> str:
    """Empty for a query that nobody needs to look at."""
    if not record.before:
        return ""
    before, after = record.before[0], record.after[0]
    if not right:
        return "first places differ" if before != after else ""
    if (before in right) != (after in right):
        return "rescued by reranking" if after in right else f"lost by reranking: {step}"
    return f"lost: {step}" if step and step is not LostBy.FIRST_STAGE else ""


def _cut(results: RankedResults, right: set[str]) -> RankedResults:
    """Only the rows worth a picture, and no memory: pages of whole lists take gigabytes."""
    rows = (
        replace(r, candidate=replace(r.candidate, memory=None))
        for r in results.results
        if r.rank <= ROWS_SHOWN or r.selected or r.signals.opened or r.document.id in right or r.candidate.rank == 1
    )
    return replace(results, results=tuple(rows))
