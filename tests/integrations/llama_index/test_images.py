"""Pictures on every path, compared pixel by pixel: node -> Qdrant -> node -> model -> node."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from llama_index.core import StorageContext
from llama_index.core.indices.multi_modal import MultiModalVectorStoreIndex
from llama_index.core.schema import BaseNode, ImageNode, MediaResource, Node, QueryBundle, TextNode
from llama_index.vector_stores.qdrant import QdrantVectorStore
from llama_index_retrv_r1 import RerankQuery, RetrvR1Rerank, RetrvR1Retriever
from PIL import Image
from qdrant_client import AsyncQdrantClient, QdrantClient

from retrv_r1_retriever import (
    CollectionSpec,
    Content,
    Document,
    EdgeStore,
    ImageError,
    InputError,
    LocalImages,
    RerankOptions,
    RetrvR1Reranker,
)
from retrv_r1_retriever import RetrvR1Retriever as Pipeline
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.remote_images import HttpImages
from retrv_r1_retriever.store import Point
from retrv_r1_retriever.trace import Full
from tests.integrations.llama_index.parts import (
    DIM,
    Fixed,
    OwnEmbedder,
    Pictures,
    Words,
    b64,
    by_number,
    image_node,
    picture,
    png,
    scored,
    vector,
)
from tests.serving.http_stub import pictures_stub

OPENS_ONE = Thought("x", (Verdict(0, "keep"),), (Check(0, "it is a match", True),), 0)
THINK = RerankOptions(think="always")
KINDS = ("base64", "data URI", "path", "url", "resource path", "resource url", "resource data")
STORED = KINDS[:-1]  # LlamaIndex does not store the bytes of a MediaResource


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    with pictures_stub(tmp_path) as url:
        yield url


def sources(folder: Path) -> ImageSource:
    return HttpImages(["127.0.0.1"], then=LocalImages(folder))


def opening_engine() -> ScriptedEngine:
    """Opens its first candidate, whichever picture that is."""
    return ScriptedEngine(OPENS_ONE, slots=by_number)


def node_of(kind: str, root: Path, web: str) -> BaseNode:
    (root / "blue.png").write_bytes(png("blue"))
    common: dict[str, Any] = {"id_": "00000000-0000-0000-0000-000000000001"}
    match kind:
        case "base64":
            return ImageNode(**common, text="text 1", image=b64("blue"))
        case "data URI":
            return ImageNode(**common, text="text 1", image=f"data:image/png;base64,{b64('blue')}")
        case "path":
            return ImageNode(**common, text="text 1", image_path=str(root / "blue.png"))
        case "url":
            return ImageNode(**common, text="text 1", image_url=f"{web}/blue.png")
    resources: dict[str, Any] = {
        "resource path": {"path": root / "blue.png"},
        "resource url": {"url": f"{web}/blue.png"},
        "resource data": {"data": png("blue")},
    }
    picture = MediaResource(**resources[kind])
    return Node(**common, text_resource=MediaResource(text="text 1"), image_resource=picture)


def pixels_of(node: BaseNode) -> np.ndarray:
    """As a user of LlamaIndex would open it; it has no way of its own for a data URI."""
    if isinstance(node, ImageNode):
        encoded = node.image.partition(",")[2] if node.image and node.image.startswith("data:") else None
        found = node.resolve_image() if encoded is None else io.BytesIO(base64.b64decode(encoded))
    else:
        resource = node.image_resource  # type: ignore[attr-defined]
        data = httpx.get(str(resource.url)).content if resource.url else base64.b64decode(resource.data or b"")
        found = io.BytesIO(data) if data else resource.path
    return np.asarray(Image.open(found).convert("RGB"))


def opened(engine: ScriptedEngine) -> np.ndarray:
    [full] = [s for s in engine.opened[-1].segments if isinstance(s, Full)]
    assert full.content is not None
    assert isinstance(full.content.image, Image.Image)
    return np.asarray(full.content.image)


def assert_blue(*pixels: np.ndarray) -> None:
    for one in pixels:
        np.testing.assert_array_equal(one, np.asarray(picture("blue")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_reaches_the_model_and_comes_back(kind: str, web: str, tmp_path: Path) -> None:
    node, engine = node_of(kind, tmp_path, web), opening_engine()
    rerank = RetrvR1Rerank(RetrvR1Reranker(engine, images=sources(tmp_path), options=THINK))
    [found] = rerank.postprocess_nodes(scored([node]), query_str="q")
    assert found.metadata["status"] == "reranked"
    assert found.node is node
    assert_blue(opened(engine), pixels_of(found.node))


@pytest.mark.parametrize("form", ["sync", "async"])
@pytest.mark.parametrize("kind", STORED)
async def test_through_qdrant_and_back(kind: str, form: str, web: str, tmp_path: Path) -> None:
    node, engine = node_of(kind, tmp_path, web), opening_engine()
    node.embedding = vector(b"anything")
    if form == "sync":
        store = QdrantVectorStore("things", client=QdrantClient(":memory:"))
        store.add([node])
    else:
        store = QdrantVectorStore("things", aclient=AsyncQdrantClient(":memory:"))
        await store.async_add([node])
    decides = RetrvR1Reranker(engine, images=sources(tmp_path), options=THINK)
    retriever = RetrvR1Retriever(store, reranker=decides, embed_model=Pictures())
    [found] = retriever.retrieve("q") if form == "sync" else await retriever.aretrieve("q")
    assert type(found.node) is type(node)
    assert_blue(opened(engine), pixels_of(found.node))


@pytest.mark.parametrize("kind", ["bytes", "data URI", "path", "Pillow", "URL"])
async def test_from_our_own_store_to_a_node(kind: str, web: str, tmp_path: Path) -> None:
    (tmp_path / "blue.png").write_bytes(png("blue"))
    image: Any = {
        "bytes": png("blue"), "data URI": f"data:image/png;base64,{b64('blue')}", "path": "blue.png", "Pillow": picture("blue"),
        "URL": f"{web}/blue.png",
    }[kind]  # fmt: skip
    store, engine = EdgeStore(tmp_path / "index", spec=CollectionSpec(DIM)), opening_engine()
    await store.upsert([Point(Document("a", Content("text 1", image), {"x": 1}), np.array(vector(b"a"), np.float32))])
    pipeline = Pipeline(store=store, embedder=OwnEmbedder(), engine=engine, images=sources(tmp_path), options=THINK)
    [found] = await RetrvR1Retriever(pipeline).aretrieve("q")
    assert (found.node_id, found.get_content(), found.metadata["x"]) == ("a", "text 1", 1)
    assert_blue(opened(engine), pixels_of(found.node))


async def test_mixed_nodes_are_one_list() -> None:
    nodes: list[BaseNode] = [
        TextNode(text="text 2"),
        image_node("blue", 7),
        Node(text_resource=MediaResource(text="text 5")),
    ]
    rerank = RetrvR1Rerank(RetrvR1Reranker(ScriptedEngine(slots=by_number), options=RerankOptions(think="never")))
    found = await rerank.apostprocess_nodes(scored(nodes), query_str="q")
    assert [n.node for n in found] == [nodes[1], nodes[2], nodes[0]]


async def test_an_empty_picture_is_said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    store = QdrantVectorStore("things", client=QdrantClient(":memory:"))
    node = node_of("resource data", tmp_path, "")
    node.embedding = vector(b"a")
    store.add([node])
    retriever = RetrvR1Retriever(store, reranker=RetrvR1Reranker(opening_engine(), options=THINK), embed_model=Words())
    await retriever.aretrieve("q")
    assert "LlamaIndex does not store MediaResource.data" in caplog.text


async def test_a_url_is_not_fetched() -> None:
    node = ImageNode(text="text 1", image_url="https://example.org/a.png")
    engine = opening_engine()
    rerank = RetrvR1Rerank(RetrvR1Reranker(engine, options=THINK))
    [found] = await rerank.apostprocess_nodes(scored([node]), query_str="q")
    assert found.metadata["status"] == "partial"
    assert "LocalImages fetches nothing" in " ".join(found.results.trace.notes)


# -- image queries -----------------------------------------------------------------------------------------------------


def picture_store(colors: list[str]) -> QdrantVectorStore:
    store = QdrantVectorStore("things", client=QdrantClient(":memory:"))
    nodes = [image_node(color, i) for i, color in enumerate(colors)]
    for node, color in zip(nodes, colors, strict=True):
        node.embedding = vector(picture(color).tobytes())
    store.add(list(nodes))
    return store


def asked(kind: str, root: Path) -> tuple[Any, dict[str, Any]]:
    (root / "blue.png").write_bytes(png("blue"))
    match kind:
        case "image_path":
            return QueryBundle("", image_path=str(root / "blue.png")), {}
        case "argument":
            return "", {"image": png("blue")}
        case "data URI":
            return "", {"image": f"data:image/png;base64,{b64('blue')}"}
        case "Pillow":
            return "", {"image": picture("blue")}
    return RerankQuery("", image=png("blue")), {}


@pytest.mark.parametrize("form", ["sync", "async"])
@pytest.mark.parametrize("kind", ["image_path", "argument", "data URI", "Pillow", "bundle"])
async def test_a_picture_as_query(kind: str, form: str, tmp_path: Path) -> None:
    engine = opening_engine()
    decides = RetrvR1Reranker(engine, images=LocalImages(tmp_path), options=THINK.with_options(top_k=1))
    retriever = RetrvR1Retriever(picture_store(["red", "green", "blue"]), reranker=decides, embed_model=Pictures())
    query, more = asked(kind, tmp_path)
    [found] = retriever.retrieve(query, **more) if form == "sync" else await retriever.aretrieve(query, **more)
    assert found.get_content() == "text 2"  # the first stage searched with the picture ...
    seen = engine.opened[-1].prompt.query.content
    assert seen.text is None
    assert isinstance(seen.image, Image.Image)
    assert_blue(np.asarray(seen.image))  # ... and the model sees it


async def test_text_and_picture_together_search_with_both() -> None:
    class Watched(Pictures):
        def aget_image_embedding(self, img_file_path: Any) -> Any:
            calls.append("image")
            return super().aget_image_embedding(img_file_path)

        def aget_agg_embedding_from_queries(self, queries: list[str], agg_fn: Any = None) -> Any:
            calls.append(queries[0])
            return super().aget_agg_embedding_from_queries(queries)

    calls: list[str] = []
    decides = RetrvR1Reranker(opening_engine(), options=THINK)
    retriever = RetrvR1Retriever(picture_store(["red", "blue"]), reranker=decides, embed_model=Watched())
    assert len(await retriever.aretrieve("but green", image=png("blue"))) == 2
    assert sorted(calls) == ["but green", "image"]


async def test_an_embedding_in_the_bundle_is_used() -> None:
    decides = RetrvR1Reranker(opening_engine(), options=THINK.with_options(top_k=1))
    retriever = RetrvR1Retriever(picture_store(["red", "blue"]), reranker=decides, embed_model=Words())
    bundle = QueryBundle("q", embedding=vector(picture("blue").tobytes()))
    [found] = await retriever.aretrieve(bundle)
    assert found.get_content() == "text 1"
    [found] = await retriever.aretrieve(bundle, image=png("red"))
    assert found.get_content() == "text 1"


@pytest.mark.parametrize("text", ["", "but green"])
async def test_a_picture_on_a_text_only_embedder_is_an_error(text: str) -> None:
    decides = RetrvR1Reranker(opening_engine(), options=THINK)
    retriever = RetrvR1Retriever(picture_store(["red"]), reranker=decides, embed_model=Words())
    with pytest.raises(InputError, match="expected a multimodal embed_model, got Words, which reads text only"):
        await retriever.aretrieve(text, image=png("blue"))


async def test_a_picture_on_a_text_only_index_is_an_error() -> None:
    from llama_index.core import VectorStoreIndex

    index = VectorStoreIndex.from_vector_store(picture_store(["red"]), embed_model=Words())
    decides = RetrvR1Reranker(opening_engine(), options=THINK.with_options(top_k=2))
    with pytest.raises(InputError, match="VectorIndexRetriever, which searches by text only"):
        RetrvR1Retriever(index.as_retriever(), reranker=decides).retrieve("x", image=png("blue"))


@pytest.mark.parametrize("form", ["sync", "async"])
async def test_a_multimodal_index_is_searched_by_the_picture(form: str, tmp_path: Path) -> None:
    """LlamaIndex's own way to keep texts and pictures, in two collections; its `retrieve` searches by the words alone."""
    client = (
        {"client": QdrantClient(":memory:"), "aclient": None}
        if form == "sync"
        else {"aclient": AsyncQdrantClient(":memory:")}
    )
    texts, pictures = (QdrantVectorStore(name, **client) for name in ("texts", "pictures"))
    nodes: list[Any] = [TextNode(text=f"text {i}", embedding=vector(b"x")) for i in range(2)]
    shown = [image_node(color, 5 + i) for i, color in enumerate(("red", "green", "blue"))]
    for node, color in zip(shown, ("red", "green", "blue"), strict=True):
        node.embedding = vector(picture(color).tobytes())
    for store, found in ((texts, nodes), (pictures, shown)):
        await asyncio.to_thread(store.add, found) if form == "sync" else await store.async_add(found)
    storage = StorageContext.from_defaults(vector_store=texts, image_store=pictures)
    index = MultiModalVectorStoreIndex([], storage_context=storage, embed_model=Words(), image_embed_model=Pictures())
    base = index.as_retriever(similarity_top_k=50, image_similarity_top_k=1)
    decides = RetrvR1Reranker(opening_engine(), images=LocalImages(tmp_path), options=THINK.with_options(top_k=50))
    retriever = RetrvR1Retriever(base, reranker=decides)

    async def retrieve(query: Any, **more: Any) -> list[Any]:
        return retriever.retrieve(query, **more) if form == "sync" else await retriever.aretrieve(query, **more)

    (tmp_path / "blue.png").write_bytes(png("blue"))
    path = str(tmp_path / "blue.png")
    [found] = await retrieve(QueryBundle("", image_path=path))
    assert found.get_content() == "text 7"
    assert len(await retrieve("text 1")) == 3  # both texts, and the picture nearest to the words
    with pytest.raises(InputError, match="which searches by text or by a picture, not by both"):
        await retrieve(QueryBundle("but green", image_path=path))


@pytest.mark.parametrize("form", ["sync", "async"])
async def test_a_picture_that_a_wrapped_retriever_would_not_see_is_an_error(form: str) -> None:
    source = Fixed(scored([image_node("blue", 1)]))
    retriever = RetrvR1Retriever(source, reranker=RetrvR1Reranker(opening_engine(), options=THINK))
    with pytest.raises(
        InputError, match="got a picture that is no image_path, the one kind that retrievers are handed"
    ):
        retriever.retrieve("q", image=png("blue")) if form == "sync" else await retriever.aretrieve(
            "q", image=png("blue")
        )
    assert source.asked == []
    found = await retriever.aretrieve(QueryBundle("q", embedding=[1.0]), image=png("blue"))
    assert len(found) == 1, "with an embedding it is known what is searched with"


async def test_a_wrapped_retriever_gets_the_path(tmp_path: Path) -> None:
    source = Fixed(scored([image_node("blue", 1)]))
    (tmp_path / "blue.png").write_bytes(png("blue"))
    decides = RetrvR1Reranker(opening_engine(), images=LocalImages(tmp_path), options=THINK)
    await RetrvR1Retriever(source, reranker=decides).aretrieve(QueryBundle("q", image_path=str(tmp_path / "blue.png")))
    assert source.asked[0].image_path == str(tmp_path / "blue.png")


async def test_a_query_picture_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    decides = RetrvR1Reranker(opening_engine(), images=LocalImages(tmp_path), options=THINK)
    retriever = RetrvR1Retriever(picture_store(["red"]), reranker=decides, embed_model=Pictures())
    with pytest.raises(ImageError, match="no such file"):
        await retriever.aretrieve(QueryBundle("", image_path="nowhere.png"))
    with pytest.raises(InputError, match="expected image or image_path, got both"):
        await retriever.aretrieve(QueryBundle("", image_path="a.png"), image=png("red"))
