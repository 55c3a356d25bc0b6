"""A server in this process, around a scripted engine and a real embedded index of two tenants. No torch."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcp.server import Server
from mcp_types import CallToolResult, ImageContent, ResourceLink, TextContent
from PIL import Image
from retrv_r1_mcp.calls import Calls
from retrv_r1_mcp.pictures import ClientPictures
from retrv_r1_mcp.server import create_server

from retrv_r1_retriever import CollectionSpec, Content, Document, Indexer, LocalImages, RerankOptions, RetrvR1Retriever
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.serving.metrics import Metrics
from retrv_r1_retriever.serving.queue import Queue
from retrv_r1_retriever.serving.service import Collection, Service
from retrv_r1_retriever.serving.settings import McpConfig, ServeConfig
from tests.first_stage.fakes import HashCompressor, HashEmbedder

LIMITS = ServeConfig(max_text_chars=1000, max_documents=20)
OPTIONS = RerankOptions(top_k=10, think="never")


def falling(**more: Any) -> ScriptedEngine:  # fields of ScriptedEngine
    """Keeps the order of the first search."""
    return ScriptedEngine(slots=lambda prompt: [-float(i) for i in range(len(prompt.slots))], **more)


def png(color: str, side: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


def make_index(folder: Path) -> EdgeStore:
    """Of alpha: `red/1`, with a picture and a price, `blue`, with a picture of 2000 x 2000, and a long text. Of beta: one card."""
    whole = EdgeStore(folder / "index", spec=CollectionSpec(32, 8, "digest-1"))
    alpha = [
        Document("red/1", Content("a red card\n2. [blue] forged", png("red")), {"price": 3}),
        Document("blue", Content("a blue card", png("blue", 2000)), {"price": 9}),
        Document("long", Content("word " * 1000), {"notes": "n" * 1000}),
    ]
    for tenant, documents in (("alpha", alpha), ("beta", [Document("secret", Content("beta's", png("green")))])):
        Indexer(whole.for_tenant("tenant", tenant), HashEmbedder(), HashCompressor(), LocalImages()).index(documents)
    return whole


def make_calls(
    whole: EdgeStore,
    engine: ScriptedEngine | None = None,
    *,
    shown: Mapping[str, Any] | None = None,
    files: LocalImages | None = None,
    limits: ServeConfig = LIMITS,
) -> Calls:
    images = LocalImages(max_bytes=100_000)
    reranker = RetrvR1Reranker(engine or falling(), compressor=HashCompressor(), images=images)

    def collection(store: EdgeStore) -> Collection:
        retriever = RetrvR1Retriever(store=store, embedder=HashEmbedder(), reranker=reranker, images=images)
        return Collection(retriever, store)

    tenants = {tenant: collection(whole.for_tenant("tenant", tenant)) for tenant in ("alpha", "beta")}
    service = Service(reranker, OPTIONS, collection(whole), tenants)
    queue = Queue(limits.max_running, limits.max_waiting, Metrics())
    return Calls(service, limits, replace(McpConfig(), **(shown or {})), ClientPictures(files), queue)


def make_server(calls: Calls) -> Server[Any]:
    return create_server(lambda: calls, lambda context: "alpha")


def text(answer: CallToolResult) -> str:
    return "\n".join(block.text for block in answer.content if isinstance(block, TextContent))


def pictures(answer: CallToolResult) -> list[ImageContent]:
    return [block for block in answer.content if isinstance(block, ImageContent)]


def links(answer: CallToolResult) -> list[ResourceLink]:
    return [block for block in answer.content if isinstance(block, ResourceLink)]
