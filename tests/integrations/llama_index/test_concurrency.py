"""Many calls at once, cancelled calls, and several event loops in one process."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from llama_index_retrv_r1 import RetrvR1Rerank, RetrvR1Retriever

from retrv_r1_retriever import FAST, RetrvR1Reranker
from retrv_r1_retriever.config import Config, open_engine
from retrv_r1_retriever.engines.scripted import ScriptedEngine, ScriptedHandle
from tests.integrations.llama_index.parts import AsyncOnly, by_number, make, scored, texts

DELAY = 0.4  # of each of the three steps of a call: open, direct read, close


class Watched(ScriptedEngine):
    """at_once: most handles that were open at the same time."""

    at_once = 0

    async def open(self, prompt: Any) -> ScriptedHandle:
        handle = await super().open(prompt)
        self.at_once = max(self.at_once, self.leaked)
        return handle


@pytest.mark.parametrize("source", ["qdrant_async", "qdrant", "custom_async", "own"])
async def test_200_calls_take_about_as_long_as_one(source: str, tmp_path: Path) -> None:
    engine = Watched(slots=by_number, delay_s=DELAY)
    decides = RetrvR1Reranker(engine, options=FAST)
    retriever = await make(source, texts(4), tmp_path, decides=decides)
    started = time.monotonic()
    found = await asyncio.gather(*(retriever.aretrieve(f"text {i % 4}") for i in range(200)))
    took = time.monotonic() - started
    assert all([n.get_content() for n in nodes] == ["text 3", "text 2", "text 1", "text 0"] for nodes in found)
    assert took < 200 * 3 * DELAY / 20, took  # the sum is 240 s; one alone is 1.2 s, the rest is Python's own work
    assert engine.at_once >= 100
    assert engine.leaked == 0


async def test_200_postprocessor_calls_too() -> None:
    engine = Watched(slots=by_number, delay_s=DELAY)
    rerank, nodes = RetrvR1Rerank(RetrvR1Reranker(engine, options=FAST)), scored(texts(4))
    started = time.monotonic()
    await asyncio.gather(*(rerank.apostprocess_nodes(nodes, query_str="q") for _ in range(200)))
    assert time.monotonic() - started < 200 * 3 * DELAY / 20
    assert engine.at_once >= 100


async def test_cancelling_a_call_closes_its_handle() -> None:
    engine = Watched(slots=by_number, delay_s=0.2)
    retriever = RetrvR1Retriever(AsyncOnly(scored(texts(3))), reranker=RetrvR1Reranker(engine, options=FAST))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await retriever.aretrieve("q")
    assert (len(engine.opened), engine.leaked) == (1, 0)


@pytest.mark.parametrize("source", ["qdrant", "own", "custom"])
def test_one_retriever_in_several_event_loops(source: str, tmp_path: Path) -> None:
    retriever = asyncio.run(make(source, texts(4), tmp_path))
    results: list[Any] = [asyncio.run(_once(retriever)), retriever.retrieve("text 1")]
    threads = [threading.Thread(target=lambda: results.append(asyncio.run(_once(retriever)))) for _ in range(4)]
    threads += [threading.Thread(target=lambda: results.append(retriever.retrieve("text 1"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [[n.get_content() for n in found] for found in results] == [["text 3", "text 2", "text 1", "text 0"]] * 10


async def _once(retriever: RetrvR1Retriever) -> Any:
    return await retriever.aretrieve("text 1")


async def test_the_local_engine_reads_concurrent_calls_together(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_engine(Config())
    sizes: list[int] = []
    read = engine._batcher._read
    monkeypatch.setattr(engine._batcher, "_read", lambda work: (sizes.append(len(work)), read(work))[1])
    retriever = RetrvR1Retriever(AsyncOnly(scored(texts(5))), reranker=RetrvR1Reranker(engine, options=FAST))
    alone = await retriever.aretrieve("text 2")
    assert sizes == [1]
    sizes.clear()
    together = await asyncio.gather(*(retriever.aretrieve("text 2") for _ in range(12)))
    assert sum(sizes) == 12
    assert max(sizes) >= 4
    assert [[n.node_id for n in found] for found in together] == [[n.node_id for n in alone]] * 12
    assert {n.status for found in together for n in found} == {"reranked"}
