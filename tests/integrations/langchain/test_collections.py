"""Collections that langchain-qdrant wrote: dense, hybrid, named vectors. Read as they are, never written to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_qdrant import QdrantVectorStore
from langchain_qdrant.qdrant import QdrantVectorStoreError
from langchain_retrv_r1 import RetrvR1Retriever
from qdrant_client import QdrantClient

from retrv_r1_retriever import PayloadSchema, Query, TextEmbedder
from retrv_r1_retriever import RetrvR1Retriever as CoreRetriever
from retrv_r1_retriever.errors import InputError
from retrv_r1_retriever.qdrant import QdrantStore
from tests.integrations.langchain.parts import (
    KINDS,
    OPTIONS,
    TEXTS,
    Words,
    contents,
    documents,
    png,
    red,
    reranker,
    texts,
    written,
)

READS = {
    "query_points", "query_batch_points", "scroll", "retrieve", "count", "get_collection", "collection_exists",
    "close",  # of an earlier test, when it is collected
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the client's methods, as they are called."""
    made: list[str] = []

    def spy(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("_") and callable(value):
            made.append(name)
        return value

    monkeypatch.setattr(QdrantClient, "__getattribute__", spy)
    return made


def reopened(store: QdrantVectorStore, kind: str) -> QdrantVectorStore:
    """The collection as another process opens it."""
    sparse = store._sparse_embeddings
    return QdrantVectorStore(store.client, "theirs", Words(), sparse_embedding=sparse, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
async def test_through_their_store(kind: str, calls: list[str]) -> None:
    store = written(kind)
    before = contents(store.client)
    retriever = RetrvR1Retriever(base=reopened(store, kind), reranker=reranker("square"), k=2)
    calls.clear()
    for found in (retriever.invoke("two red rings"), await retriever.ainvoke("two red rings")):
        assert texts(found)[0] == "one blue square"
        assert found[0].metadata["color"] == "blue"
        assert found[0].metadata["_collection_name"] == "theirs"
        assert found.results[0].document.id == found[0].metadata["_id"]
    assert set(calls) <= READS
    assert calls
    assert contents(store.client) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_through_our_store(kind: str, calls: list[str]) -> None:
    theirs = written(kind)
    before = contents(theirs.client)
    calls.clear()
    schema = PayloadSchema(text=theirs.content_payload_key, vector=theirs.vector_name)
    store = QdrantStore("theirs", client=theirs.client, schema=schema)
    core = CoreRetriever(
        store=store, embedder=TextEmbedder(Words().embed_documents), reranker=reranker("square"), options=OPTIONS
    )
    found = await RetrvR1Retriever(base=core, k=2).ainvoke("two red rings")
    assert texts(found)[0] == "one blue square"
    assert found[0].metadata[theirs.metadata_payload_key]["color"] == "blue"
    assert found[0].id in {str(id) for id, _ in before["theirs"][1]}
    assert set(calls) <= READS
    assert contents(theirs.client) == before


def test_a_wrong_field_or_vector_is_named() -> None:
    client = written("named").client
    with pytest.raises(ValueError, match=r"payload field 'title'.*the fields found are about.*body"):
        QdrantStore("theirs", client=client, schema=PayloadSchema(text="title", vector="text"))
    with pytest.raises(ValueError, match="vectors named 'text'"):
        QdrantStore("theirs", client=client, schema=PayloadSchema(text="body"))


def test_qdrants_own_filter_on_our_own_store_is_named() -> None:
    store = QdrantStore("theirs", client=written().client, schema=PayloadSchema(text="page_content", vector=""))
    core = CoreRetriever(store=store, embedder=TextEmbedder(Words().embed_documents), reranker=reranker())
    with pytest.raises(InputError, match=r"expected retrv_r1_retriever\.Filter or None, got qdrant_client\.Filter"):
        RetrvR1Retriever(base=core).invoke("one", filter=red())


class Colours:
    """A multimodal embedder that knows what the words' one knows: a picture of pure colour is that colour's word."""

    def __init__(self, size: int = 64) -> None:
        self.words = Words(size)

    def embed(self, items: Sequence[Any]) -> np.ndarray:
        return np.array([self.words.embed_query(self._text(item)) for item in items], np.float32)

    def _text(self, item: Any) -> str:
        content = item.content if isinstance(item, Query) else item
        if content.image is None:
            return str(content.text)
        pixel = content.image.getpixel((0, 0))
        return f"{content.text or ''} {('red', 'green', 'blue')[pixel.index(max(pixel))]}"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_query_with_a_picture_needs_an_embedder_that_sees(kind: str) -> None:
    retriever = RetrvR1Retriever(base=written(kind), reranker=reranker(), embedder=Colours(), k=5)
    for found in (retriever.invoke("", image=png("blue")), await retriever.ainvoke("", image=png("blue"))):
        assert {d.page_content for d in found if d.metadata["retrv_r1"]["retrieval_rank"] <= 2} == {
            "one blue square",
            "two blue rings",
        }
    text_only = TextEmbedder(Words().embed_documents)
    blind = RetrvR1Retriever(base=written(kind), reranker=reranker(), embedder=text_only)
    with pytest.raises(InputError, match="TextEmbedder: expected text, got an image without text"):
        blind.invoke("", image=png())


def test_an_embedder_in_a_hybrid_stores_place_is_said(caplog: pytest.LogCaptureFixture) -> None:
    RetrvR1Retriever(base=written("dense"), reranker=reranker(), embedder=Colours())
    assert caplog.text == ""
    RetrvR1Retriever(base=written("hybrid"), reranker=reranker(), embedder=Colours())
    assert "the sparse half of this hybrid store is not used" in caplog.text


def test_an_embedder_of_another_size_is_refused() -> None:
    retriever = RetrvR1Retriever(base=written(), reranker=reranker(), embedder=Colours(16))
    with pytest.raises(QdrantVectorStoreError, match=r"64 dimensions\. Selected embeddings are 16-dimensional"):
        retriever.invoke("red")


def test_payloads_langchain_never_wrote() -> None:
    """A point without `page_content` has nothing to read: it comes last, and the status says so."""
    store = written(found=[Document("one red circle")])
    from qdrant_client.models import PointStruct

    store.client.upsert("theirs", [PointStruct(id=7, vector={"": Words().embed_query("x")}, payload={"title": "x"})])
    found = RetrvR1Retriever(base=store, reranker=reranker()).invoke("x")
    assert (texts(found), found[0].metadata["status"]) == (["one red circle", ""], "partial")


def test_documents_are_what_the_store_itself_returns() -> None:
    store = written()
    plain = {d.page_content: d for d in store.similarity_search("one", k=5)}
    for document in RetrvR1Retriever(base=store, reranker=reranker("stars")).invoke("one"):
        theirs = plain.pop(document.page_content)
        assert document.metadata.items() >= theirs.metadata.items()
    assert not plain
    assert len(documents()) == len(TEXTS)
