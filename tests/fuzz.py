"""Generated model outputs through session, driver and ranking: `python -m tests.fuzz 100000`.

No crash, no id that was not given, always a full permutation, no handle left open.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys

from retrv_r1_retriever.engines.scripted import FuzzEngine
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.trace import ReasoningTrace, Sampled
from retrv_r1_retriever.types import RankedResults, Status
from tests.helpers import candidates


def fuzz(outputs: int, seed: int = 0) -> dict[str, int]:
    """Runs queries until the model has written `outputs` outputs; how often each status came of it."""
    return asyncio.run(_fuzz(outputs, random.Random(seed)))


async def _fuzz(outputs: int, rng: random.Random) -> dict[str, int]:
    seen = {"outputs": 0, "queries": 0, **dict.fromkeys(Status, 0)}
    while seen["outputs"] < outputs:
        engine = FuzzEngine(rng.randrange(2**32), errors=rng.choice((0.0, 0.05)))
        found = candidates(rng.choice((1, 2, 5, 12, 50, 127)))
        options = RerankOptions(
            ranking=rng.choice(("hybrid", "hybrid", "promote")),
            think=rng.choice(("always", "always", "auto")),
            think_margin=rng.choice((None, 0.5)),
            max_inspections=rng.choice((0, 1, 4, 127)),
            max_new_tokens=rng.choice((1, 30, 512)),
            timeout_s=None,
        )
        results = await RetrvR1Reranker(engine).arerank("red shoe", found, options=options)
        check(results, [c.document.id for c in found])
        assert engine.leaked == 0
        seen[results.status] += 1
        seen["queries"] += 1
        seen["outputs"] += sum(isinstance(s, Sampled) for handle in engine.opened for s in handle.segments)
    return seen


def check(results: RankedResults, ids: list[str]) -> None:
    got = [r.document.id for r in results]
    assert sorted(got) == sorted(ids), "not a permutation"
    assert [r.rank for r in results] == list(range(1, len(ids) + 1))
    assert set(results.unranked) <= set(ids)
    if results.status is Status.FALLBACK:
        assert got == ids, "a fallback must be first-stage order"
        assert results.reason
        assert all(r.score is None for r in results)
        return
    scores = [r.score or 0.0 for r in results]
    assert sorted(set(scores), reverse=True) == scores, "the score must fall strictly"
    assert 0 < scores[-1] <= scores[0] == 1
    assert bool(results.reason) == (results.status is Status.PARTIAL)
    trace = results.trace
    assert trace is not None
    assert all(0 <= i < len(ids) for i in (*trace.inspected, *trace.unreadable))
    assert ReasoningTrace.from_json(trace.to_json()).turn == trace.turn


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    counts = fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
    rest = ", ".join(f"{name} {count}" for name, count in counts.items() if name != "outputs")
    print(f"fuzz: {counts['outputs']} generated outputs, no fault ({rest})")
