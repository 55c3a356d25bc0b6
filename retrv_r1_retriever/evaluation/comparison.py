"""A reranking measured against the first stage it was given: both orders over the same candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from retrv_r1_retriever.evaluation.metrics import mean_reciprocal_rank, recall_at
from retrv_r1_retriever.types import RankedResults


@dataclass(frozen=True, slots=True)
class Scores:
    """Over all queries; those whose right answer is not among the candidates count as misses."""

    recall_at_1: float
    recall_at_5: float
    mrr: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """ceiling: share of queries with a right answer among the candidates; opened: candidates opened per query; thought: share of
    queries that were thought about.

    rescued: queries whose first result became right; lost: whose first result was right and is not any more
    """

    queries: int
    first_stage: Scores
    reranked: Scores
    ceiling: float
    opened: float
    thought: float
    statuses: Mapping[str, int]
    rescued: int
    lost: int


def compare(positives: Sequence[Collection[str]], results: Sequence[RankedResults]) -> Comparison:
    """`results` must be whole lists (`top_n=None`): what was cut away would count as not found."""
    qrels = {str(i): dict.fromkeys(ids, 1) for i, ids in enumerate(positives)}
    after = {str(i): [r.document.id for r in ranked.results] for i, ranked in enumerate(results)}
    before = {
        str(i): [r.document.id for r in sorted(ranked.results, key=lambda r: r.candidate.rank)]
        for i, ranked in enumerate(results)
    }
    longest = max(len(ranked.results) for ranked in results)
    first = [(_hit(before[query], grades), _hit(after[query], grades)) for query, grades in qrels.items()]
    opened = [len(ranked.trace.inspected) if ranked.trace else 0 for ranked in results]
    return Comparison(
        queries=len(results),
        first_stage=_scores(before, qrels),
        reranked=_scores(after, qrels),
        ceiling=recall_at(before, qrels, longest),
        opened=sum(opened) / len(opened),
        thought=sum(r.trace is not None and r.trace.stop_reason is not None for r in results) / len(results),
        statuses=dict(Counter(ranked.status.value for ranked in results)),
        rescued=sum(is_right and not was for was, is_right in first),
        lost=sum(was and not is_right for was, is_right in first),
    )


def _hit(ranking: Sequence[str], right: Collection[str]) -> bool:
    return bool(ranking) and ranking[0] in right


def _scores(run: Mapping[str, Sequence[str]], qrels: Mapping[str, Mapping[str, int]]) -> Scores:
    return Scores(recall_at(run, qrels, 1), recall_at(run, qrels, 5), mean_reciprocal_rank(run, qrels))
