"""Rerank a collection that llama-index-vector-stores-qdrant wrote: nothing is indexed again, nothing is written to it.

    python examples/llama_index_existing_collection.py

Runs offline on the miniature checkpoint; the collection is made first, as yours was.
"""

from __future__ import annotations

import base64
import io
import random

from llama_index.core.schema import ImageNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from llama_index.vector_stores.qdrant import QdrantVectorStore
from llama_index_retrv_r1 import RerankQuery, RetrvR1Retriever
from qdrant_client import QdrantClient

from retrv_r1_retriever import Content, RerankOptions, RetrvR1Reranker
from retrv_r1_retriever.config import Config, open_embedder, open_engine
from retrv_r1_retriever.demo.catalogue import SPLITS, TASKS, make_cards, render
from retrv_r1_retriever.model.embedding import BackboneEmbedder


def write_as_llama_index_does(client: QdrantClient, embedder: BackboneEmbedder) -> None:
    nodes = []
    for i, (card, _) in enumerate(make_cards(SPLITS["test"])[:20]):
        picture, file = render(card, random.Random(i)), io.BytesIO()
        picture.save(file, "PNG")
        node = ImageNode(image=base64.b64encode(file.getvalue()).decode(), metadata={"card": i, "shelf": i % 2})
        node.excluded_embed_metadata_keys = ["card", "shelf"]
        node.embedding = embedder.embed([Content(image=picture)])[0].tolist()
        nodes.append(node)
    QdrantVectorStore("cards", client=client).add(nodes)


def main() -> None:
    client, embedder = QdrantClient(":memory:"), open_embedder(Config())
    write_as_llama_index_does(client, embedder)

    # Candidate memory is made per query here, for `max_recompute` candidates at most; 8 of them unless told otherwise.
    options = RerankOptions(top_k=20, top_n=3, max_recompute=20)
    retriever = RetrvR1Retriever(
        QdrantVectorStore("cards", client=client),
        embed_model=embedder,  # the one the collection was written with: a LlamaIndex embed_model, or ours
        reranker=RetrvR1Reranker(open_engine(Config())),
        options=options,
    )
    on_shelf_1 = MetadataFilters(filters=[MetadataFilter(key="shelf", value=1)])
    card = make_cards(SPLITS["test"])[7][0]
    query = RerankQuery(card.coarse_text, instruction=TASKS["t2i"], filters=on_shelf_1)
    print("wanted: card 7 - asked:", card.coarse_text)
    for found in retriever.retrieve(query):
        print(
            "card",
            found.node.metadata["card"],
            "score",
            found.score,
            "was",
            round(found.metadata["retrieval_score"], 3),
        )
    print(found.metadata["status"], found.metadata["reason"] or "")


if __name__ == "__main__":
    main()
