"""The first stage: what a vector store must do, the filter both stores understand, and the stage made of store + embedder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from retrv_r1_retriever.embedders import Embedder, embed_query
from retrv_r1_retriever.observe import Observers, Step, observed
from retrv_r1_retriever.types import Candidate, Document, Memory, Query

Scalar: TypeAlias = str | int | bool


@dataclass(frozen=True, slots=True)
class Equals:
    """Payload `field` (dots for nesting) equals `value`, or contains it if the field is a list."""

    field: str
    value: Scalar


@dataclass(frozen=True, slots=True)
class OneOf:
    field: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Range:
    field: str
    gt: float | None = None
    gte: float | None = None
    lt: float | None = None
    lte: float | None = None


Condition: TypeAlias = Equals | OneOf | Range


@dataclass(frozen=True, slots=True)
class Filter:
    """All of `must`, at least one of `should` (if any), none of `must_not`."""

    must: tuple[Condition, ...] = ()
    should: tuple[Condition, ...] = ()
    must_not: tuple[Condition, ...] = ()

    def __and__(self, other: Filter | None) -> Filter:
        """Both filters; used to force a tenant in. `should` of both sides cannot be merged and is an error."""
        if other is None:
            return self
        if self.should and other.should:
            raise ValueError("Filter: only one side of & may have `should`; nest it as must instead.")
        must, must_not = (*self.must, *other.must), (*self.must_not, *other.must_not)
        return Filter(must, tuple(self.should or other.should), must_not)


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One document to be stored. vector: (d,) float32; `document.id` is kept as it is, the store maps it to its own ids."""

    document: Document
    vector: np.ndarray
    memory: Memory | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Store(Protocol):
    """A vector store with candidate memory beside the vectors. Errors: `StoreError`, `SchemaError`."""

    async def search(
        self, vector: np.ndarray, top_k: int, *, filter: Filter | None = None, with_memory: bool = True
    ) -> list[Candidate]:
        """The `top_k` nearest, best first, ranks 1..n, memory in the same call."""

    async def get(self, ids: Sequence[str], *, with_memory: bool = True) -> list[Candidate]:
        """Documents by the caller's ids, in the order asked; unknown ids are left out. retrieval_score is None."""

    async def upsert(self, points: Sequence[Point]) -> None: ...

    async def content_hashes(self, ids: Sequence[str], *, memory_digest: str | None = None) -> dict[str, str]:
        """id -> content hash of what is stored with memory of this digest (None: with or without any); for resuming."""

    async def count(self) -> int: ...

    async def close(self) -> None: ...


class FirstStage(Protocol):
    """Any async callable that finds candidates: `await first_stage(query, top_k=50, filter=None)`."""

    async def __call__(self, query: Query, *, top_k: int, filter: Filter | None = None) -> Sequence[Candidate]: ...


@dataclass(frozen=True, slots=True)
class VectorFirstStage:
    """Embed the query, search the store."""

    store: Store
    embedder: Embedder
    with_memory: bool = True
    observers: Observers = ()

    async def __call__(self, query: Query, *, top_k: int, filter: Filter | None = None) -> Sequence[Candidate]:
        model = getattr(self.embedder, "digest", None) or type(self.embedder).__name__
        with observed(self.observers, Step("embed", query, model=model)):
            vector = await embed_query(self.embedder, query)
        with observed(self.observers, Step("search", query)) as tell:
            found = await self.store.search(vector, top_k, filter=filter, with_memory=self.with_memory)
            tell(found)
        return found
