"""Retrieval metrics over a run and qrels: pure functions, no defaults that hide what is measured.

A query without a ranking, or whose right answers are all missing from it, counts as 0; a query without any relevant document
is an error, because every metric here is undefined for it. Queries of the run that the qrels do not know are not looked at.

    recall@k   1 if any relevant document is among the first k, else 0: M-BEIR's (trec_eval calls it success_k)
    mrr, mrr@k 1 / rank of the first relevant document
    ndcg@k     gain 2^grade - 1, discount log2(rank + 1) (Burges et al. 2005); trec_eval's for grades 0 and 1
    map@k      mean precision at the relevant documents among the first k, over min(k, R): CIRCO's. trec_eval divides by R
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
#: (distinct ids, best first; grades of one query) -> value in [0, 1]
Metric: TypeAlias = Callable[[Sequence[str], Mapping[str, int]], float]


#: nDCG's gain is 2^grade - 1, which is no number any more from 1024 on; a sum of gains needs some room. Ours.
MAX_GRADE = 1000


def metric(name: str) -> Metric:
    """A metric by its name: `recall@5`, `mrr`, `mrr@10`, `ndcg@10`, `map@5`. Raises `InputError`."""
    kind, at, cut = name.partition("@")
    known = {"recall": _recall, "mrr": _reciprocal, "ndcg": _ndcg, "map": _average_precision}
    if kind not in known or (at == "" and kind != "mrr") or (at and not (cut.isdecimal() and int(cut) > 0)):
        fix = "Name one of recall@K, mrr, mrr@K, ndcg@K, map@K."
        raise InputError(explain("metric", expected="a known name", got=repr(name), fix=fix))
    k = int(cut) if at else None
    return lambda ranking, grades: known[kind](ranking[:k], grades, k or len(ranking))


def values(run: Run, qrels: Qrels, name: str) -> dict[str, float]:
    """The metric of every query of the qrels, in their order."""
    if not qrels:
        raise InputError(explain("qrels", expected="at least one query", got="none", fix="Check the qrels file."))
    measure, out = metric(name), {}
    for query, grades in qrels.items():
        if not any(grade > 0 for grade in grades.values()):
            raise InputError(
                explain(f"qrels of query {query!r}", expected="a relevant document", got="none", fix="Drop the query.")
            )
        out[query] = measure(list(dict.fromkeys(run.get(query, ()))), grades)
    return out


def mean(run: Run, qrels: Qrels, name: str) -> float:
    found = values(run, qrels, name)
    return math.fsum(found.values()) / len(found)


def recall_at(run: Run, qrels: Qrels, k: int) -> float:
    return mean(run, qrels, f"recall@{k}")


def mean_reciprocal_rank(run: Run, qrels: Qrels, k: int | None = None) -> float:
    return mean(run, qrels, "mrr" if k is None else f"mrr@{k}")


def ndcg_at(run: Run, qrels: Qrels, k: int) -> float:
    return mean(run, qrels, f"ndcg@{k}")


def _recall(ranking: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    return float(any(grades.get(d, 0) > 0 for d in ranking))


def _reciprocal(ranking: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    return 1 / next((place for place, d in enumerate(ranking, 1) if grades.get(d, 0) > 0), math.inf)


def _ndcg(ranking: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    if (largest := max(grades.values())) > MAX_GRADE:
        raise InputError(explain("grade", expected=f"at most {MAX_GRADE}", got=largest, fix="Scale the grades down."))
    return _dcg([grades.get(d, 0) for d in ranking]) / _dcg(sorted(grades.values(), reverse=True)[:k])


def _dcg(grades: Sequence[int]) -> float:
    return math.fsum((2 ** max(grade, 0) - 1) / math.log2(place + 1) for place, grade in enumerate(grades, 1))


def _average_precision(ranking: Sequence[str], grades: Mapping[str, int], k: int) -> float:
    places = [place for place, d in enumerate(ranking, 1) if grades.get(d, 0) > 0]
    relevant = sum(grade > 0 for grade in grades.values())
    return math.fsum(found / place for found, place in enumerate(places, 1)) / min(k, relevant)
