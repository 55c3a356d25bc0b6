"""LangChain's own conformance suite, unmodified and offline: over its Qdrant store, and over ours, with the shipped model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_socket
from langchain_core.retrievers import BaseRetriever
from langchain_retrv_r1 import RetrvR1Retriever
from langchain_tests.integration_tests import RetrieversIntegrationTests

from retrv_r1_retriever import Content, Document, EdgeStore, Indexer, LocalImages, RerankOptions, RetrvR1Reranker
from retrv_r1_retriever import RetrvR1Retriever as CoreRetriever
from retrv_r1_retriever.config import Config, collection_spec, open_embedder, open_engine
from tests.integrations.langchain.parts import TEXTS, written

OPTIONS = RerankOptions(top_k=5, max_recompute=5, timeout_s=None)


@pytest.fixture(autouse=True)
def _offline() -> Iterator[None]:
    pytest_socket.disable_socket(allow_unix_socket=True)
    yield
    pytest_socket.enable_socket()


@pytest.fixture(scope="module")
def engine() -> Any:
    return open_engine(Config())


class _Standard(RetrieversIntegrationTests):
    params: dict[str, Any]

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return RetrvR1Retriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return self.params

    @property
    def retriever_query_example(self) -> str:
        return "a red ring"


class TestOverTheirQdrantStore(_Standard):
    @pytest.fixture(autouse=True)
    def _build(self, engine: Any) -> None:
        self.params = {"base": written(), "reranker": RetrvR1Reranker(engine, options=OPTIONS)}


class TestOverOurPipeline(_Standard):
    @pytest.fixture(autouse=True)
    def _build(self, engine: Any, tmp_path: Path) -> None:
        embedder = open_embedder(Config())
        store = EdgeStore(tmp_path / "index", spec=collection_spec(engine, embedder))
        found = [Document(str(i), Content(text)) for i, text in enumerate(TEXTS)]
        Indexer(store, embedder, engine, LocalImages()).index(found)
        self.params = {"base": CoreRetriever(store=store, embedder=embedder, engine=engine, options=OPTIONS)}


del _Standard, RetrieversIntegrationTests  # pytest would collect the bases, too
