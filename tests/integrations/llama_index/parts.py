"""Real framework parts with deterministic embeddings, an engine whose order is known, and the sources under test."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.schema import (
    BaseNode,
    ImageNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.vector_stores.qdrant import QdrantVectorStore
from llama_index_retrv_r1 import RetrvR1Retriever
from llama_index_retrv_r1.nodes import to_content
from PIL import Image
from qdrant_client import AsyncQdrantClient, QdrantClient

from retrv_r1_retriever import FAST, CollectionSpec, Content, Document, EdgeStore, RetrvR1Reranker
from retrv_r1_retriever import RetrvR1Retriever as Pipeline
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.prompt import Prompt
from retrv_r1_retriever.store import Point

DIM = 16


def vector(seed: bytes) -> list[float]:
    numbers = np.random.default_rng(int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "little"))
    return [float(x) for x in numbers.standard_normal(DIM)]


class Words(BaseEmbedding):
    """Text only. The same text has the same direction."""

    def _get_query_embedding(self, query: str) -> list[float]:
        return vector(query.encode())

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return vector(query.encode())

    def _get_text_embedding(self, text: str) -> list[float]:
        return vector(text.encode())


class Pictures(Words, MultiModalEmbedding):
    """A picture's direction is made of its pixels."""

    def _get_image_embedding(self, img_file_path: Any) -> list[float]:
        return vector(Image.open(img_file_path).convert("RGB").tobytes())

    async def _aget_image_embedding(self, img_file_path: Any) -> list[float]:
        return self._get_image_embedding(img_file_path)


class OwnEmbedder:
    """Our own protocol, same directions."""

    def embed(self, items: Sequence[Any]) -> np.ndarray:
        contents = [item if isinstance(item, Content) else item.content for item in items]
        return np.array([vector((c.text or "").encode()) for c in contents], np.float32)


class Fixed(BaseRetriever):
    """Finds what it was given; `asked` are the bundles."""

    def __init__(self, nodes: Sequence[NodeWithScore]) -> None:
        super().__init__()
        self.nodes, self.asked = list(nodes), list[QueryBundle]()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.asked.append(query_bundle)
        return self.nodes


class AsyncOnly(Fixed):
    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.asked.append(query_bundle)
        return self.nodes


def number(text: str | None) -> float:
    found = re.search(r"text (\d+)", text or "")
    return float(found.group(1)) if found else 0.0


def by_number(prompt: Prompt) -> list[float]:
    """The direct read prefers the highest number in the text; none comes last."""
    return [*(number(c.document.content.text) for c in prompt.candidates), -100.0]


def reranker(root: Path | None = None, **engine: Any) -> RetrvR1Reranker:
    return RetrvR1Reranker(ScriptedEngine(**{"slots": by_number, **engine}), images=LocalImages(root), options=FAST)


def texts(count: int) -> list[BaseNode]:
    return nodes_of("text", count)


def nodes_of(kind: str, count: int) -> list[BaseNode]:
    """Ids as Qdrant takes them; metadata the model does not read. kind: "text", "image" or "mixed"."""
    kinds = {"text": [_text_node], "image": [_image_node], "mixed": [_text_node, _image_node, _resource_node]}[kind]
    hidden = {"excluded_embed_metadata_keys": ["even", "part"]}
    return [
        kinds[i % len(kinds)](
            f"text {i}",
            id_=f"00000000-0000-0000-0000-{i:012}",
            metadata={"even": i % 2, "part": "abc"[i % 3]},
            **hidden,
        )
        for i in range(count)
    ]


def _text_node(text: str, **common: Any) -> BaseNode:
    return TextNode(text=text, **common)


def _image_node(text: str, **common: Any) -> BaseNode:
    return ImageNode(text=text, image=b64("blue"), **common)


def _resource_node(text: str, **common: Any) -> BaseNode:
    resource = MediaResource(path=Path(f"{text}.png"))
    return Node(text_resource=MediaResource(text=text), image_resource=resource, **common)


def content_of(node: BaseNode) -> Content:
    content = to_content(node, MetadataMode.NONE)
    assert content is not None
    return content


def embedded(nodes: Sequence[BaseNode]) -> list[BaseNode]:
    return [node.model_copy(update={"embedding": vector(node.get_content().encode())}) for node in nodes]


def scored(nodes: Sequence[BaseNode]) -> list[NodeWithScore]:
    return [NodeWithScore(node=node, score=0.9 - i / 100) for i, node in enumerate(nodes)]


Make = Callable[[Sequence[BaseNode], Path], Awaitable[tuple[Any, dict[str, Any]]]]


async def qdrant(nodes: Sequence[BaseNode], folder: Path) -> tuple[Any, dict[str, Any]]:
    store = QdrantVectorStore("things", client=QdrantClient(":memory:"))
    store.add(embedded(nodes))
    return store, {"embed_model": Words()}


async def qdrant_async(nodes: Sequence[BaseNode], folder: Path) -> tuple[Any, dict[str, Any]]:
    store = QdrantVectorStore("things", aclient=AsyncQdrantClient(":memory:"))
    await store.async_add(embedded(nodes))
    return store, {"embed_model": OwnEmbedder()}


async def index(nodes: Sequence[BaseNode], folder: Path) -> tuple[Any, dict[str, Any]]:
    """Sync client, so that its async form fails: what `index.as_retriever()` gives in most tutorials."""
    store = QdrantVectorStore("things", client=QdrantClient(":memory:"))
    storage = StorageContext.from_defaults(vector_store=store)
    built = VectorStoreIndex(embedded(nodes), storage_context=storage, embed_model=Words())  # type: ignore[call-arg]
    return built.as_retriever(similarity_top_k=50), {}


async def in_memory_index(nodes: Sequence[BaseNode], folder: Path) -> tuple[Any, dict[str, Any]]:
    return VectorStoreIndex(embedded(nodes), embed_model=Words()).as_retriever(similarity_top_k=50), {}


async def custom(nodes: Sequence[BaseNode], folder: Path) -> tuple[Any, dict[str, Any]]:
    return Fixed(scored(nodes)), {}


async def custom_async(nodes: Sequence[BaseNode], folder: Path) -> tuple[Any, dict[str, Any]]:
    return AsyncOnly(scored(nodes)), {}


async def own(nodes: Sequence[BaseNode], folder: Path) -> tuple[Any, dict[str, Any]]:
    store = EdgeStore(folder / "index", spec=CollectionSpec(DIM))
    points = [
        Point(
            Document(n.node_id, content_of(n), n.metadata),
            np.array(vector(n.get_content().encode()), np.float32),
        )
        for n in nodes
    ]
    if points:
        await store.upsert(points)
    return Pipeline(store=store, embedder=OwnEmbedder(), reranker=reranker(), options=FAST), {}


SOURCES: dict[str, Make] = {
    f.__name__: f for f in (qdrant, qdrant_async, index, in_memory_index, custom, custom_async, own)
}


async def make(
    name: str, nodes: Sequence[BaseNode], folder: Path, *, decides: RetrvR1Reranker | None = None, **options: Any
) -> RetrvR1Retriever:
    source, extra = await SOURCES[name](nodes, folder)
    if isinstance(source, Pipeline):
        source.reranker = decides or source.reranker
    else:
        extra["reranker"] = decides or reranker()
    return RetrvR1Retriever(source, **extra, **options)


def picture(color: str) -> Image.Image:
    """Not one flat colour, so that a swapped or mirrored picture would be noticed."""
    image = Image.new("RGB", (6, 4), color)
    image.putpixel((1, 2), (1, 2, 3))
    return image


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    picture(color).save(buffer, "PNG")
    return buffer.getvalue()


def b64(color: str) -> str:
    return base64.b64encode(png(color)).decode()


def image_node(color: str, i: int, **more: Any) -> ImageNode:
    return ImageNode(id_=f"00000000-0000-0000-0000-{i:012}", text=f"text {i}", image=b64(color), **more)
