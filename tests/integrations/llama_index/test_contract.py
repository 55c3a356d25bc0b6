"""What every LlamaIndex retriever must keep, over every kind of source, in the sync and the async form."""

from __future__ import annotations

import asyncio
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import instrumentation
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent, RetrievalStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.retrievers.fusion_retriever import FUSION_MODES
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters
from llama_index_retrv_r1 import RankedNode, RerankQuery, RetrvR1Rerank, RetrvR1Retriever

from retrv_r1_retriever import FAST, EngineError, InputError
from tests.integrations.llama_index.parts import SOURCES, Fixed, content_of, make, nodes_of, reranker, scored, texts

KINDS = ("text", "image", "mixed")
FILTERED = ("qdrant", "qdrant_async", "own")
WRAPPED = ("custom", "custom_async", "in_memory_index")


@pytest.fixture(params=["sync", "async"])
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def retrieve(form: str, retriever: RetrvR1Retriever, query: Any, **options: Any) -> list[RankedNode]:
    """The sync form inside a running loop, as in a notebook."""
    if form == "sync":
        found: list[Any] = retriever.retrieve(query, **options)
    else:
        found = await retriever.aretrieve(query, **options)
    assert all(isinstance(node, RankedNode) for node in found)
    return found


def skip_if_unsupported(name: str, form: str) -> None:
    if (name, form) == ("index", "async"):
        pytest.skip("LlamaIndex itself wants an async client here; see test_an_index_without_an_async_client_says_so")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOURCES)
async def test_our_order_and_scores(name: str, kind: str, form: str, tmp_path: Path) -> None:
    skip_if_unsupported(name, form)
    if (name, kind) == ("index", "mixed"):
        pytest.skip("LlamaIndex's own retriever finds its image nodes alone here: it filters by their ids")
    nodes = nodes_of(kind, 8)
    found = await retrieve(form, await make(name, nodes, tmp_path), "text 3")
    assert [content_of(n.node) for n in found] == [content_of(node) for node in reversed(nodes)]
    assert [n.get_content() for n in found] == [f"text {i}" for i in range(7, -1, -1)]
    assert [n.score for n in found] == [1 - i / 8 for i in range(8)]
    assert [n.rank for n in found] == list(range(1, 9))
    assert [n.selected for n in found] == [True] + [False] * 7
    retrieval = {n.get_content(): n.metadata["retrieval_score"] for n in found}
    assert name in ("custom", "custom_async") or max(retrieval, key=lambda text: retrieval[text]) == "text 3"
    assert {n.metadata["status"] for n in found} == {"reranked"}
    assert {n.metadata["reason"] for n in found} == {None}
    assert {n.metadata["even"] for n in found} == {0, 1}
    assert all("status" not in n.node.metadata for n in found)
    trace = found[0].results.trace
    assert trace is not None
    assert sorted(trace.candidates) == sorted(n.node_id for n in found)


@pytest.mark.parametrize("name", SOURCES)
async def test_options_go_through_whole(name: str, form: str, tmp_path: Path) -> None:
    skip_if_unsupported(name, form)
    retriever = await make(name, texts(8), tmp_path, options=FAST.with_options(top_n=3))
    assert len(await retrieve(form, retriever, "text 3")) == 3
    [best] = await retrieve(form, retriever, "text 3", options=FAST.with_options(top_k=4, top_n=1))
    assert len(best.results.trace.candidates) == 4  # type: ignore[union-attr]
    [same] = await retrieve(form, retriever, RerankQuery("text 3", options=FAST.with_options(top_k=4, top_n=1)))
    assert same.node_id == best.node_id


@pytest.mark.parametrize("name", FILTERED)
async def test_filters_at_call_time(name: str, form: str, tmp_path: Path) -> None:
    retriever = await make(name, texts(8), tmp_path)
    only = MetadataFilters(
        filters=[MetadataFilter(key="even", value=0), MetadataFilter(key="part", value="c", operator=FilterOperator.NE)]
    )
    found = await retrieve(form, retriever, "text 3", filters=only)
    assert [n.get_content() for n in found] == ["text 6", "text 4", "text 0"]
    assert len(await retrieve(form, retriever, "text 3")) == 8  # nothing of one call stays for the next
    by_bundle = await retrieve(form, retriever, RerankQuery("text 3", filters=only))
    assert [n.node_id for n in by_bundle] == [n.node_id for n in found]


@pytest.mark.parametrize("name", WRAPPED)
async def test_a_wrapped_retriever_has_its_own_filters(name: str, form: str, tmp_path: Path) -> None:
    retriever = await make(name, texts(3), tmp_path)
    only = MetadataFilters(filters=[MetadataFilter(key="even", value=0)])
    with pytest.raises(InputError, match="Wrap the vector store itself"):
        await retrieve(form, retriever, "text 3", filters=only)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["custom", "custom_async"])
async def test_the_same_node_objects_come_back_unchanged(name: str, kind: str, form: str, tmp_path: Path) -> None:
    nodes = nodes_of(kind, 5)
    before = [node.model_dump() for node in nodes]
    found = await retrieve(form, await make(name, nodes, tmp_path), "q")
    assert all(any(n.node is node for node in nodes) for n in found)
    assert [node.model_dump() for node in nodes] == before


@pytest.mark.parametrize("name", ["custom", "custom_async"])
async def test_nothing_found_is_an_empty_list(name: str, form: str, tmp_path: Path) -> None:
    assert await retrieve(form, await make(name, [], tmp_path), "q") == []


async def test_duplicate_ids_are_not_mixed_up(form: str) -> None:
    """LlamaIndex's retrievers drop some of them, which ones differs by version; a postprocessor keeps all."""
    twins = [TextNode(id_="a", text="text 1"), TextNode(id_="b", text="text 5"), TextNode(id_="a", text="text 9")]
    nodes = scored(twins)
    found = await retrieve(form, RetrvR1Retriever(Fixed(nodes), reranker=reranker()), "q")
    assert {n.node_id for n in found} == {"a", "b"}
    assert all(any(n.node is m.node and n.retrieval_score == m.score for m in nodes) for n in found)
    both = await postprocess(form, nodes, QueryBundle("q"))
    assert [n.node for n in both] == [twins[2], twins[1], twins[0]]
    assert [n.metadata["retrieval_score"] for n in both] == [0.88, 0.89, 0.9]


async def postprocess(form: str, nodes: list[NodeWithScore], bundle: QueryBundle | None, **options: Any) -> list[Any]:
    rerank = RetrvR1Rerank(reranker(), **options)
    if form == "sync":
        return rerank.postprocess_nodes(nodes, bundle)
    return await rerank.apostprocess_nodes(nodes, bundle)


async def test_the_postprocessor_keeps_nodes_and_cuts_last(form: str) -> None:
    nodes = scored(texts(6))
    scores = [n.score for n in nodes]
    found = await postprocess(form, nodes, QueryBundle("q"), options=FAST.with_options(top_n=2))
    assert [n.node for n in found] == [nodes[5].node, nodes[4].node]
    assert [n.node is nodes[i].node for n, i in zip(found, (5, 4), strict=True)] == [True, True]
    assert [n.metadata["retrieval_score"] for n in found] == [scores[5], scores[4]]
    assert [n.score for n in nodes] == scores
    assert await postprocess(form, [], QueryBundle("q")) == []


async def test_reranking_twice_keeps_the_first_stages_score(form: str) -> None:
    nodes = scored(texts(3))
    once = await postprocess(form, nodes, QueryBundle("q"))
    twice = await postprocess(form, once, QueryBundle("q"))
    assert [n.metadata["retrieval_score"] for n in twice] == [n.score for n in reversed(nodes)]


async def test_one_node_many_times_stays_many(form: str) -> None:
    [one] = texts(1)
    nodes = [NodeWithScore(node=one, score=i / 10) for i in range(4)]
    found = await postprocess(form, nodes, QueryBundle("q"))
    assert all(n.node is one for n in found)
    assert sorted(n.retrieval_score for n in found) == [0.0, 0.1, 0.2, 0.3]
    assert [n.score for n in found] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("copied", [lambda found: pickle.loads(pickle.dumps(found)), copy.deepcopy])
async def test_results_can_be_sent_to_another_process(copied: Any) -> None:
    """LlamaIndex's own pickling leaves out what is private; a cache or a worker would get nodes without their decision."""
    found = RetrvR1Retriever(Fixed(scored(texts(3))), reranker=reranker()).retrieve("q")
    again = copied(found)
    assert [n.metadata for n in again] == [n.metadata for n in found]
    assert [n.node for n in again] == [n.node for n in found]
    assert again[0].results == found[0].results


async def test_a_later_sort_or_cutoff_keeps_our_order(form: str) -> None:
    found = await postprocess(form, scored(texts(8)), QueryBundle("q"))
    assert sorted(found, key=lambda n: n.score or 0.0, reverse=True) == found
    cut = SimilarityPostprocessor(similarity_cutoff=0.6).postprocess_nodes(found)
    assert [n.get_content() for n in cut] == [f"text {i}" for i in (7, 6, 5, 4)]


@pytest.mark.parametrize("mode", [FUSION_MODES.SIMPLE, FUSION_MODES.RECIPROCAL_RANK, FUSION_MODES.RELATIVE_SCORE])
async def test_llama_indexs_own_fusion_keeps_our_order(mode: FUSION_MODES, form: str) -> None:
    """It sorts by its own score, or by ours, once more."""
    ours = RetrvR1Retriever(Fixed(scored(texts(8))), reranker=reranker())
    fused = QueryFusionRetriever([ours], llm=MockLLM(), mode=mode, num_queries=1, similarity_top_k=5, use_async=False)
    found = fused.retrieve("q") if form == "sync" else await fused.aretrieve("q")
    assert [n.get_content() for n in found] == [f"text {i}" for i in (7, 6, 5, 4, 3)]


class Recorder(BaseEventHandler):
    seen: list[BaseEvent]

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.seen.append(event)


@pytest.fixture
def events() -> Any:
    root = instrumentation.get_dispatcher()
    recorder = Recorder(seen=[])
    root.add_event_handler(recorder)
    yield recorder.seen
    root.event_handlers.remove(recorder)


async def test_rerank_events_lie_between_the_retrieval_events(form: str, events: list[BaseEvent]) -> None:
    nodes = scored(texts(4))
    retriever = RetrvR1Retriever(Fixed(nodes), reranker=reranker(), options=FAST.with_options(top_n=2))
    found = await retrieve(form, retriever, "q")
    kinds = [type(event) for event in events]
    inner, outer = [RetrievalStartEvent, RetrievalEndEvent], [ReRankStartEvent, ReRankEndEvent, RetrievalEndEvent]
    assert kinds == [RetrievalStartEvent, *inner, *outer]
    start, end = events[3], events[4]
    assert isinstance(start, ReRankStartEvent)
    assert isinstance(end, ReRankEndEvent)
    assert (start.query, start.top_n, start.model_name) == ("q", 2, "retrv-r1 scripted")
    assert [n.node_id for n in start.nodes] == [n.node_id for n in nodes]
    assert [n.node_id for n in end.nodes] == [n.node_id for n in found]
    assert [n.score for n in end.nodes] == [1.0, 0.75]
    assert start.span_id == end.span_id != events[0].span_id


async def test_the_postprocessor_announces_itself(form: str, events: list[BaseEvent]) -> None:
    await postprocess(form, scored(texts(4)), QueryBundle("q"))
    assert [type(event) for event in events] == [ReRankStartEvent, ReRankEndEvent]


async def test_older_callbacks_hear_of_it_too(form: str) -> None:
    """As from LlamaIndex's own rerankers; a query engine hands its callbacks to its postprocessors after they were made."""
    heard = LlamaDebugHandler(print_trace_on_end=False)
    callbacks = CallbackManager([heard])
    retriever = RetrvR1Retriever(Fixed(scored(texts(4))), reranker=reranker(), callback_manager=callbacks)
    engine = RetrieverQueryEngine.from_args(
        retriever, llm=MockLLM(), node_postprocessors=[RetrvR1Rerank(reranker())], callback_manager=callbacks
    )
    found = (engine.query("q") if form == "sync" else await engine.aquery("q")).source_nodes
    [first, second] = heard.get_event_pairs(CBEventType.RERANKING)
    for start, end in (first, second):
        asked, answered = start.payload or {}, end.payload or {}
        assert (asked[EventPayload.QUERY_STR], asked[EventPayload.TOP_K]) == ("q", 4)
        assert asked[EventPayload.MODEL_NAME] == "retrv-r1 scripted"
        assert [n.node_id for n in answered[EventPayload.NODES]] == [n.node_id for n in found]
    [(retrieving, _)] = heard.get_event_pairs(CBEventType.RETRIEVE)
    assert heard._trace_map[retrieving.id_] == [first[0].id_]
    broken = RetrvR1Retriever(
        Fixed(scored(texts(2))),
        reranker=reranker(failing={"probe": EngineError("down")}),
        options=FAST.with_options(on_failure="raise"),
        callback_manager=callbacks,
    )
    with pytest.raises(EngineError, match="down"):
        await retrieve(form, broken, "q")
    assert len(heard.get_event_pairs(CBEventType.RERANKING)) == 3, "a failed one is ended, too"


async def test_an_index_without_an_async_client_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Async client is not initialized"):
        await (await make("index", texts(3), tmp_path)).aretrieve("q")


async def test_a_retriever_that_finds_too_few_is_warned_about(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    from llama_index.core import VectorStoreIndex

    from tests.integrations.llama_index.parts import Words, embedded

    index = VectorStoreIndex(embedded(texts(8)), embed_model=Words())
    RetrvR1Retriever(index.as_retriever(), reranker=reranker())
    assert "at most 2 nodes (similarity_top_k), fewer than top_k=50" in caplog.text


def test_the_event_loop_is_not_blocked_by_a_sync_retriever() -> None:
    import time

    class Slow(Fixed):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            time.sleep(0.2)
            return self.nodes

    async def main() -> int:
        ticks, task = (
            0,
            asyncio.ensure_future(RetrvR1Retriever(Slow(scored(texts(3))), reranker=reranker()).aretrieve("q")),
        )
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(main()) >= 10
