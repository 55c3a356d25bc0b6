from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from qdrant_client import AsyncQdrantClient, QdrantClient

from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.images import content_hash
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.qdrant import QdrantStore
from retrv_r1_retriever.store import Point
from retrv_r1_retriever.types import Content, Document, Memory

SIZE, WIDTH = 4, 3
SPEC = CollectionSpec(SIZE, WIDTH, "digest-1", "embedder-1")


def png(color: Any = "red", size: tuple[int, int] = (4, 3), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def point(id: str, vector: list[float] | None = None, *, memory: bool = True, **metadata: Any) -> Point:
    content = Content(f"text of {id}")
    rows = np.full((2, WIDTH), len(id), np.float16)
    return Point(
        Document(id, content, metadata),
        np.array(vector or [1, 0, 0, 0], np.float32),
        Memory(rows, "digest-1", content_hash(content), 7, "i1:abc") if memory else None,
    )


@pytest.fixture(params=["edge", "qdrant", "qdrant-async"])
async def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Opens views of one collection; a second call of the embedded store closes the first, as its lock demands."""
    client: Any = None
    opened: list[Any] = []
    if request.param == "qdrant":
        client = QdrantClient(":memory:")
    elif request.param == "qdrant-async":
        client = AsyncQdrantClient(":memory:")

    async def open(**options: Any) -> Any:
        if client is not None:
            store: Any = QdrantStore("things", client=client, **options)
            await store.open()
            return store
        for store in opened:
            await store.close()
        opened.append(EdgeStore(tmp_path / "index", **options))
        return opened[-1]

    yield open
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_store: Callable[..., Any]) -> Any:
    return await open_store(spec=SPEC)
