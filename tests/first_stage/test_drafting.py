"""Drafts of `retrv.toml` from real payloads: hand-written ones, and what langchain-qdrant and LlamaIndex write."""

from __future__ import annotations

import base64
import json
import tomllib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from qdrant_client import QdrantClient, models

from retrv_r1_retriever.drafting import Draft, draft
from retrv_r1_retriever.errors import SchemaError
from retrv_r1_retriever.images import content_hash
from retrv_r1_retriever.qdrant import QdrantStore
from retrv_r1_retriever.schema import PayloadSchema
from retrv_r1_retriever.types import Content

from .conftest import png

SIZES = {"": 8}


def payloads(*rows: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return rows


@pytest.mark.parametrize(
    ("rows", "text", "image", "id"),
    [
        ([{"text": "a red shoe"}], "text", None, None),
        ([{"sku": "a", "title": "Shoe", "description": "red and soft", "photo": "a.jpg"}],
         "{title}. {description}", "photo", "sku"),
        ([{"name": "Shoe", "color": "red"}], "name", None, None),
        ([{"meta": {"title": "Shoe", "pic": "data:image/png;base64,AA"}}], "meta.title", "meta.pic", None),
        ([{"path": "x/1.PNG", "n": 1}, {"path": "x/2.png", "n": 2}], None, "path", None),
        ([{"url": "https://img.example.com/a.jpg?w=1"}], None, "url", None),
        ([{"id": 1, "note": "some words that stand for it"}, {"id": 1, "note": "other words that stand for it"}],
         "note", None, None),
        ([{"id": 1, "body": "x"}, {"id": 2, "body": "y"}], "body", None, "id"),
        ([{"file": "a.jpg", "image": "a.jpg", "text": "t"}], "text", "image", None),
        ([{"file": "a.jpg", "text": "t"}, {"file": "a.pdf", "text": "t"}, {"file": "b.pdf", "text": "t"}], "text", None, None),
        ([{"site": "www.example.com", "text": "no picture, in spite of a.jpg\nin its text"}], "text", None, None),
    ],
)  # fmt: skip
def test_plain_payloads(rows: list[dict[str, Any]], text: str | None, image: str | None, id: str | None) -> None:
    made = draft(rows, SIZES, "c")
    assert (made.shape, made.text, made.image, made.id, made.vector) == ("plain", text, image, id, "")


def test_what_was_chosen_among_several_is_said() -> None:
    rows = payloads({"title": "t", "text": "body", "brand": "Acme", "image": "a.jpg", "thumb": "b.jpg"})
    made = draft(rows, {"clip": 512, "dense": 384}, "c")
    assert made.vector == "dense"
    assert made.notes == (
        "other fields that hold text: brand",
        "other fields that hold pictures: thumb",
        "vectors found: 'clip' (512), 'dense' (384)",
    )


def test_the_file_is_toml_whatever_the_payload_says() -> None:
    nasty = 'a"]\n[model]\ncheckpoint = "evil'
    made = draft([{nasty: "some words to read", "title": "x", "url": "http://h.example/a.png"}], {"v\n": 1}, "c")
    file = made.toml("http://localhost:6333", 'c"1', "KEY")
    values = tomllib.loads(file)
    assert values["store"]["vector"] == "v\n"
    assert (values["store"]["collection"], values["store"]["api_key_env"]) == ('c"1', "KEY")
    assert set(values) == {"store", "images"}
    assert values["images"] == {"root": "."}  # fetching is left to a person
    assert '# hosts = ["h.example"]' in file


@pytest.mark.parametrize(
    ("rows", "vectors", "message"),
    [
        ([], SIZES, "expected points, got none"),
        ([{"text": "x"}], {}, "expected a dense vector, got none"),
        ([{"price": 3, "tags": {"a": 1}}], SIZES, r"expected a text or a picture in the payload, got price, tags\.a"),
        ([{}], SIZES, "got nothing"),
    ],
)
def test_nothing_to_map(rows: list[dict[str, Any]], vectors: dict[str, int], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        draft(rows, vectors, "c")


async def read(client: QdrantClient, name: str, vectors: dict[str, int]) -> tuple[Draft, dict[str, Content]]:
    points, _ = client.scroll(name)
    made = draft([point.payload or {} for point in points], vectors, name)
    store = QdrantStore(name, client=client, schema=PayloadSchema(made.text, made.image, made.id, made.vector))
    return made, {c.document.id: c.document.content for c in await store.sample()}


@pytest.mark.parametrize("vector", ["", "dense"])
async def test_written_by_langchain(vector: str) -> None:
    langchain_qdrant = pytest.importorskip("langchain_qdrant")
    from langchain_core.documents import Document
    from langchain_core.embeddings import DeterministicFakeEmbedding

    client = QdrantClient(":memory:")
    params = models.VectorParams(size=8, distance=models.Distance.COSINE)
    client.create_collection("lc", vectors_config={vector: params} if vector else params)
    store = langchain_qdrant.QdrantVectorStore(
        client, "lc", embedding=DeterministicFakeEmbedding(size=8), vector_name=vector
    )
    ids = store.add_documents(
        [
            Document(page_content="a red shoe", metadata={"source": "shop.pdf", "image": "shoes/1.png"}),
            Document(page_content="a hat", metadata={"source": "shop.pdf"}),
        ]
    )
    made, contents = await read(client, "lc", {vector: 8})
    assert (made.shape, made.text, made.image, made.id) == ("langchain-qdrant", "page_content", "metadata.image", None)
    first, second = (str(uuid.UUID(id)) for id in ids)
    assert contents == {first: Content("a red shoe", "shoes/1.png"), second: Content("a hat")}


async def test_written_by_llama_index() -> None:
    llama = pytest.importorskip("llama_index.vector_stores.qdrant")
    from llama_index.core.schema import ImageNode, MediaResource, Node, TextNode

    client = QdrantClient(":memory:")
    vector = [0.5] * 8
    nodes = [
        TextNode(text="a red shoe", metadata={"color": "red"}, embedding=vector),
        ImageNode(text="a hat", image_path="hats/1.png", metadata={"file_path": "hats/1.png"}, embedding=vector),
        Node(text_resource=MediaResource(text="a bag"), embedding=vector),
    ]
    llama.QdrantVectorStore("li", client=client).add(nodes)
    params = client.get_collection("li").config.params.vectors
    made, contents = await read(
        client, "li", {name: p.size for name, p in params.items()} if isinstance(params, dict) else SIZES
    )
    assert (made.shape, made.id) == ("llama-index", None)
    assert contents == {
        nodes[0].node_id: Content("a red shoe"),
        nodes[1].node_id: Content("a hat", "hats/1.png"),
        nodes[2].node_id: Content("a bag"),
    }


async def test_written_by_llama_index_with_the_pictures_in_it() -> None:
    llama = pytest.importorskip("llama_index.vector_stores.qdrant")
    from llama_index.core.schema import ImageNode

    client, encoded = QdrantClient(":memory:"), base64.b64encode(png("red")).decode()
    nodes = [ImageNode(text="a hat", image=encoded, embedding=[0.5] * 8)]
    llama.QdrantVectorStore("li", client=client).add(nodes)
    params = client.get_collection("li").config.params.vectors
    made, contents = await read(
        client, "li", {name: p.size for name, p in params.items()} if isinstance(params, dict) else SIZES
    )
    assert made.image == "data:;base64,{_node_content.image}"
    [content] = contents.values()
    assert content_hash(content) == content_hash(Content("a hat", png("red")))


def node(**fields: Any) -> dict[str, Any]:
    return {"_node_content": json.dumps({"text": "a hat", **fields}), "file_path": "hat.png"}


@pytest.mark.parametrize(
    ("nodes", "image", "others"),
    [
        ([{"image": "AAAA"}], "data:;base64,{_node_content.image}", "file_path"),
        ([{"image": "data:image/png;base64,AAAA"}], "_node_content.image", "file_path"),
        (
            [{"image": "AAAA"}, {"image_path": "1.png"}, {"image_path": "2.png"}],
            "_node_content.image_path",
            "file_path, data:;base64,{_node_content.image}",
        ),
        ([{}], "file_path", None),
    ],
)
def test_a_nodes_own_picture_goes_before_its_metadata(
    nodes: list[dict[str, Any]], image: str, others: str | None
) -> None:
    """What LlamaIndex reads, so that memory built of it fits; and whatever else holds pictures is said."""
    made = draft([node(**fields) for fields in nodes], SIZES, "c")
    assert (made.shape, made.image) == ("llama-index", image)
    notes = " ".join(made.notes)
    assert "metadata_mode=MetadataMode.NONE" in notes
    assert (f"other fields that hold pictures: {others}" in notes) == (others is not None)
