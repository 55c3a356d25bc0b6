"""Collections that llama-index-vector-stores-qdrant wrote are read as they are, and never written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import BaseNode, MediaResource, Node, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQueryMode
from llama_index.vector_stores.qdrant import QdrantVectorStore
from llama_index_retrv_r1 import RetrvR1Retriever
from qdrant_client import QdrantClient, models

from tests.integrations.llama_index.parts import DIM, Words, embedded, image_node, reranker, texts, vector

WRITES = (
    "upsert",
    "upload",
    "delete",
    "create",
    "update",
    "set_payload",
    "overwrite",
    "clear",
    "recreate",
    "batch_update",
)


def sparse(texts: list[str]) -> tuple[list[list[int]], list[list[float]]]:
    """Stands for a sparse model: one dimension per text."""
    return [[sum(map(ord, text)) % 1000] for text in texts], [[1.0] for _ in texts]


def by_index(client: QdrantClient, nodes: list[BaseNode]) -> QdrantVectorStore:
    """The tutorial's way."""
    storage = StorageContext.from_defaults(vector_store=QdrantVectorStore("things", client=client))
    VectorStoreIndex(embedded(nodes), storage_context=storage, embed_model=Words())  # type: ignore[call-arg]
    return QdrantVectorStore("things", client=client)


def by_add(client: QdrantClient, nodes: list[BaseNode]) -> QdrantVectorStore:
    QdrantVectorStore("things", client=client).add(embedded(nodes))
    return QdrantVectorStore("things", client=client)


def named_vector(client: QdrantClient, nodes: list[BaseNode]) -> QdrantVectorStore:
    QdrantVectorStore("things", client=client, dense_vector_name="mine").add(embedded(nodes))
    return QdrantVectorStore("things", client=client, dense_vector_name="mine")


def hybrid(client: QdrantClient, nodes: list[BaseNode]) -> QdrantVectorStore:
    options: dict[str, Any] = {"enable_hybrid": True, "sparse_doc_fn": sparse, "sparse_query_fn": sparse}
    QdrantVectorStore("things", client=client, **options).add(embedded(nodes))
    return QdrantVectorStore("things", client=client, **options)


def old_layout(client: QdrantClient, nodes: list[BaseNode]) -> QdrantVectorStore:
    """An unnamed vector and the text beside the metadata, as versions before 0.2 wrote, or a hand-written script."""
    client.create_collection("things", vectors_config=models.VectorParams(size=DIM, distance=models.Distance.COSINE))
    points = [
        models.PointStruct(
            id=n.node_id, vector=vector(n.get_content().encode()), payload={"text": n.get_content(), **n.metadata}
        )
        for n in nodes
    ]
    client.upsert("things", points)
    return QdrantVectorStore("things", client=client)


def everything(client: QdrantClient) -> Any:
    """Vectors apart: the client's local mode normalises them again on every search, which moves the last bit."""
    info = client.get_collection("things").model_dump()
    points, _ = client.scroll("things", limit=1000, with_payload=True)
    return client.get_collections(), info, sorted((point.model_dump() for point in points), key=lambda p: str(p["id"]))


@pytest.mark.parametrize("form", ["sync", "async"])
@pytest.mark.parametrize("write", [by_index, by_add, named_vector, hybrid, old_layout])
async def test_it_is_read_and_left_as_it_was(write: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = QdrantClient(":memory:")
    nodes = texts(8)
    nodes[2].relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id="the document")
    store, before = write(client, nodes), everything(client)
    for name in dir(client):
        if name.startswith(WRITES):
            monkeypatch.setattr(client, name, lambda *a, _name=name, **k: pytest.fail(f"{_name} was called"))
    mode = VectorStoreQueryMode.HYBRID if write is hybrid else VectorStoreQueryMode.DEFAULT
    retriever = RetrvR1Retriever(store, reranker=reranker(), embed_model=Words(), query_mode=mode)
    only = MetadataFilters(filters=[MetadataFilter(key="part", value="c")])
    if form == "sync":
        found, filtered = retriever.retrieve("text 5"), retriever.retrieve("text 5", filters=only)
    else:
        found, filtered = await retriever.aretrieve("text 5"), await retriever.aretrieve("text 5", filters=only)
    assert [n.get_content() for n in found] == [f"text {i}" for i in range(7, -1, -1)]
    assert [n.get_content() for n in filtered] == ["text 5", "text 2"]
    assert [n.node_id for n in found] == [n.node_id for n in reversed(nodes)]
    assert [n.node.metadata["part"] for n in found] == [n.metadata["part"] for n in reversed(nodes)]
    if write is not old_layout:
        assert filtered[1].node.ref_doc_id == "the document"
    assert everything(client) == before


def test_the_query_mode_reaches_the_store() -> None:
    """A sparse search finds the one text with these words, a dense one would find all."""
    store = hybrid(QdrantClient(":memory:"), texts(4))
    retriever = RetrvR1Retriever(
        store, reranker=reranker(), embed_model=Words(), query_mode=VectorStoreQueryMode.SPARSE
    )
    assert [n.get_content() for n in retriever.retrieve("text 2")] == ["text 2"]


async def test_every_kind_of_node_comes_back_as_what_it_was(tmp_path: Path) -> None:
    nodes: list[BaseNode] = [
        texts(1)[0],
        image_node("blue", 1, metadata={"shop": 2}),
        Node(id_="00000000-0000-0000-0000-000000000002", text_resource=MediaResource(text="text 2")),
    ]
    client = QdrantClient(":memory:")
    found = RetrvR1Retriever(by_add(client, nodes), reranker=reranker(), embed_model=Words()).retrieve("q")
    assert [type(n.node) for n in found] == [Node, type(nodes[1]), TextNode]
    assert found[1].node.metadata == {"shop": 2}


def test_a_collection_on_disk_is_opened_again(tmp_path: Path) -> None:
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    by_add(client, texts(4))
    client.close()
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    store = QdrantVectorStore("things", client=client)
    found = RetrvR1Retriever(store, reranker=reranker(), embed_model=Words()).retrieve("text 2")
    assert [n.get_content() for n in found] == ["text 3", "text 2", "text 1", "text 0"]
    client.close()
