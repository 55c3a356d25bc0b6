"""What the tests of the LangChain adapter are built of: real collections, real stores, and an engine that does as told."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_qdrant import QdrantVectorStore, RetrievalMode
from langchain_qdrant.sparse_embeddings import SparseEmbeddings, SparseVector
from PIL import Image
from qdrant_client import QdrantClient, models

from retrv_r1_retriever import BALANCED, FAST, LocalImages, RetrvR1Reranker
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.prompt import Prompt

TEXTS = ("two red rings", "one blue square", "three green stars", "one red circle", "two blue rings")
OPTIONS = FAST.with_options(top_k=10)
THINKING = BALANCED.with_options(top_k=10, think="always", timeout_s=None)


def _buckets(text: str) -> list[int]:
    """One per word; the sum of bytes, as Python's own hash differs between processes."""
    return [sum(word.encode()) % 64 for word in re.findall(r"\w+", text.lower())]


class Words(Embeddings):
    """Texts with the same words are near."""

    def __init__(self, size: int = 64) -> None:
        self.size = size

    def embed_query(self, text: str) -> list[float]:
        vector = np.full(self.size, 1e-3)
        for bucket in _buckets(text):
            vector[bucket % self.size] += 1
        listed: list[float] = (vector / np.linalg.norm(vector)).tolist()
        return listed

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


class SparseWords(SparseEmbeddings):
    def embed_query(self, text: str) -> SparseVector:
        found = sorted(set(_buckets(text)))
        return SparseVector(indices=found, values=[1.0] * len(found))

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        return [self.embed_query(text) for text in texts]


#: Kinds of collections that langchain-qdrant writes, as options of its store.
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "named": {"vector_name": "text", "content_payload_key": "body", "metadata_payload_key": "about"},
    "hybrid": {"retrieval_mode": RetrievalMode.HYBRID},
}


def documents(texts: Sequence[str] = TEXTS) -> list[Document]:
    return [Document(text, metadata={"color": text.split()[1], "n": i}) for i, text in enumerate(texts)]


def written(kind: str = "dense", found: Sequence[Document] | None = None) -> QdrantVectorStore:
    """A collection as an application of langchain-qdrant leaves it behind."""
    return QdrantVectorStore.from_documents(
        list(found) if found is not None else documents(),
        Words(),
        sparse_embedding=SparseWords() if kind == "hybrid" else None,
        location=":memory:",
        collection_name="theirs",
        **KINDS[kind],
    )


def red() -> models.Filter:
    """The native filter an application passes to its own store."""
    return models.Filter(must=[models.FieldCondition(key="metadata.color", match=models.MatchValue(value="red"))])


def contents(client: QdrantClient) -> Any:
    """Everything in every collection. Rounded: the client's local mode moves vectors by 6e-8 when it first searches."""
    found = {}
    for name in (c.name for c in client.get_collections().collections):
        points, _ = client.scroll(name, limit=999, with_vectors=True)
        vectors = [p.vector if isinstance(p.vector, dict) else {"": p.vector} for p in points]
        dense = [{k: np.round(v, 6).tolist() for k, v in one.items() if isinstance(v, list)} for one in vectors]
        sparse = [{k: v for k, v in one.items() if not isinstance(v, list)} for one in vectors]
        found[name] = (client.get_collection(name).config, [(p.id, p.payload) for p in points], dense, sparse)
    return found


def prefer(*words: str) -> Any:
    """Slots that like candidates holding these words, the later in the first stage's list the better."""

    def slots(prompt: Prompt) -> list[float]:
        texts = [c.document.content.text or "" for c in prompt.candidates]
        return [*(5.0 * any(w in t for w in words) + 0.1 * i for i, t in enumerate(texts)), -9.0]

    return slots


def reranker(*words: str, images: Any = None, options: Any = OPTIONS, **engine: Any) -> RetrvR1Reranker:
    return RetrvR1Reranker(
        ScriptedEngine(slots=prefer(*words), **engine), images=images or LocalImages(), options=options
    )


class Fixed(BaseRetriever):
    """Any retriever: it takes nothing but a query."""

    found: list[Document]
    delay_s: float = 0.0
    asked: list[str] = []  # noqa: RUF012, pydantic copies it

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        self.asked.append("sync")
        return self.found

    async def _aget_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        self.asked.append("async")
        await asyncio.sleep(self.delay_s)
        return self.found


def png(color: str | tuple[int, int, int] = "red", size: tuple[int, int] = (4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def texts(found: Sequence[Document]) -> list[str]:
    return [document.page_content for document in found]
