"""Retrieval metrics over a run and qrels: pure functions, no defaults that hide what is measured.

A query without a ranking, or whose right answers are all missing from it, counts as 0; a query without any relevant document
is an error, because every metric here is undefined for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from retrv_r1_retriever.errors import InputError, explain

#: query id -> document ids, best first
Run: TypeAlias = Mapping[str, Sequence[str]]
#: query id -> document id -> grade; grades above 0 are relevant
Qrels: TypeAlias = Mapping[str, Mapping[str, int]]


def recall_at(run: Run, qrels: Qrels, k: int) -> float:
    """Share of queries with any relevant document among the first k: M-BEIR's R@k (a hit rate when there are several)."""
    return _mean(qrels, lambda query, grades: float(any(grades.get(d, 0) > 0 for d in _top(run, query, k))))


def mean_reciprocal_rank(run: Run, qrels: Qrels, k: int | None = None) -> float:
    """Mean of 1 / rank of the first relevant document, 0 if none is among the first k (None = the whole ranking)."""

    def reciprocal(query: str, grades: Mapping[str, int]) -> float:
        places = (place for place, d in enumerate(_top(run, query, k), 1) if grades.get(d, 0) > 0)
        return 1 / next(places, math.inf)

    return _mean(qrels, reciprocal)


def ndcg_at(run: Run, qrels: Qrels, k: int) -> float:
    """nDCG with gain 2^grade - 1 and discount log2(rank + 1) (Burges et al. 2005); equals trec_eval's for grades 0 and 1."""

    def ndcg(query: str, grades: Mapping[str, int]) -> float:
        ideal = _dcg(sorted(grades.values(), reverse=True)[:k])
        return _dcg([grades.get(d, 0) for d in _top(run, query, k)]) / ideal

    return _mean(qrels, ndcg)


def _dcg(grades: Sequence[int]) -> float:
    return math.fsum((2 ** max(grade, 0) - 1) / math.log2(place + 1) for place, grade in enumerate(grades, 1))


def _top(run: Run, query: str, k: int | None) -> Sequence[str]:
    """The first k, each document counted once at its best place."""
    return list(dict.fromkeys(run.get(query, ())))[:k]


def _mean(qrels: Qrels, metric: Callable[[str, Mapping[str, int]], float]) -> float:
    if not qrels:
        raise InputError(explain("qrels", expected="at least one query", got="none", fix="Check the qrels file."))
    for query, grades in qrels.items():
        if not any(grade > 0 for grade in grades.values()):
            raise InputError(
                explain(f"qrels of query {query!r}", expected="a relevant document", got="none", fix="Drop the query.")
            )
    return math.fsum(metric(query, grades) for query, grades in qrels.items()) / len(qrels)
