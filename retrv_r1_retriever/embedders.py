"""Embedders of the first stage: one method, sync or async; the item's type says whether it is a query or a document."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from retrv_r1_retriever.errors import InputError, SchemaError, explain
from retrv_r1_retriever.types import Content, Query


@runtime_checkable
class Embedder(Protocol):
    """`embed([...]) -> (n, d) float32`. Items are `Query` (instruction included) or `Content` (a document), pictures decoded."""

    def embed(self, items: Sequence[Query | Content]) -> np.ndarray | Awaitable[np.ndarray]: ...


@dataclass(frozen=True, slots=True)
class TextEmbedder:
    """Wraps a text-only function `list[str] -> vectors`, sync or async. A picture is a clear error, never a silent text search."""

    function: Callable[[list[str]], object]

    async def embed(self, items: Sequence[Query | Content]) -> np.ndarray:
        texts = []
        for item in items:
            content = item.content if isinstance(item, Query) else item
            if content.image is not None and not content.text:
                raise InputError(
                    explain(
                        "TextEmbedder", expected="text", got="an image without text", fix="Use a multimodal embedder."
                    )
                )
            if isinstance(item, Query) and content.image is not None:
                raise InputError(
                    explain("TextEmbedder", expected="a text query", got="a query with an image",
                            fix="Use a multimodal embedder, or drop the image.")
                )  # fmt: skip
            texts.append(content.text or "")
        vectors = await _maybe_async(self.function, texts)
        return np.asarray(vectors, dtype=np.float32)


async def embed(embedder: Embedder, items: Sequence[Query | Content]) -> np.ndarray:
    """Call an embedder of either kind off the event loop and check the shape: (n, d) float32."""
    vectors = np.asarray(await _maybe_async(embedder.embed, items), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(items):
        raise SchemaError(
            explain("embedder", expected=f"({len(items)}, d)", got=vectors.shape, fix="Return one row per item.")
        )
    if not np.isfinite(vectors).all():
        raise SchemaError(explain("embedder", expected="finite numbers", got="NaN or inf", fix="Check the model."))
    return vectors


async def embed_query(embedder: Embedder, query: Query) -> np.ndarray:
    vectors = await embed(embedder, [query])
    vector: np.ndarray = vectors[0]
    return vector


async def _maybe_async(function: Callable[..., Any], argument: object) -> Any:
    """Await coroutine functions; run plain ones in a thread, so that a slow model never blocks the loop."""
    if inspect.iscoroutinefunction(function):
        return await function(argument)
    result = await asyncio.to_thread(function, argument)
    return await result if inspect.isawaitable(result) else result
