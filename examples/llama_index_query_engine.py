"""A LlamaIndex query engine over our own store: ask with words and a picture, see who decided, let an LLM answer.

    python examples/llama_index_query_engine.py

Runs offline on the miniature checkpoint and a few of the demo's product cards. MockLLM repeats its prompt: put your own LLM there.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index_retrv_r1 import RerankQuery, RetrvR1Retriever

import retrv_r1_retriever as rr
from retrv_r1_retriever.config import Config, collection_spec, open_embedder, open_engine
from retrv_r1_retriever.demo.catalogue import SPLITS, TASKS, make_cards, make_queries, render


def main() -> None:
    engine, embedder = open_engine(Config()), open_embedder(Config())
    split = SPLITS["test"]
    pool = make_cards(split)
    cards = [card for card, _ in pool[:20]]
    asked = next(q for q in make_queries(split, pool) if q["task"] == "cir" and q["target"] < 20)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, card in enumerate(cards):
            render(card, random.Random(i)).save(folder / f"card{i:02}.png")
        store = rr.EdgeStore(folder / "index", spec=collection_spec(engine, embedder))
        images = rr.LocalImages(folder)
        documents = [
            rr.Document(f"card {i}", rr.Content(image=f"card{i:02}.png"), {"description": card.coarse_text})
            for i, card in enumerate(cards)
        ]
        rr.Indexer(store, embedder, engine, images).index(documents)

        pipeline = rr.RetrvR1Retriever(store=store, embedder=embedder, engine=engine, images=images)
        retriever = RetrvR1Retriever(pipeline, options=rr.RerankOptions(top_k=20, top_n=3))
        query_engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM())

        picture = render(asked["picture"], random.Random(99))
        response = query_engine.query(RerankQuery(asked["text"], image=picture, instruction=TASKS["cir"]))
        print("wanted: card", asked["target"], "- asked:", asked["text"])
        print(response)
        for found in response.source_nodes:
            print(found.node_id, found.score, found.metadata["retrieval_score"], found.metadata["status"])
        trace = response.source_nodes[0].results.trace
        print(trace.stop_reason, "- opened:", [trace.candidates[i] for i in trace.inspected])


if __name__ == "__main__":
    main()
