"""A reranker that fails or is too slow: the first stage's order with the reason, or an error, as asked for."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index_retrv_r1 import RetrvR1Rerank, RetrvR1Retriever

from retrv_r1_retriever import FAST, EngineError, RerankTimeout
from tests.integrations.llama_index.parts import AsyncOnly, Fixed, reranker, scored, texts


async def call(kind: str, nodes: list[NodeWithScore], decides: Any, **options: Any) -> list[Any]:
    asked = FAST.with_options(**options)
    match kind:
        case "retrieve":
            return list(RetrvR1Retriever(Fixed(nodes), reranker=decides, options=asked).retrieve("q"))
        case "aretrieve":
            return await RetrvR1Retriever(AsyncOnly(nodes), reranker=decides, options=asked).aretrieve("q")
        case "postprocess":
            return RetrvR1Rerank(decides, options=asked).postprocess_nodes(nodes, query_str="q")
    return await RetrvR1Rerank(decides, options=asked).apostprocess_nodes(nodes, query_str="q")


KINDS = ("retrieve", "aretrieve", "postprocess", "apostprocess")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_failed_reranker_gives_the_first_stages_order(kind: str) -> None:
    nodes = scored(texts(4))
    found = await call(kind, nodes, reranker(failing={"probe": RuntimeError("CUDA out of memory")}))
    assert [n.node for n in found] == [n.node for n in nodes]
    assert {n.metadata["status"] for n in found} == {"fallback"}
    assert "CUDA out of memory" in found[0].metadata["reason"]
    assert [n.metadata["retrieval_score"] for n in found] == [n.score for n in nodes]
    assert {n.score for n in found} == {None}  # nobody takes it for a reranking
    assert sorted(found, key=lambda n: n.score or 0.0, reverse=True) == found
    assert SimilarityPostprocessor(similarity_cutoff=0.0).postprocess_nodes(found) == []  # as documented


@pytest.mark.parametrize("kind", KINDS)
async def test_or_raises(kind: str) -> None:
    decides = reranker(failing={"probe": RuntimeError("CUDA out of memory")})
    with pytest.raises(EngineError, match="CUDA out of memory"):
        await call(kind, scored(texts(4)), decides, on_failure="raise")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_slow_reranker_times_out(kind: str) -> None:
    started = time.monotonic()
    found = await call(kind, scored(texts(4)), reranker(delay_s=5), timeout_s=0.3)
    assert time.monotonic() - started < 2
    assert {n.metadata["status"] for n in found} == {"fallback"}
    assert "timed out" in found[0].metadata["reason"]
    with pytest.raises(RerankTimeout, match="timed out"):
        await call(kind, scored(texts(4)), reranker(delay_s=5), timeout_s=0.3, on_failure="raise")


async def test_a_slow_first_stage_is_always_an_error() -> None:
    class Slow(AsyncOnly):
        async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            await asyncio.sleep(5)
            return self.nodes

    retriever = RetrvR1Retriever(Slow([]), reranker=reranker(), options=FAST.with_options(timeout_s=0.05))
    with pytest.raises(RerankTimeout, match="the first stage took longer than timeout_s"):
        await retriever.aretrieve("q")


async def test_a_first_stage_that_fails_is_not_hidden() -> None:
    class Broken(AsyncOnly):
        async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            raise ConnectionError("no route")

    with pytest.raises(ConnectionError, match="no route"):
        await RetrvR1Retriever(Broken([]), reranker=reranker()).aretrieve("q")
