"""Rerank collections that langchain-qdrant wrote, dense, hybrid and with named vectors, without indexing or writing anything.

    python examples/langchain_existing_collection.py

Needs the extra `langchain`. It first writes three small collections, as an application did before it knew of this package; point
it at yours by opening `QdrantVectorStore` with your url. It runs on the miniature checkpoint, which was never trained on
texts alone: the order means nothing here, that it comes from the model and nothing was written does.
"""

from __future__ import annotations

import re
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_qdrant import QdrantVectorStore, RetrievalMode
from langchain_qdrant.sparse_embeddings import SparseEmbeddings, SparseVector
from langchain_retrv_r1 import RetrvR1Retriever
from qdrant_client import QdrantClient, models

from retrv_r1_retriever import RerankOptions, RetrvR1Reranker
from retrv_r1_retriever.config import Config, open_engine

COLOURS, SHAPES = ("red", "blue", "green"), ("circle", "square", "ring", "diamond")
CARDS = [Document(f"two {c} {s} plain thin", metadata={"colour": c}) for c in COLOURS for s in SHAPES]
COLLECTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "hybrid": {"retrieval_mode": RetrievalMode.HYBRID},
    "named": {"vector_name": "text", "content_payload_key": "body"},
}
ONLY_RED = models.Filter(must=[models.FieldCondition(key="metadata.colour", match=models.MatchValue(value="red"))])


def buckets(text: str) -> list[int]:
    return sorted({sum(word.encode()) % 256 for word in re.findall(r"\w+", text.lower())})


class Words(Embeddings):
    """Stands in for your text embeddings: texts that share words are near."""

    def embed_query(self, text: str) -> list[float]:
        return [1.0 if i in buckets(text) else 1e-3 for i in range(256)]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


class SparseWords(SparseEmbeddings):
    """Stands in for your sparse embeddings."""

    def embed_query(self, text: str) -> SparseVector:
        return SparseVector(indices=buckets(text), values=[1.0] * len(buckets(text)))

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        return [self.embed_query(text) for text in texts]


def written_before(name: str, options: dict[str, Any]) -> QdrantVectorStore:
    return QdrantVectorStore.from_documents(
        CARDS, Words(), sparse_embedding=SparseWords(), location=":memory:", collection_name=name, **options
    )


def payloads(client: QdrantClient, name: str) -> list[tuple[Any, Any]]:
    return [(point.id, point.payload) for point in client.scroll(name, limit=100)[0]]


def main() -> None:
    reranker = RetrvR1Reranker(open_engine(Config()), options=RerankOptions(top_k=12, max_recompute=12))
    for name, options in COLLECTIONS.items():
        store = written_before(name, options)
        before = payloads(store.client, name)
        retriever = RetrvR1Retriever(base=store, reranker=reranker, k=3)
        for title, filter in (("all", None), ("only red", ONLY_RED)):
            print(f"{name}, {title}:")
            for document in retriever.invoke("two red ring", filter=filter):
                marks = document.metadata
                was, status = marks["retrv_r1"]["retrieval_rank"], marks["status"]
                print(f"  {document.page_content}  was {was}, score {marks['relevance_score']:.2f}, {status}")
        print(f"  unchanged: {payloads(store.client, name) == before}")


if __name__ == "__main__":
    main()
