"""The same candidates under every mode: what each one made of them, as records, and what a reader should look at."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from retrv_r1_retriever.errors import ImageError, InputError, explain
from retrv_r1_retriever.evaluation.metrics import Qrels
from retrv_r1_retriever.evaluation.records import LostBy, Record, lost_by, positives, record_of
from retrv_r1_retriever.images import ImageSource, load_query
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.reranker import as_candidates, bounded
from retrv_r1_retriever.retriever import Reranker
from retrv_r1_retriever.store import Filter, FirstStage
from retrv_r1_retriever.types import Candidate, Query, RankedResults, Status

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

    fallbacks: mode -> reason -> queries
    unreadable: queries left out, with what is wrong with their picture
    shown: queries whose first place the reranking changed, and those left wrong, at most `limit` per mode and kind
    """

    limit: int
    records: dict[str, list[Record]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    fallbacks: dict[str, Counter[str]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    shown: dict[tuple[str, str], list[Shown]] = field(default_factory=dict)

    def add(self, mode: str, results: RankedResults, record: Record, grades: Mapping[str, int] | None) -> None:
        self.records.setdefault(mode, []).append(record)
        reasons = self.fallbacks.setdefault(mode, Counter())
        if results.status is Status.FALLBACK:
            reasons[results.reason or "no reason given"] += 1
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
    depth: int,
    filter: Filter | None = None,
    qrels: Qrels | None = None,
    concurrency: int = 1,
    shown: int = 20,
    progress: ProgressFn | None = None,
) -> Measured:
    """Candidates are fetched once per query, as many as the mode with the largest `top_k` takes. qrels: None = no labels

    depth: fetched at least; those beyond a mode's K stay behind it, so that no other mode's K decides what a metric sees of it
    """
    measured = Measured(shown)
    depth = max(depth, *(options.top_k for options in modes))
    for start in range(0, len(queries), concurrency):
        asked = queries[start : start + concurrency]
        tried = await asyncio.gather(*(_find(stage, images, query, depth, filter) for query in asked))
        found = [one for one in tried if isinstance(one, _Found)]
        measured.unreadable |= {
            q.id or "": str(e) for q, e in zip(asked, tried, strict=True) if isinstance(e, ImageError)
        }
        measured.seconds += [one.seconds for one in found]
        for options in modes:
            ranked = await bounded(partial(_rerank, reranker, options), found, concurrency)
            for one, (results, seconds) in zip(found, ranked, strict=True):
                grades = None if qrels is None else qrels[one.query.id or ""]
                rest = [candidate.document.id for candidate in one.candidates[options.top_k :]]
                record = record_of(results, one.seconds + seconds, rest)
                measured.add(label(options), replace(results, query=one.query), record, grades)
        if progress:
            progress("evaluating", start + len(asked), len(queries))
    if not measured.records:
        id, why = next(iter(measured.unreadable.items()))
        got = f"none of {len(queries)} (first: {id!r}: {why})"
        raise InputError(
            explain("queries", expected="some whose picture can be read", got=got, fix="Fix their pictures.")
        )
    return measured


@dataclass(frozen=True, slots=True)
class _Found:
    """decoded: the query with its picture decoded; seconds: of decoding and searching"""

    query: Query
    decoded: Query
    candidates: tuple[Candidate, ...]
    seconds: float


async def _find(
    stage: FirstStage, images: ImageSource, query: Query, depth: int, filter: Filter | None
) -> _Found | ImageError:
    started = time.monotonic()
    try:
        decoded = await load_query(images, query)
    except ImageError as error:
        return error  # one picture must not cost what the others took
    candidates = as_candidates(tuple(await stage(decoded, top_k=depth, filter=filter))[:depth])
    return _Found(query, decoded, candidates, time.monotonic() - started)


async def _rerank(reranker: Reranker, options: RerankOptions, found: _Found) -> tuple[RankedResults, float]:
    """Timed here: a fallback has no trace, and took its time all the same."""
    started = time.monotonic()
    results = await reranker.arerank(found.decoded, found.candidates[: options.top_k], options=options)
    return results, time.monotonic() - started


def _kind(record: Record, right: set[str], step: LostBy | None) -> str:
    """Empty for a query that nobody needs to look at."""
    before, after = record.before[:1], record.after[:1]
    if not right:
        return "first places differ" if before != after else ""
    if right.isdisjoint(before) != right.isdisjoint(after):
        return f"lost by reranking: {step}" if step else "rescued by reranking"
    return f"lost: {step}" if step else ""


def _cut(results: RankedResults, right: set[str]) -> RankedResults:
    """Only the rows worth a picture, and no memory: pages of whole lists take gigabytes."""
    rows = (
        replace(r, candidate=replace(r.candidate, memory=None))
        for r in results.results
        if r.rank <= ROWS_SHOWN or r.selected or r.signals.opened or r.document.id in right or r.candidate.rank == 1
    )
    return replace(results, results=tuple(rows))
