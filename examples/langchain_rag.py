"""A LangChain RAG chain over product cards: find in Qdrant, rerank by looking at the pictures, put the best into a prompt.

    python examples/langchain_rag.py ["two red ring"]

Needs the extra `langchain`. It runs on the miniature checkpoint and shows how the parts go together, not how well they rank: on a
list the text search already gets right, that small a model is more likely to spoil it. No chat model is called: the last step
returns the prompt that yours would get. To use one, put it in the place of `chat_model`.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
import tempfile
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_qdrant import QdrantVectorStore
from langchain_retrv_r1 import RetrvR1Retriever

from retrv_r1_retriever import LocalImages, PayloadSchema, RerankOptions, RetrvR1Reranker
from retrv_r1_retriever.config import Config, open_engine
from retrv_r1_retriever.demo.catalogue import SPLITS, TASKS, make_cards, render

PROMPT = ChatPromptTemplate.from_template("Answer from these cards only:\n{context}\n\nQuestion: {question}")
chat_model = RunnableLambda(lambda prompt: prompt.to_string())


class Words(Embeddings):
    """Stands in for your text embeddings: texts that share words are near."""

    def embed_query(self, text: str) -> list[float]:
        vector = [1e-3] * 256
        for word in re.findall(r"\w+", text.lower()):
            vector[sum(word.encode()) % 256] += 1.0
        return vector

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


def write_cards(folder: Path, count: int = 60) -> list[Document]:
    """Pictures in `folder`, each in a document with its path; the text has what a shop would know: no pattern, no frame."""
    documents = []
    for i, (card, _) in enumerate(make_cards(SPLITS["test"])[:count]):
        render(card, random.Random(i)).save(folder / f"{i}.png")
        documents.append(Document(" ".join(card.attributes[:3]), metadata={"image": f"{i}.png", "full": card.text}))
    return documents


def build_chain(retriever: RetrvR1Retriever) -> Runnable[str, str]:
    def context(found: list[Document]) -> str:
        return "\n".join(f"- {d.page_content} ({d.metadata['image']}, {d.metadata['status']})" for d in found)

    question = {"context": retriever | context, "question": RunnablePassthrough()}
    return question | PROMPT | chat_model | StrOutputParser()


async def run(chain: Runnable[str, str], question: str) -> None:
    async for event in chain.astream_events(question, version="v2"):
        if event["event"] == "on_custom_event" and event["name"] != "retrv_r1.answered":
            print(event["name"], event["data"])
        elif event["event"] == "on_custom_event":
            print(event["name"], event["data"]["status"], "|", event["data"]["trace"]["stop_reason"])
        elif event["event"] == "on_chain_end" and not event["parent_ids"]:
            print(event["data"]["output"])


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = write_cards(folder)
        question = sys.argv[1] if len(sys.argv) > 1 else documents[7].metadata["full"]
        store = QdrantVectorStore.from_documents(documents, Words(), location=":memory:", collection_name="cards")
        retriever = RetrvR1Retriever(
            base=store,
            reranker=RetrvR1Reranker(open_engine(Config()), images=LocalImages(folder)),
            mapping=PayloadSchema(image="metadata.image"),  # the model looks at the picture, not at the text
            options=RerankOptions(top_k=20, max_recompute=20),  # this collection holds no candidate memory
            instruction=TASKS["t2i"],
            k=3,
        )
        asyncio.run(run(build_chain(retriever), question))


if __name__ == "__main__":
    main()
