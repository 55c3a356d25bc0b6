"""What a user learned with one framework holds in the other: the same marks on the same documents, from one function."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_retrv_r1 import RetrvR1Reranker as Compressor
from langchain_retrv_r1 import RetrvR1Retriever as LangChain
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index_retrv_r1 import RetrvR1Rerank
from llama_index_retrv_r1 import RetrvR1Retriever as LlamaIndex

from retrv_r1_retriever import FAST, EngineError, OptionsError, RerankOptions, RetrvR1Reranker
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.observe import Step, Tell
from tests.integrations.langchain.parts import Fixed, prefer
from tests.integrations.llama_index.parts import Fixed as FixedNodes

TEXTS = ("one", "two", " ", "three")
CASES = {
    "reranked": ((0, 1, 3), {}),
    "partial": ((0, 1, 2, 3), {}),
    "fallback": ((0, 1, 2, 3), {"failing": {"open": EngineError("down")}}),
}


def reranker(**engine: Any) -> RetrvR1Reranker:
    return RetrvR1Reranker(ScriptedEngine(slots=prefer("two"), **engine), options=FAST)


@pytest.mark.parametrize("status", CASES)
def test_the_same_marks_on_the_same_documents(status: str) -> None:
    chosen, engine = CASES[status]
    documents = [Document(TEXTS[i], id=str(i), metadata={"n": i}) for i in chosen]
    nodes = [NodeWithScore(node=TextNode(id_=str(i), text=TEXTS[i])) for i in chosen]
    for item, i in zip(nodes, chosen, strict=True):
        item.node.metadata, item.node.excluded_embed_metadata_keys = {"n": i}, ["n"]
    theirs = Compressor(reranker=reranker(**engine)).compress_documents(documents, "q")
    ours = RetrvR1Rerank(reranker(**engine)).postprocess_nodes(nodes, query_str="q")
    assert [n.metadata for n in ours] == [d.metadata for d in theirs]
    assert {d.metadata["status"] for d in theirs} == {status}
    again: list[Any] = LlamaIndex(FixedNodes(nodes), reranker=reranker(**engine)).retrieve("q")
    assert [n.metadata for n in again] == [d.metadata for d in LangChain(
        base=Fixed(found=documents), reranker=reranker(**engine)).invoke("q")]  # fmt: skip


class Heard:
    """Steps as they nest: `retrieve/search` is a search inside a retrieval."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._inside: list[str] = []

    @contextmanager
    def watch(self, step: Step) -> Iterator[Tell]:
        self._inside.append(step.name)
        self.paths.append("/".join(self._inside))
        yield lambda found: None
        self._inside.pop()


def test_an_observer_of_the_reranker_also_sees_the_search_around_it() -> None:
    documents = [Document(text, id=text) for text in ("one", "two")]
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in ("one", "two")]
    for framework in ("langchain", "llama_index"):
        heard = Heard()
        watched = RetrvR1Reranker(ScriptedEngine(slots=prefer("two")), options=FAST, observers=(heard,))
        if framework == "langchain":
            LangChain(base=Fixed(found=documents), reranker=watched).invoke("q")
        else:
            LlamaIndex(FixedNodes(nodes), reranker=watched).retrieve("q")
        assert heard.paths == ["retrieve", "retrieve/search", "retrieve/rerank"], framework


def test_no_option_of_the_core_is_spelled_again() -> None:
    """But for the number of results, which both frameworks have a name for: `k`, and `top_n` of LangChain's compressors."""
    taken = {*LangChain.model_fields, *Compressor.model_fields}
    for call in (LangChain._get_relevant_documents, LlamaIndex, LlamaIndex.retrieve, RetrvR1Rerank):
        taken |= set(inspect.signature(call).parameters)
    assert taken & {field.name for field in fields(RerankOptions)} == {"top_n"}


def test_more_results_than_candidates_are_refused() -> None:
    beyond = RerankOptions(top_k=2, top_n=3)
    with pytest.raises(OptionsError, match="expected at most top_k=2, got 3"):
        LangChain(base=Fixed(found=[]), reranker=reranker()).invoke("q", options=beyond)
    with pytest.raises(OptionsError, match="expected at most top_k=2, got 3"):
        LlamaIndex(FixedNodes([]), reranker=reranker()).retrieve("q", options=beyond)


def test_an_instruction_for_every_query() -> None:
    spy = reranker()
    nodes = [NodeWithScore(node=TextNode(text="one"))]
    LlamaIndex(FixedNodes(nodes), reranker=spy, instruction="Find it.").retrieve("q")
    RetrvR1Rerank(spy, instruction="Find it.").postprocess_nodes(nodes, query_str="q")
    assert [h.prompt.query.instruction for h in spy.engine.opened] == ["Find it.", "Find it."]
