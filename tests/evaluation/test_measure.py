"""What `eval FILE` says of calls that did not end well, of lists shorter than a metric looks, and of pictures nobody can read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from retrv_r1_retriever.cli.outcome import DEPTH, METRICS
from retrv_r1_retriever.engines.base import SlotRead
from retrv_r1_retriever.engines.scripted import ScriptedEngine, ScriptedHandle
from retrv_r1_retriever.evaluation.measure import Measured, label, measure
from retrv_r1_retriever.evaluation.records import LostBy, Price, Summary, effort, lost_by, summarise
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.options import FAST, THOROUGH, RerankOptions
from retrv_r1_retriever.parser import Thought
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.session import GenerateParams, Generation
from retrv_r1_retriever.store import Filter
from retrv_r1_retriever.trace import Text
from retrv_r1_retriever.types import Candidate, Query, Status
from tests.helpers import documents, with_memory

SEARCH_S, TIMEOUT_S = 0.05, 1.0
STORED = [with_memory(document, rank) for rank, document in enumerate(documents(30), 1)]


async def stage(query: Query, *, top_k: int, filter: Filter | None = None) -> Sequence[Candidate]:
    await asyncio.sleep(SEARCH_S)
    return [] if query.id == "nothing" else STORED[:top_k]


class Hanging(ScriptedEngine):
    """Takes forever over the direct read of one query, and over the thought of another."""

    async def probe(self, handle: ScriptedHandle, suffix: str) -> SlotRead | None:
        await asyncio.sleep(60 * ("unread" in asked(handle)))
        return await super().probe(handle, suffix)

    async def generate(self, handle: ScriptedHandle, params: GenerateParams) -> Generation:
        await asyncio.sleep(60 * ("cut" in asked(handle)))
        return await super().generate(handle, params)


def asked(handle: ScriptedHandle) -> str:
    return "".join(s.text for s in handle.segments if isinstance(s, Text) and s.query)


async def measured(
    engine: ScriptedEngine, queries: Sequence[Query], *modes: RerankOptions, qrels: dict[str, dict[str, int]]
) -> Measured:
    return await measure(
        stage, RetrvR1Reranker(engine), LocalImages(), queries, modes, depth=DEPTH, qrels=qrels, concurrency=8
    )


async def test_a_call_that_ran_out_of_time_took_its_time_and_unknown_tokens() -> None:
    engine = Hanging(Thought((), answer=2), slots=lambda prompt: [0.0] * len(prompt.slots))
    mode = THOROUGH.with_options(top_k=5, timeout_s=TIMEOUT_S)
    queries = [Query.of(id, id=id) for id in ("whole", "unread", "cut", "nothing")]
    qrels = {query.id or "": {"doc-3": 1} for query in queries}
    found = await measured(engine, queries, mode, qrels=qrels)
    records = whole, unread, cut, nothing = found.records[label(mode)]
    assert [r.status for r in records] == [Status.RERANKED, Status.FALLBACK, Status.PARTIAL, Status.FALLBACK]
    assert whole.seconds is not None
    assert SEARCH_S < whole.seconds < TIMEOUT_S
    for late in (unread, cut):
        assert late.seconds is not None
        assert SEARCH_S + TIMEOUT_S <= late.seconds < 60
    assert (unread.tokens_in, unread.tokens_out) == (None, None)
    assert cut.tokens_in, "the prompt was read"
    assert cut.tokens_out is None, "what it had written is lost"
    assert (nothing.tokens_in, nothing.tokens_out) == (None, None), "no model was asked: zeros would lower the means"
    assert [lost_by(r, {"doc-3"}) for r in records] == [
        LostBy.THOUGHT, LostBy.UNJUDGED, LostBy.UNJUDGED, LostBy.FIRST_STAGE,
    ]  # fmt: skip
    assert whole.tokens_in
    assert whole.tokens_out
    took = effort(records, Price(1, 1))
    assert (took.timed, took.counted) == (3, 1)
    assert (took.tokens_in, took.tokens_out) == (whole.tokens_in, whole.tokens_out)
    assert took.cost == pytest.approx((whole.tokens_in + whole.tokens_out) / 1_000)
    assert (effort([nothing]).timed, effort([nothing]).p50) == (0, None), "the time of no reranking"
    assert took.p95 is not None
    assert took.p95 > TIMEOUT_S
    unknown = effort([unread, cut], Price(1, 1))
    assert (unknown.counted, unknown.opened, unknown.tokens_in, unknown.cost) == (0, None, None, None)


async def test_a_thought_that_failed_did_not_judge() -> None:
    engine = ScriptedEngine(slots=[0.0] * 6)  # its script ends at once: an error in the thought
    mode = THOROUGH.with_options(top_k=5)
    found = await measured(engine, [Query.of("q", id="q")], mode, qrels={"q": {"doc-3": 1}})
    (record,) = found.records[label(mode)]
    assert (record.status, record.cut, lost_by(record, {"doc-3"})) == (Status.PARTIAL, True, LostBy.UNJUDGED)


async def test_no_other_k_decides_what_a_metric_sees_of_a_mode() -> None:
    """A right answer inside K, two beyond it, at places 8 and 15 of what the first stage finds."""
    assert max(int(name.partition("@")[2]) for name in METRICS) == DEPTH
    qrels = {"near": {"doc-2": 1}, "eighth": {"doc-7": 1}, "far": {"doc-14": 1}}
    short, long = FAST.with_options(top_k=4), FAST.with_options(top_k=20)

    async def summary(*modes: RerankOptions) -> Summary:
        engine = ScriptedEngine(slots=lambda prompt: [float(i) for i in range(len(prompt.slots))])  # turns lists round
        found = await measured(engine, [Query.of(id, id=id) for id in qrels], *modes, qrels=qrels)
        return summarise(found.records[label(short)], qrels, METRICS)

    alone = await summary(short)
    assert alone == await summary(long, short)
    assert alone.ceiling == pytest.approx(1 / 3)
    assert alone.first_stage["recall@5"] == pytest.approx(1 / 3)
    assert alone.first_stage["recall@10"] == pytest.approx(2 / 3)
    assert alone.first_stage["mrr@10"] == pytest.approx((1 / 3 + 1 / 8) / 3)
    assert alone.reranked["mrr@10"] == pytest.approx((1 / 2 + 1 / 8) / 3)
