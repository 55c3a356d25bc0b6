"""Our metrics against trec_eval's own code, on random runs with missing queries and several positives."""

from __future__ import annotations

import random

import pytest
import pytrec_eval

from retrv_r1_retriever.evaluation.metrics import mean_reciprocal_rank, values

CUTS = (1, 5, 10)


def drawn(seed: int) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """Fifty queries over thirty documents: one to twelve positives, unjudged documents, every seventh query never run."""
    rng = random.Random(seed)
    documents = [f"d{i}" for i in range(30)]
    qrels = {f"q{i}": dict.fromkeys(rng.sample(documents, rng.choice((1, 1, 2, 12))), 1) for i in range(50)}
    for grades in qrels.values():
        grades |= dict.fromkeys(set(rng.sample(documents, 3)) - grades.keys(), 0)
    run = {query: rng.sample(documents, rng.randrange(1, 30)) for i, query in enumerate(qrels) if i % 7}
    return run, qrels


@pytest.mark.parametrize("seed", range(3))
def test_trec_eval_gives_the_same_numbers(seed: int) -> None:
    run, qrels = drawn(seed)
    measures = {f"{name}.{','.join(map(str, CUTS))}" for name in ("success", "ndcg_cut", "map_cut")} | {"recip_rank"}
    scored = {query: {d: float(-place) for place, d in enumerate(ranking)} for query, ranking in run.items()}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(scored)
    for k in CUTS:
        recall, ndcg, precision = (values(run, qrels, f"{name}@{k}") for name in ("recall", "ndcg", "map"))
        for query, grades in qrels.items():
            relevant = sum(grade > 0 for grade in grades.values())
            wanted = theirs.get(query, {f"{m}_{k}": 0.0 for m in ("success", "ndcg_cut", "map_cut")})
            assert recall[query] == wanted[f"success_{k}"]
            assert ndcg[query] == pytest.approx(wanted[f"ndcg_cut_{k}"])
            # CIRCO divides by the positives that fit into the first k, trec_eval by all of them
            assert precision[query] * min(k, relevant) / relevant == pytest.approx(wanted[f"map_cut_{k}"])
    mine = sum(theirs[query]["recip_rank"] for query in theirs) / len(qrels)
    assert mean_reciprocal_rank(run, qrels) == pytest.approx(mine)
