"""Oracles worked out by hand, then properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrv_r1_retriever.errors import InputError
from retrv_r1_retriever.evaluation.metrics import mean_reciprocal_rank, ndcg_at, recall_at

RUN = {"q1": ["a", "b", "c", "d"], "q2": ["x", "y", "z"], "q3": ["m"]}
QRELS = {
    "q1": {"b": 1, "d": 2},
    "q2": {"x": 1},
    "q3": {"n": 1},
    "q4": {"k": 1},
}  # q3 misses its answer, q4 was never run


def test_recall_counts_queries_with_any_relevant_document() -> None:
    assert recall_at(RUN, QRELS, 1) == 1 / 4  # q2
    assert recall_at(RUN, QRELS, 2) == 2 / 4  # q1 by b, q2
    assert recall_at(RUN, QRELS, 100) == 2 / 4


def test_reciprocal_rank() -> None:
    assert mean_reciprocal_rank(RUN, QRELS) == (1 / 2 + 1 + 0 + 0) / 4
    assert mean_reciprocal_rank(RUN, QRELS, 1) == (0 + 1 + 0 + 0) / 4


def test_ndcg_with_grades() -> None:
    # q1: b (gain 1) at place 2, d (gain 3) at place 4; ideal: 3 at place 1, 1 at place 2
    dcg = 1 / math.log2(3) + 3 / math.log2(5)
    ideal = 3 + 1 / math.log2(3)
    assert dcg / ideal == pytest.approx(0.5296, abs=1e-4)
    assert ndcg_at(RUN, QRELS, 10) == pytest.approx((dcg / ideal + 1) / 4)
    assert ndcg_at(RUN, QRELS, 2) == pytest.approx((1 / math.log2(3) / ideal + 1) / 4)


def test_a_document_listed_twice_counts_once() -> None:
    assert recall_at({"q": ["a", "a", "b"]}, {"q": {"b": 1}}, 2) == 1
    assert ndcg_at({"q": ["b", "b"]}, {"q": {"b": 1}}, 2) == 1


def test_undefined_is_an_error() -> None:
    with pytest.raises(InputError, match="qrels: expected at least one query"):
        recall_at(RUN, {}, 1)
    with pytest.raises(InputError, match="qrels of query 'q1': expected a relevant document"):
        mean_reciprocal_rank(RUN, {"q1": {"a": 0}})


@given(st.permutations(["a", "b", "c", "d", "e"]), st.sets(st.sampled_from("abcde"), min_size=1), st.integers(1, 6))
def test_bounds_and_best_order(order: list[str], relevant: set[str], k: int) -> None:
    qrels = {"q": dict.fromkeys(relevant, 1)}
    values = [
        recall_at({"q": order}, qrels, k),
        mean_reciprocal_rank({"q": order}, qrels, k),
        ndcg_at({"q": order}, qrels, k),
    ]
    best = sorted(order, key=lambda d: d not in relevant)
    assert all(0 <= v <= 1 for v in values)
    assert recall_at({"q": best}, qrels, k) == mean_reciprocal_rank({"q": best}, qrels, k) == 1
    assert ndcg_at({"q": best}, qrels, k) == pytest.approx(1)
    assert recall_at({"q": order}, qrels, k) <= recall_at({"q": order}, qrels, k + 1)
