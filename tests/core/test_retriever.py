from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from retrv_r1_retriever.embedders import TextEmbedder
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.errors import ImageError, InputError, OptionsError, RerankTimeout
from retrv_r1_retriever.options import BALANCED, FAST
from retrv_r1_retriever.parser import Check, Thought
from retrv_r1_retriever.progress import Progress
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.store import Equals, Filter
from retrv_r1_retriever.types import Candidate, Query, RankedResults, Status
from tests.helpers import candidates, documents, png

SLOTS = (0.0, 2.0, 1.0, -9.0)


class FirstStage:
    """Remembers what it was asked."""

    def __init__(self, count: int = 3, delay_s: float = 0.0, error: Exception | None = None) -> None:
        self.count, self.delay_s, self.error = count, delay_s, error
        self.asked: list[tuple[Query, int, Filter | None]] = []

    async def __call__(self, query: Query, *, top_k: int, filter: Filter | None = None) -> Sequence[Candidate]:
        self.asked.append((query, top_k, filter))
        await asyncio.sleep(self.delay_s)
        if self.error:
            raise self.error
        return candidates(self.count)


def ids(results: RankedResults) -> list[str]:
    return [r.document.id for r in results]


async def test_from_a_question_to_a_ranked_list() -> None:
    first_stage, wanted = FirstStage(), Filter(must=(Equals("color", "red"),))
    retriever = RetrvR1Retriever(first_stage=first_stage, engine=ScriptedEngine(slots=SLOTS), options=FAST)
    results = await retriever.aretrieve("red shoe", filter=wanted, options=FAST.with_options(top_k=7, top_n=2))
    assert ids(results) == ["doc-1", "doc-2"]
    assert results.status is Status.RERANKED
    assert first_stage.asked == [(Query.of("red shoe"), 7, wanted)]
    assert results.trace is not None
    timings = results.trace.timings
    assert timings["total"] >= timings["first_stage"] + timings["open"]


async def test_a_store_and_an_embedder_are_a_first_stage() -> None:
    class Store:
        async def search(self, vector: np.ndarray, top_k: int, *, filter: Any = None, with_memory: bool = True) -> Any:
            assert vector.tolist() == [8.0]
            assert not with_memory  # this engine reads none
            return candidates(top_k)

    embedder = TextEmbedder(lambda texts: [[len(t)] for t in texts])
    retriever = RetrvR1Retriever(
        store=Store(),  # type: ignore[arg-type]
        embedder=embedder,
        engine=ScriptedEngine(slots=SLOTS),
        options=FAST.with_options(top_k=3),
    )
    assert ids(await retriever.aretrieve("red shoe")) == ["doc-1", "doc-2", "doc-0"]
    with pytest.raises(InputError, match="TextEmbedder: expected a text query, got a query with an image"):
        await retriever.aretrieve("red shoe", image=png())


async def test_an_image_is_decoded_once_and_the_callers_query_comes_back() -> None:
    first_stage, engine = FirstStage(), ScriptedEngine(slots=SLOTS)
    retriever = RetrvR1Retriever(first_stage=first_stage, engine=engine, options=FAST)
    picture = png()
    results = await retriever.aretrieve("this in blue", image=picture)
    assert results.query.content.image is picture
    assert hasattr(first_stage.asked[0][0].content.image, "size")
    assert hasattr(engine.opened[0].prompt.query.content.image, "size")
    assert (await retriever.aretrieve("", image=picture)).query.content.text is None
    with pytest.raises(ImageError, match="expected a readable"):
        await retriever.aretrieve("x", image=b"nonsense")


async def test_more_than_top_k_candidates_are_cut() -> None:
    engine = ScriptedEngine(slots=lambda prompt: [0.0] * len(prompt.slots))
    retriever = RetrvR1Retriever(first_stage=FirstStage(300), engine=engine, options=FAST.with_options(top_k=20))
    assert len(await retriever.aretrieve("q")) == 20


async def test_no_candidates() -> None:
    results = await RetrvR1Retriever(first_stage=FirstStage(0), engine=ScriptedEngine()).aretrieve("q")
    assert (len(results), results.status) == (0, Status.FALLBACK)
    assert "the first stage returned none" in (results.reason or "")


@pytest.mark.parametrize("on_failure", ["fallback", "raise"])
async def test_first_stage_failures_are_always_raised(on_failure: Any) -> None:
    options = BALANCED.with_options(on_failure=on_failure, timeout_s=0.2)
    for first_stage, kind, message in (
        (FirstStage(error=ConnectionError("no server")), ConnectionError, "no server"),
        (FirstStage(error=TimeoutError("its own")), TimeoutError, "its own"),
        (FirstStage(delay_s=60), RerankTimeout, "the first stage took longer than timeout_s=0.2"),
    ):
        retriever = RetrvR1Retriever(first_stage=first_stage, engine=ScriptedEngine(), options=options)
        with pytest.raises(kind, match=message):
            await retriever.aretrieve("q")


async def test_the_timeout_covers_the_whole_call() -> None:
    class SlowThought(ScriptedEngine):
        async def generate(self, handle: Any, params: Any) -> Any:
            await asyncio.sleep(60)

    retriever = RetrvR1Retriever(
        first_stage=FirstStage(delay_s=0.4),
        engine=SlowThought(slots=SLOTS),
        options=BALANCED.with_options(timeout_s=0.5),
    )
    started = asyncio.get_running_loop().time()
    results = await retriever.aretrieve("q")
    assert results.status is Status.PARTIAL
    assert asyncio.get_running_loop().time() - started < 0.85


async def test_time_the_first_stage_used_is_not_given_to_the_reranker() -> None:
    given = []

    class Spy(RetrvR1Reranker):
        async def arerank(
            self, query: Any, candidates: Any, *, options: Any = None, progress: Any = None
        ) -> RankedResults:
            given.append(options.timeout_s)
            return await super().arerank(query, candidates, options=options)

    spy = Spy(ScriptedEngine(slots=SLOTS))
    retriever = RetrvR1Retriever(
        first_stage=FirstStage(delay_s=0.05), reranker=spy, options=FAST.with_options(timeout_s=1)
    )
    await retriever.aretrieve("q")
    await retriever.aretrieve_batch(["a", "b"])
    await retriever.aretrieve("q", options=FAST.with_options(timeout_s=None))
    assert all(t is None or t <= 0.95 for t in given)
    assert given[-1] is None


async def test_a_batch_shares_its_thinking() -> None:
    engine = ScriptedEngine(
        Thought("x", (), (), 0), slots=lambda prompt: (0.0, float(prompt.query.content.text or 0), -9.0, -9.0)
    )
    retriever = RetrvR1Retriever(
        first_stage=FirstStage(), engine=engine, options=BALANCED.with_options(max_think_share=0.5)
    )
    batch = await retriever.aretrieve_batch(["3", Query.of("1"), "2", "4"])
    assert [ids(r)[0] for r in batch] == ["doc-1", "doc-0", "doc-0", "doc-1"]
    assert [r.query.content.text for r in batch] == ["3", "1", "2", "4"]
    assert all(r.trace and "first_stage" in r.trace.timings for r in batch)
    assert engine.leaked == 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"engine": ScriptedEngine()}, r"first stage: expected store and embedder, or first_stage, got \[\]"),
        ({"engine": ScriptedEngine(), "store": object()}, r"got \['store'\]"),
        (
            {"engine": ScriptedEngine(), "store": object(), "first_stage": FirstStage()},
            r"got \['store', 'first_stage'\]",
        ),
        ({"first_stage": FirstStage()}, r"model: expected engine, or reranker alone, got \[\]"),
        ({"first_stage": FirstStage(), "engine": object(), "reranker": object()}, r"got \['engine', 'reranker'\]"),
        (
            {"first_stage": FirstStage(), "compressor": object(), "reranker": object()},
            r"got \['compressor', 'reranker'\]",
        ),
        (
            {"first_stage": FirstStage(), "reranker": ScriptedEngine()},
            r"got ScriptedEngine\. Wrap it: .*RetrvR1Reranker\(eng",
        ),
        ({"first_stage": FirstStage(), "reranker": "jina"}, "reranker: expected .*RetrvR1Reranker, got str"),
    ],
)
def test_half_a_pipeline_is_named(parts: Any, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        RetrvR1Retriever(**parts)


async def test_queries_that_cannot_be_used() -> None:
    retriever = RetrvR1Retriever(first_stage=FirstStage(), engine=ScriptedEngine(slots=SLOTS))
    with pytest.raises(InputError, match="query: expected a text or an image, got an empty string"):
        await retriever.aretrieve(" ")
    with pytest.raises(InputError, match="query: expected str or Query, got NoneType"):
        await retriever.aretrieve(None, image=png())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"image: expected None beside a Query.*Query\.of"):
        await retriever.aretrieve(Query.of("x"), image=png())


def test_the_sync_forms_and_documents_from_a_first_stage() -> None:
    async def first_stage(query: Query, *, top_k: int, filter: Filter | None = None) -> Any:
        return documents(3)

    retriever = RetrvR1Retriever(first_stage=first_stage, engine=ScriptedEngine(slots=SLOTS), options=FAST)
    assert ids(retriever.retrieve("q")) == ["doc-1", "doc-2", "doc-0"]
    assert len(retriever.retrieve_batch(["a", "b", "c"], concurrency=1)) == 3


def test_the_main_path_reads_aloud() -> None:
    body = inspect.getsource(RetrvR1Retriever.aretrieve).split('"""')[-1].strip().splitlines()
    assert len(body) <= 10


@pytest.mark.parametrize("thinks", [True, False])
async def test_progress_is_told_in_order(thinks: bool) -> None:
    steps: list[Progress] = []

    async def listen(progress: Progress) -> None:
        steps.append(progress)

    engine = ScriptedEngine(Thought("x", (), (Check(2, "no", False), Check(1, "yes", True)), 1), slots=SLOTS)
    options = BALANCED.with_options(think="always" if thinks else "never")
    retriever = RetrvR1Retriever(first_stage=FirstStage(), engine=engine, options=options)
    results = await retriever.aretrieve("q", progress=listen)
    opened = [Progress("thinking"), Progress("opened", index=2, id="doc-2"), Progress("opened", index=1, id="doc-1")]
    assert steps[:-1] == [Progress("retrieved", candidates=3), *(opened if thinks else [])]
    assert steps[-1].stage == "answered"
    assert steps[-1].results is not None
    assert ids(steps[-1].results) == ids(results)
    assert results.status is Status.RERANKED
    steps.clear()
    await RetrvR1Retriever(first_stage=FirstStage(0), engine=engine).aretrieve("q", progress=listen)
    assert [(s.stage, None if s.results is None else s.results.status) for s in steps] == [
        ("retrieved", None),
        ("answered", Status.FALLBACK),
    ]


async def test_a_listener_that_fails_ends_the_call_and_leaks_nothing() -> None:
    async def listen(progress: Progress) -> None:
        if progress.stage == "opened":
            raise LookupError("no such bar")

    engine = ScriptedEngine(Thought("x", (), (Check(1, "yes", True),), 1), slots=SLOTS)
    options = BALANCED.with_options(think="always")
    with pytest.raises(LookupError, match="no such bar"):
        await RetrvR1Retriever(first_stage=FirstStage(), engine=engine).aretrieve("q", progress=listen, options=options)
    assert engine.leaked == 0
