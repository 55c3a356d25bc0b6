from __future__ import annotations

from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from langchain_retrv_r1 import RetrvR1Reranker, RetrvR1Retriever
from pydantic import ValidationError

from retrv_r1_retriever import Query
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.errors import EngineError, InputError, SchemaError
from tests.integrations.langchain.parts import OPTIONS, TEXTS, Fixed, documents, png, reranker, texts, written


@pytest.mark.parametrize("is_async", [False, True])
async def test_documents_come_back_reordered_and_marked(is_async: bool) -> None:
    compressor, given = RetrvR1Reranker(reranker=reranker("stars"), top_n=2), documents()
    found = await (compressor.acompress_documents(given, "q") if is_async else _now(compressor, given))
    assert texts(found)[0] == "three green stars"
    assert len(found) == 2
    assert found[0].metadata["n"] == 2
    assert found[0].metadata["retrieval_score"] is None
    assert found[0].metadata["retrv_r1"]["retrieval_rank"] == 3
    assert given == documents()


async def _now(compressor: RetrvR1Reranker, given: Any) -> Any:
    return compressor.compress_documents(given, "q")  # inside a running loop, as in a notebook


async def test_nothing_in_nothing_out_and_no_call() -> None:
    core = reranker()
    compressor = RetrvR1Reranker(reranker=core)
    assert (compressor.compress_documents([], "q"), await compressor.acompress_documents([], "q")) == ([], [])
    assert core.engine.opened == []


@pytest.mark.parametrize("is_async", [False, True])
async def test_in_the_framework_s_own_compression_retriever(is_async: bool) -> None:
    compressor = RetrvR1Reranker(reranker=reranker("stars"), top_n=2)
    retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=written().as_retriever())
    found = await retriever.ainvoke("a ring") if is_async else retriever.invoke("a ring")
    assert (texts(found)[0], len(found)) == ("three green stars", 2)
    assert found[0].metadata["status"] == "reranked"


def test_queries_with_pictures_and_instructions() -> None:
    core = reranker()
    RetrvR1Reranker(reranker=core, instruction="Find the shape.").compress_documents(documents(), "q")
    assert core.engine.opened[-1].prompt.query.instruction == "Find the shape."
    RetrvR1Reranker(reranker=core).compress_documents(documents(), Query.of("q", png()))
    assert core.engine.opened[-1].prompt.query.content.image.size == (4, 3)


async def test_failures_fall_back_or_raise() -> None:
    core = reranker(failing={"open": EngineError("down")})
    found = await RetrvR1Reranker(reranker=core, top_n=3).acompress_documents(documents(), "q")
    assert texts(found) == list(TEXTS[:3])
    assert {(d.metadata["status"], d.metadata["reason"]) for d in found} == {("fallback", "down")}
    strict = OPTIONS.with_options(on_failure="raise")
    with pytest.raises(EngineError, match="down"):
        RetrvR1Reranker(reranker=core, options=strict).compress_documents(documents(), "q")


def test_calls_that_cannot_be_used() -> None:
    compressor = RetrvR1Reranker(reranker=reranker())
    with pytest.raises(InputError, match="query: expected str or Query, got NoneType"):
        compressor.compress_documents(documents(), None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="candidates: expected at most 127, got 128"):
        compressor.compress_documents([Document(str(i)) for i in range(128)], "q")
    with pytest.raises(SchemaError, match="payload of point #1: expected text"):
        compressor.compress_documents([Document("")], "q")
    for parts, message in (
        ({"reranker": ScriptedEngine()}, "reranker: expected retrv_r1_retriever.RetrvR1Reranker, got ScriptedEngine"),
        ({"reranker": reranker(), "top_n": 0}, "top_n: expected an integer >= 1 or None, got 0"),
        ({"reranker": reranker(), "model": "x"}, "Extra inputs are not permitted"),
    ):
        with pytest.raises(ValidationError, match=message):
            RetrvR1Reranker(**parts)


def test_texts_are_no_documents() -> None:
    with pytest.raises(InputError, match=r"documents: expected LangChain Documents, got str\. Wrap it"):
        RetrvR1Reranker(reranker=reranker()).compress_documents(["a text"], "q")  # type: ignore[list-item]


async def test_reranking_twice_keeps_the_first_stages_score() -> None:
    """As when our retriever stands in a chain of compressors, or in LangChain's own `ContextualCompressionRetriever`."""
    once = RetrvR1Retriever(base=written(), reranker=reranker("stars")).invoke("two red rings")
    first = {d.metadata["_id"]: d.metadata["retrieval_score"] for d in once}
    assert len(set(first.values())) > 1
    compressor = RetrvR1Reranker(reranker=reranker("square"))
    twice = await compressor.acompress_documents(once, "two red rings")
    again = RetrvR1Retriever(base=Fixed(found=list(once)), reranker=reranker("square")).invoke("two red rings")
    for found in (twice, again):
        assert texts(found)[0] == "one blue square"
        assert {d.metadata["_id"]: d.metadata["retrieval_score"] for d in found} == first
        assert [d.metadata["retrv_r1"]["retrieval_score"] for d in found] == [first[d.metadata["_id"]] for d in found]


def test_top_n_beyond_top_k_is_no_error_here() -> None:
    """`top_k` belongs to a first stage; a compressor ranks what it is given."""
    given = [Document(f"text {i}") for i in range(30)]
    core = reranker(options=OPTIONS.with_options(top_k=5))
    assert len(RetrvR1Reranker(reranker=core, top_n=20).compress_documents(given, "q")) == 20


async def test_inside_a_chain_it_reports_to_the_chain() -> None:
    compressor = RetrvR1Reranker(reranker=reranker("stars"))
    chain = RunnableLambda(lambda q: compressor.compress_documents(documents(), q))
    events = [e["name"] async for e in chain.astream_events("q", version="v2") if e["event"] == "on_custom_event"]
    assert events == ["retrv_r1.answered"]
