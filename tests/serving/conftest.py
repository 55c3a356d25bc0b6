"""A server in this process, around a scripted engine and a real embedded index. No torch."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from retrv_r1_retriever import CollectionSpec, Content, Document, Engine, Indexer, RerankOptions, RetrvR1Retriever
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.serving.app import create_app
from retrv_r1_retriever.serving.service import Collection, Service
from retrv_r1_retriever.serving.settings import ServeConfig
from tests.first_stage.fakes import HashCompressor, HashEmbedder

OPTIONS = RerankOptions(top_k=10, think="never")
#: Prefers what comes first to what comes later, none last: the order stays, unless the script says otherwise.
FALLING = ScriptedEngine(slots=lambda prompt: [-float(i) for i in range(len(prompt.slots))])
#: The other way round: the last candidate is the answer.
RISING = ScriptedEngine(slots=lambda prompt: [*map(float, range(len(prompt.slots) - 1)), -9.0])
LIMITS = ServeConfig(max_text_chars=1000, max_body_bytes=100_000, max_documents=20, body_timeout_s=1.0)

MakeApp = Callable[..., FastAPI]


@pytest.fixture
def make_app(tmp_path: Path) -> Iterator[MakeApp]:
    """(engine, config, keys, tenants) -> app over an index of ten documents, five of them tenant beta's, with memory."""
    whole = EdgeStore(tmp_path / "index", spec=CollectionSpec(32, 8, "digest-1"))
    embedder, compressor = HashEmbedder(), HashCompressor()
    for tenant in ("alpha", "beta"):
        documents = [Document(f"doc-{i}", Content(f"{tenant} text {i}")) for i in range(5)]
        Indexer(whole.for_tenant("tenant", tenant), embedder, compressor).index(documents)
    Indexer(whole, embedder, compressor).index([Document("common", Content("a common text"))])

    def collection(store: EdgeStore, engine: Engine) -> Collection:
        reranker = RetrvR1Reranker(engine, compressor=compressor)
        return Collection(RetrvR1Retriever(store=store, embedder=embedder, reranker=reranker), store)

    def make(
        engine: Engine = FALLING,
        config: ServeConfig = LIMITS,
        keys: dict[str, str | None] | None = None,
        options: RerankOptions = OPTIONS,
        search: bool = True,
    ) -> FastAPI:
        reranker = RetrvR1Reranker(engine, compressor=compressor)
        if not search:
            return create_app(Service(reranker, options), config, keys or {})
        tenants = {t: collection(whole.for_tenant("tenant", t), engine) for t in (keys or {}).values() if t}
        return create_app(Service(reranker, options, collection(whole, engine), tenants), config, keys or {})

    yield make
    asyncio.run(whole.close())


def client(app: FastAPI, key: str | None = None) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://serve", headers=headers)


@dataclass(frozen=True)
class Running:
    url: str
    stop: Callable[[], None]


@contextmanager
def running(app: FastAPI, shutdown_s: int = 10) -> Iterator[Running]:
    """The app behind a real uvicorn, in a thread."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=shutdown_s)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]

    def stop() -> None:
        server.should_exit = True
        thread.join(30)

    try:
        yield Running(f"http://127.0.0.1:{port}", stop)
    finally:
        stop()


def limits(**changes: object) -> ServeConfig:  # fields of ServeConfig
    return replace(LIMITS, **changes)  # type: ignore[arg-type]
