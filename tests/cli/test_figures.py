"""The figures' shortcut is no shortcut: `promote` read off the hybrid results is what `ranking="promote"` returns."""

from __future__ import annotations

from dataclasses import replace

from retrv_r1_retriever.demo import figures
from retrv_r1_retriever.engines.scripted import FuzzEngine
from retrv_r1_retriever.reranker import RetrvR1Reranker
from tests.helpers import documents


def test_promote_is_read_off_the_same_thoughts():
    for seed in range(40):
        orders = []
        for ranking in ("promote", "hybrid"):
            options = figures._THINK.with_options(ranking=ranking)
            results = RetrvR1Reranker(FuzzEngine(seed), options=options).rerank("q", documents(8))
            derived = figures._promote(results) if ranking == "hybrid" else results
            orders.append([(r.document.id, r.selected) for r in replace(derived).results])
        assert orders[0] == orders[1]
