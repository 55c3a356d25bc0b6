"""Many calls at once: none waits for another, none blocks the loop, cancelled ones leave nothing behind."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from langchain_retrv_r1 import RetrvR1Retriever

from retrv_r1_retriever import RerankOptions
from retrv_r1_retriever import RetrvR1Reranker as CoreReranker
from retrv_r1_retriever.config import Config, open_engine
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.parser import Check, Thought
from tests.integrations.langchain.parts import OPTIONS, THINKING, Fixed, documents, prefer, reranker, texts, written

CALLS = 200


def slow(delay_s: float, **options: Any) -> RetrvR1Retriever:
    """A base and an engine that take their time without using any: network calls, as far as a loop can tell."""
    engine = ScriptedEngine(Thought("x", (), (Check(2, "yes", True),), 2), slots=[0.0] * 5 + [-9.0], delay_s=delay_s)
    core = CoreReranker(engine, options=options.pop("options", THINKING))
    return RetrvR1Retriever(base=Fixed(found=documents(), delay_s=delay_s), reranker=core, **options)


async def test_many_calls_take_about_as_long_as_one() -> None:
    retriever = slow(0.25)
    started = time.perf_counter()
    await retriever.ainvoke("q")
    one = time.perf_counter() - started
    started = time.perf_counter()
    found = await asyncio.gather(*(retriever.ainvoke(f"q{i}") for i in range(CALLS)))
    together = time.perf_counter() - started
    assert {texts(f)[0] for f in found} == {"three green stars"}
    print(f"one {one:.2f} s, {CALLS} together {together:.2f} s")
    assert together < CALLS * one / 20, f"{CALLS} calls took {together:.1f} s, one {one:.1f} s"  # the rest is Python's
    assert set(retriever.base.asked) == {"async"}


async def test_a_batch_is_many_calls_at_once() -> None:
    retriever = slow(0.2)
    started = time.perf_counter()
    found = await retriever.abatch([f"q{i}" for i in range(50)], k=1)
    assert time.perf_counter() - started < 10 * 0.2 * 3
    assert [len(f) for f in found] == [1] * 50
    assert [len(f) for f in slow(0.01).batch(["a", "b", "c"], k=2)] == [2, 2, 2]
    results = await slow(0).abatch(["a", " "], return_exceptions=True)
    assert (len(results[0]), type(results[1]).__name__) == (5, "InputError")


@pytest.mark.parametrize("base", ["theirs", "any retriever"])
async def test_the_loop_stays_free(base: str) -> None:
    class Blocking(Fixed):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> Any:
            time.sleep(0.5)
            return self.found

        _aget_relevant_documents = Fixed.__mro__[1]._aget_relevant_documents  # theirs: in a thread

    retriever = RetrvR1Retriever(
        base=written() if base == "theirs" else Blocking(found=documents()), reranker=reranker(delay_s=0.1)
    )
    longest, last, done = 0.0, time.perf_counter(), asyncio.ensure_future(retriever.ainvoke("q"))
    while not done.done():
        await asyncio.sleep(0.005)
        longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
    assert longest < 0.3
    assert len(done.result()) == 5


async def test_a_cancelled_call_leaves_nothing_open() -> None:
    retriever = slow(0.05)
    tasks = [asyncio.ensure_future(retriever.ainvoke("q")) for _ in range(20)]
    await asyncio.sleep(0.2)
    for task in tasks:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(d) for d in done} == {asyncio.CancelledError}
    engine = retriever.reranker.engine
    assert engine.opened
    await asyncio.sleep(0.2)
    assert engine.leaked == 0
    assert len(await retriever.ainvoke("q")) == 5


async def test_the_timeout_covers_base_and_model() -> None:
    short = slow(0.2, options=THINKING.with_options(timeout_s=0.7))
    started = time.perf_counter()
    found = await short.ainvoke("q")
    assert time.perf_counter() - started < 1.5
    assert {d.metadata["status"] for d in found} == {"partial"}
    assert "timed out while thinking" in found[0].metadata["reason"]
    with pytest.raises(TimeoutError, match=r"the first stage took longer than timeout_s=0\.1"):
        await short.ainvoke("q", options=THINKING.with_options(timeout_s=0.1))


def test_several_loops_and_threads_share_one_retriever() -> None:
    retriever = RetrvR1Retriever(base=written(), reranker=reranker("square", delay_s=0.01))
    found: list[Any] = []

    def loop() -> None:
        async def many() -> Any:
            return await asyncio.gather(*(retriever.ainvoke("q") for _ in range(5)))

        for _ in range(3):
            found.extend(asyncio.run(many()))

    threads = [threading.Thread(target=loop) for _ in range(3)]
    threads += [threading.Thread(target=lambda: found.append(retriever.invoke("q"))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 * 3 * 5 + 5
    assert {texts(f)[0] for f in found} == {"one blue square"}
    assert retriever.reranker.engine.leaked == 0


async def test_a_sync_call_inside_a_running_loop() -> None:
    assert texts(RetrvR1Retriever(base=written(), reranker=reranker("square")).invoke("q"))[0] == "one blue square"


async def test_the_local_engine_reads_concurrent_calls_together(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: LocalEngine = open_engine(Config())
    sizes: list[int] = []
    read = engine._batcher._read

    def spy(work: Any) -> Any:
        sizes.append(len(work))
        return read(work)

    monkeypatch.setattr(engine._batcher, "_read", spy)
    options = RerankOptions(top_k=5, max_recompute=5, think="always", max_new_tokens=24, timeout_s=None)
    retriever = RetrvR1Retriever(base=written(), reranker=CoreReranker(engine, options=options))
    await retriever.ainvoke("one red ring")
    alone = len(sizes)
    assert set(sizes) == {1}
    sizes.clear()
    queries = [f"{n} {c} ring" for n in ("one", "two", "three", "many") for c in ("red", "blue")]
    found = await retriever.abatch(queries)
    assert [len(f) for f in found] == [5] * 8
    assert max(sizes) >= 4
    assert len(sizes) < 4 * alone, "eight calls in fewer passes than four alone"


def test_slots_prefer_what_they_are_told() -> None:
    """The tests above lean on this."""
    engine = ScriptedEngine(slots=prefer("green"))
    found = RetrvR1Retriever(base=written(), reranker=CoreReranker(engine, options=OPTIONS)).invoke("two red rings")
    assert texts(found)[0] == "three green stars"
