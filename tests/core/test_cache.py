"""The result cache: what is an equal call, what may be remembered, and whose documents come back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retrv_r1_retriever.cache import CacheConfig, ResultCache
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.errors import EngineError, OptionsError
from retrv_r1_retriever.options import BALANCED, FAST
from retrv_r1_retriever.parser import Thought, Verdict
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.trace import ReasoningTrace
from retrv_r1_retriever.types import Candidate, Content, Document, Query, RankedResults
from tests.helpers import candidates, png

SLOTS = (1.0, 2.0, 0.0, 3.0, -1.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def cached(results: RankedResults) -> bool:
    assert results.trace is not None
    return results.trace.cached


def reranker(cache: ResultCache, **settings: object) -> RetrvR1Reranker:  # of ScriptedEngine
    return RetrvR1Reranker(ScriptedEngine(slots=SLOTS, **settings), cache=cache, options=FAST)  # type: ignore[arg-type]


async def test_an_equal_call_is_answered_from_memory_over_the_callers_own_objects() -> None:
    engine = ScriptedEngine(slots=SLOTS)
    asking = RetrvR1Reranker(engine, cache=ResultCache(), options=FAST)
    first = await asking.arerank("red", candidates(4))
    own = [replace(c, document=replace(c.document, metadata={"price": 3})) for c in candidates(4)]
    query = Query.of("red", id="second")
    second = await asking.arerank(query, own, options=FAST.with_options(timeout_s=9.0))
    assert len(engine.opened) == 1
    assert [cached(first), cached(second)] == [False, True]
    assert [(r.document.id, r.score, r.signals) for r in second] == [(r.document.id, r.score, r.signals) for r in first]
    assert second.query is query
    assert {id(r.candidate) for r in second} == {id(c) for c in own}
    assert second.trace is not None
    assert set(second.trace.timings) == {"cache", "total"}
    assert ReasoningTrace.from_json(second.trace.to_json()) == second.trace


async def test_what_differs_is_another_call() -> None:
    cache, found = ResultCache(), candidates(4)
    changed = [replace(found[0], document=Document("doc-0", Content("another text"))), *found[1:]]
    swapped = [replace(found[1], rank=1), replace(found[0], rank=2), *found[2:]]
    asking = reranker(cache)
    calls = [
        asking.arerank("red", found),
        asking.arerank("blue", found),
        asking.arerank(Query.of("red", instruction="find"), found),
        asking.arerank(Query.of("red", png()), found),
        asking.arerank(Query.of("red", png("blue")), found),
        asking.arerank("red", changed),
        asking.arerank("red", swapped),
        asking.arerank("red", [*found[:3], Candidate(Document("doc-9", found[3].document.content), None, 4)]),
        asking.arerank("red", found, options=FAST.with_options(top_n=2)),
        reranker(cache.for_tenant("acme")).arerank("red", found),
        reranker(cache.for_tenant("other")).arerank("red", found),
    ]
    assert [cached(await call) for call in calls] == [False] * len(calls)
    other_model = reranker(cache)
    other_model.engine.versions = {"engine": "another"}  # type: ignore[misc]
    assert not cached(await other_model.arerank("red", found))
    assert cached(await reranker(cache.for_tenant("acme")).arerank("red", found))


async def test_only_what_the_model_decided_whole_is_kept() -> None:
    cache = ResultCache()
    failing = RetrvR1Reranker(ScriptedEngine(failing={"open": EngineError("down")}), cache=cache)
    options = BALANCED.with_options(think="always")
    assert (await failing.arerank("red", candidates(4), options=options)).reason == "down"
    passing_over = ScriptedEngine(Thought("red", (Verdict(0, "no"),), (), 1), direct_read=False)
    asking = RetrvR1Reranker(passing_over, cache=cache, options=options)
    assert [(await asking.arerank("red", candidates(4))).status for _ in range(2)] == ["partial", "partial"]
    assert len(passing_over.opened) == 2


async def test_the_oldest_and_the_least_used_go() -> None:
    clock = Clock()
    asking = reranker(ResultCache(2, 10.0, clock=clock))
    assert [cached(await asking.arerank(q, candidates(4))) for q in "aabacba"] == [
        False, True, False, True, False, False, False,
    ]  # fmt: skip
    clock.now = 9.9
    assert cached(await asking.arerank("a", candidates(4)))
    clock.now = 10.1
    assert not cached(await asking.arerank("a", candidates(4)))


def test_a_cache_without_room_or_time_is_refused() -> None:
    assert CacheConfig().make() is None
    with pytest.raises(OptionsError, match=r"cache: expected max_entries >= 0 and ttl_s > 0, got max_entries -1"):
        ResultCache(-1)
    with pytest.raises(OptionsError, match="ttl_s 0"):
        ResultCache(ttl_s=0)
