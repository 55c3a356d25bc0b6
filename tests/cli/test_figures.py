"""The figures' shortcut is no shortcut: `promote` read off the hybrid results is what `ranking="promote"` returns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retrv_r1_retriever.demo import figures
from retrv_r1_retriever.demo.catalogue import LabelledQuery
from retrv_r1_retriever.engines.scripted import FuzzEngine, ScriptedEngine
from retrv_r1_retriever.parser import Thought, Verdict
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.types import Query
from tests.helpers import candidates, documents


def test_promote_is_read_off_the_same_thoughts():
    for seed in range(40):
        orders = []
        for ranking in ("promote", "hybrid"):
            options = figures._THINK.with_options(ranking=ranking)
            results = RetrvR1Reranker(FuzzEngine(seed), options=options).rerank("q", documents(8))
            derived = figures._promote(results) if ranking == "hybrid" else results
            orders.append([(r.document.id, r.selected) for r in replace(derived).results])
        assert orders[0] == orders[1]


@pytest.mark.parametrize("margin", [None, 0.5])
def test_auto_is_measured_where_a_margin_is_calibrated_and_says_how_often_it_thought(margin):
    query = Query.of("q")
    labelled = [LabelledQuery(query, "t2i", stratum, ("2",), "image", "") for stratum in ("coarse", "fine")]
    asked = [figures.Asked(one, query, tuple(candidates(8))) for one in labelled]
    thought = Thought("text 2", tuple(Verdict(i, "keep") for i in range(8)), (), 2)
    sure = [3.0 if i == 2 else 0.0 for i in range(9)]
    reranker = RetrvR1Reranker(ScriptedEngine(thought, slots=sure, think_margin=margin))
    table = figures.measure(reranker, asked, lambda *_: None)
    assert ("hybrid, think=auto" in table) == (margin is not None)
    if margin is not None:
        assert table["hybrid, think=auto"]["all"].thought == 0.0, "the direct read leads by 3 nats"
    assert table["hybrid, think=always"]["all"].thought == 1.0
    assert table["logits, think=never"]["all"].thought == 0.0
    assert "| hybrid, think=always | all |" in (text := figures.markdown(table, "val"))
    assert "| 100% |" in text


def test_several_lengths_make_one_table():
    query, asked = Query.of("q"), []
    for stratum, right in (("coarse", "doc-2"), ("fine", "doc-6")):
        asked.append(
            figures.Asked(LabelledQuery(query, "t2i", stratum, (right,), "image", ""), query, tuple(candidates(8)))
        )
    reranker = RetrvR1Reranker(
        ScriptedEngine(Thought("x", (), (), 0), slots=lambda p: [float(i == 2) for i in range(len(p.slots))])
    )
    cut = {k: [replace(a, candidates=a.candidates[:k]) for a in asked] for k in (4, 8)}
    text = figures.by_length({k: figures.measure(reranker, part, lambda *_: None) for k, part in cut.items()})
    assert "| 4 | coarse | 1.000 | 0.000 | 1.000 |" in text
    assert "| 4 | fine | 0.000 | 0.000 | 0.000 |" in text
    assert "| 8 | fine | 1.000 | 0.000 | 0.000 |" in text
    assert text.count("\n") == 1 + 2 * len(figures.STRATA)
