from __future__ import annotations

import pytest

from retrv_r1_retriever.evaluation.comparison import compare
from retrv_r1_retriever.trace import ReasoningTrace
from retrv_r1_retriever.types import Candidate, Content, Document, Query, RankedResult, RankedResults, Status


def ranked(order: list[int], opened: int, status: Status = Status.RERANKED) -> RankedResults:
    """`order`: first-stage ranks in their new order; document `d<rank>`."""
    results = tuple(
        RankedResult(Candidate(Document(f"d{was}", Content("x")), None, was), place, None)
        for place, was in enumerate(order, 1)
    )
    trace = ReasoningTrace(inspected=tuple(range(opened)))
    return RankedResults(Query.of("q"), results, status, trace=trace if opened else None)


def test_both_orders_over_the_same_candidates() -> None:
    results = [ranked([3, 1, 2], 2), ranked([1, 2, 3], 1), ranked([2, 1, 3], 0, Status.FALLBACK)]
    found = compare([{"d3"}, {"d2", "d3"}, {"absent"}], results)
    assert found.first_stage.mrr == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)
    assert found.reranked.mrr == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert (found.first_stage.recall_at_1, found.reranked.recall_at_1) == (0, pytest.approx(1 / 3))
    assert found.ceiling == pytest.approx(2 / 3)
    assert found.opened == 1
    assert found.statuses == {"reranked": 2, "fallback": 1}


def test_rescued_and_lost_queries_are_counted() -> None:
    results = [
        ranked([3, 1, 2], 0),
        ranked([1, 2, 3], 0),
        ranked([2, 1, 3], 0),
        ranked([2, 1, 3], 0),
        ranked([2, 1], 0),
        ranked([1, 2], 0),
    ]
    found = compare([{"d3"}, {"d1"}, {"d1"}, {"d1"}, {"d1", "d2"}, {"d1"}], results)
    assert (found.rescued, found.lost) == (1, 2)


def test_a_comparison_is_plain_json():
    """`dataclasses.asdict` takes a Counter apart into tuples; a plain dict survives."""
    import json
    from dataclasses import asdict

    from retrv_r1_retriever.engines.scripted import FuzzEngine
    from retrv_r1_retriever.evaluation.comparison import compare
    from retrv_r1_retriever.reranker import RetrvR1Reranker
    from tests.helpers import documents

    results = RetrvR1Reranker(FuzzEngine(0)).rerank("q", documents(3))
    assert json.loads(json.dumps(asdict(compare([["0"]], [results]))))["queries"] == 1
