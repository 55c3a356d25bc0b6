"""Our metrics against trec_eval's own code, on random runs with missing queries and several positives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import pytrec_eval

from retrv_r1_retriever.evaluation.mbeir import RunFile
from retrv_r1_retriever.evaluation.metrics import mean_reciprocal_rank, values
from retrv_r1_retriever.evaluation.runs import read_run

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


def test_equal_scores_keep_the_files_order_and_trec_eval_takes_falling_ids(tmp_path: Path) -> None:
    """a, c and b tie behind d. Ours leaves b in fourth place; trec_eval puts c, b, a there, and b into third."""
    path = tmp_path / "run.txt"
    path.write_text("q Q0 a 1 0.5 t\nq Q0 c 2 0.5 t\nq Q0 b 3 0.5 t\nq Q0 d 4 0.7 t\n")
    run, qrels = read_run(path), {"q": {"b": 1}}
    assert run["q"] == RunFile(path).ranked("q") == ["d", "a", "c", "b"]
    assert values(run, qrels, "mrr") == {"q": 1 / 4}
    assert (values(run, qrels, "recall@3"), values(run, qrels, "recall@4")) == ({"q": 0.0}, {"q": 1.0})
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"})
    assert theirs.evaluate({"q": {"a": 0.5, "c": 0.5, "b": 0.5, "d": 0.7}})["q"]["recip_rank"] == pytest.approx(1 / 3)
