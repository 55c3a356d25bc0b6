"""Collections of llama-index-vector-stores-qdrant with memory built beside them: every candidate is judged, none is made per query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import BaseNode, ImageNode, MetadataMode, NodeWithScore
from llama_index.vector_stores.qdrant import QdrantVectorStore
from llama_index_retrv_r1 import RetrvR1Rerank, RetrvR1Retriever
from qdrant_client import QdrantClient

from retrv_r1_retriever import FAST, LocalImages, PayloadSchema, RetrvR1Reranker
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.qdrant import QdrantStore
from retrv_r1_retriever.sidecar import Sidecars
from retrv_r1_retriever.sidecar_build import MemoryBuilder
from tests.first_stage.fakes import HashCompressor
from tests.integrations.llama_index.parts import Words, by_number, embedded, nodes_of, png


def collection(nodes: list[BaseNode]) -> QdrantVectorStore:
    client = QdrantClient(":memory:")
    QdrantVectorStore("things", client=client).add(embedded(nodes))
    return QdrantVectorStore("things", client=client)


async def built(store: QdrantVectorStore, images: LocalImages, **fields: str | None) -> Sidecars:
    """As `retrv-r1 memory build` and `switch` do, with the fields that `doctor --write-config` drafts."""
    sidecars = QdrantStore("things", client=store.client, schema=PayloadSchema(**fields, vector="")).sidecars
    compressor = HashCompressor()
    await MemoryBuilder(sidecars, compressor, images).build()
    await sidecars.switch(compressor.memory_digest)
    return sidecars


def reranker(compressor: HashCompressor, sidecars: Sidecars | None, images: LocalImages) -> RetrvR1Reranker:
    engine = ScriptedEngine(slots=by_number)
    return RetrvR1Reranker(engine, compressor=compressor, images=images, options=FAST, sidecars=sidecars)


def pictures(count: int, root: Path) -> list[BaseNode]:
    nodes: list[BaseNode] = []
    for i in range(count):
        (root / f"{i}.png").write_bytes(png("blue"))
        id = f"00000000-0000-0000-0000-{i:012}"
        nodes.append(ImageNode(id_=id, text=f"text {i}", image_path=f"{i}.png", metadata={"shelf": i}))
    return nodes


#: Kinds of nodes, with the field that `doctor --write-config` drafts for their pictures.
IMAGES = {"text": None, "image": "data:;base64,{_node_content.image}", "paths": "_node_content.image_path"}


@pytest.mark.parametrize("kind", IMAGES)
async def test_with_memory_beside_it_all_candidates_are_judged(kind: str, tmp_path: Path) -> None:
    """Metadata that is embedded is text for the model, but not for a payload field: `MetadataMode.NONE` reads the same."""
    nodes = pictures(12, tmp_path) if kind == "paths" else nodes_of(kind, 12)
    fields = {"text": "_node_content.text", "image": IMAGES[kind]}
    store, images = collection(nodes), LocalImages(tmp_path)
    options: dict[str, Any] = {"embed_model": Words(), "metadata_mode": MetadataMode.NONE}

    compressor = HashCompressor()
    bare: list[Any] = RetrvR1Retriever(store, reranker=reranker(compressor, None, images), **options).retrieve("q")
    assert (bare[0].status, compressor.seen) == ("partial", 8)

    sidecars, compressor = await built(store, images, **fields), HashCompressor()
    ranked = reranker(compressor, sidecars, images)
    retriever = RetrvR1Retriever(store, reranker=ranked, **options)
    again = [NodeWithScore(node=node, score=0.5) for node in nodes]
    rerank = RetrvR1Rerank(ranked, metadata_mode=MetadataMode.NONE)
    for found in (
        retriever.retrieve("q"),
        await retriever.aretrieve("q"),
        rerank.postprocess_nodes(again, query_str="q"),
    ):
        assert [n.get_content() for n in found] == [f"text {i}" for i in reversed(range(12))]
        assert {n.metadata["status"] for n in found} == {"reranked"}
        assert all(n.metadata["retrv_r1"]["judged"] for n in found)
    assert compressor.seen == 0
