"""Candidate memory beside a collection: for collections that are not ours to write to, and for a new model while the old one serves.

A sidecar holds the memory of one model (one memory digest) under the point ids of the collection. Any number may lie beside a
collection; one at most is in use, named by a single pointer that is moved in one step: an alias on a server, a file on Edge.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from retrv_r1_retriever.errors import SchemaError, StoreError, explain
from retrv_r1_retriever.points import Found, PointCodec, checked_memory, native_id
from retrv_r1_retriever.schema import RESERVED
from retrv_r1_retriever.types import Document, Memory

#: Places of a `Backend`: the collection itself, and the sidecar in use. Every other place is a memory digest.
COLLECTION, IN_USE = "", "*"
_LOOK_AGAIN_S = 60.0  # how long "there is no sidecar" is believed
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SidecarInfo:
    """points: how many of the collection's points it has memory of, or had: deleted documents stay until `drop`"""

    digest: str
    points: int
    in_use: bool


@dataclass(frozen=True, slots=True)
class Page:
    """Point ids in a fixed order; `next` starts the following page, None = this was the last."""

    ids: tuple[str, ...]
    next: str | None


class Backend(Protocol):
    """What sidecars need of a store. `place`: `COLLECTION`, `IN_USE` or a memory digest."""

    async def codec(self) -> PointCodec: ...

    async def page(self, place: str, after: str | None, limit: int) -> Page:
        """Of the collection only what the store's tenant may see."""

    async def points(self, ids: Sequence[str], payload: bool) -> list[Found]:
        """Those of the collection that are there, in no particular order, whatever tenant they belong to; without memory."""

    async def by_document(self, ids: Sequence[str]) -> list[Found]:
        """Points of the collection by document ids, with payload; one document id may have several."""

    async def memories(self, ids: Sequence[str]) -> dict[str, Memory]:
        """From the sidecar in use, by point id."""

    async def hashes(self, digest: str, ids: Sequence[str]) -> dict[str, str]:
        """Point id -> hash of the content that its memory was made of."""

    async def write(self, digest: str, memories: Mapping[str, Memory]) -> None: ...

    async def delete(self, digest: str, ids: Sequence[str]) -> None: ...

    async def sizes(self) -> dict[str, int]:
        """Points per sidecar."""

    async def create(self, digest: str, width: int) -> None:
        """Nothing happens if it is there."""

    async def remove(self, digest: str) -> None: ...

    async def pointer(self) -> str | None: ...

    async def point_to(self, digest: str) -> None: ...


class Sidecars:
    """All sidecars of one collection. Raises `StoreError`. The collection itself is never written to."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: str | None = None
        self._look_again = 0.0

    # -- reading, on every query

    async def ready(self) -> bool:
        """Whether one is in use. A yes is kept; a no is looked up again after a minute."""
        if self._known is None and time.monotonic() >= self._look_again:
            self._look_again = time.monotonic() + _LOOK_AGAIN_S
            try:
                self._known = await self._backend.pointer()
            except StoreError as error:  # e.g. an API key that may not list aliases
                _log.warning("memory beside the collection is not used for %.0f s: %s", _LOOK_AGAIN_S, error)
        return self._known is not None

    async def fetch(self, point_ids: Sequence[str]) -> dict[str, Memory]:
        """From the sidecar in use; point id -> memory, for those that have any."""
        return await self._backend.memories(point_ids) if point_ids else {}

    # -- the collection

    async def page(self, after: str | None, limit: int) -> Page:
        return await self._backend.page(COLLECTION, after, limit)

    async def documents(self, point_ids: Sequence[str]) -> dict[str, Document | SchemaError]:
        """Point id -> document as the model will read it, or why it cannot be read."""
        codec = await self._backend.codec()
        found = await self._backend.points(point_ids, True) if point_ids else []
        return {point.id: _document(codec, point) for point in found}

    async def locate(self, ids: Sequence[str]) -> list[tuple[str, Document]]:
        """(point id, document) of all points with these document ids, or point ids, that can be read."""
        codec = await self._backend.codec()
        found = await self._backend.by_document(ids)
        if not codec.own and codec.schema.id is not None:  # a framework knows the points by their own ids
            points = [id for id in ids if native_id(id) is not None]
            found = [*found, *await self._backend.points(points, True)]
        pairs = {point.id: _document(codec, point) for point in found if codec.is_visible(point.payload)}
        return [(id, document) for id, document in pairs.items() if isinstance(document, Document)]

    # -- the sidecars

    async def all(self) -> tuple[SidecarInfo, ...]:
        in_use, sizes = await self.in_use(), await self._backend.sizes()
        return tuple(SidecarInfo(digest, sizes[digest], digest == in_use) for digest in sorted(sizes))

    async def in_use(self) -> str | None:
        """The digest the pointer names now."""
        self._known = await self._backend.pointer()
        return self._known

    async def make(self, digest: str, width: int) -> None:
        await self._backend.create(digest, width)

    async def hashes(self, digest: str, point_ids: Sequence[str]) -> dict[str, str]:
        """Point id -> hash of the content that its memory was made of."""
        return await self._backend.hashes(digest, point_ids) if point_ids else {}

    async def write(self, digest: str, memories: Mapping[str, Memory]) -> None:
        """Durable when this returns."""
        if memories:
            checked = {id: checked_memory(m, m.rows.shape[-1], id) for id, m in memories.items()}
            await self._backend.write(digest, checked)

    async def switch(self, digest: str) -> None:
        """Use this sidecar from now on, in one step. Readers notice with their next query."""
        await self._check_there(digest)
        await self._backend.point_to(digest)
        self._known = digest

    async def orphans(self, digest: str, after: str | None, limit: int) -> tuple[list[str], str | None]:
        """One page of a sidecar: points whose document is gone from the collection; where the next page starts."""
        page = await self._backend.page(digest, after, limit)
        there = {point.id for point in await self._backend.points(page.ids, False)}
        return [id for id in page.ids if id not in there], page.next

    async def forget(self, digest: str, point_ids: Sequence[str]) -> None:
        if point_ids:
            await self._backend.delete(digest, point_ids)

    async def drop(self, digest: str) -> None:
        await self._check_there(digest)
        if digest == await self.in_use():
            raise StoreError(
                explain("drop", expected="a sidecar that is not in use", got=digest, fix="Switch to another one first.")
            )
        await self._backend.remove(digest)

    async def _check_there(self, digest: str) -> None:
        if digest not in (sizes := await self._backend.sizes()):
            there = ", ".join(sorted(sizes)) or "no memory beside this collection"
            fix = "Run `retrv-r1 memory build` first."
            raise StoreError(explain(f"memory {digest}", expected="one that was built", got=there, fix=fix))


async def join(
    found: Sequence[Found], sidecars: Sidecars, own: Callable[[list[str]], Awaitable[list[Found]]] | None
) -> list[Found]:
    """Points with the memory of the sidecar in use.

    own: fetches points with the collection's own memory, if it has any. That is taken where the sidecar has none, or none of
        the present content: a document indexed after the sidecar was built must not lose its memory
    """
    memories = await sidecars.fetch([point.id for point in found])
    behind = [p.id for p in found if own is not None and not _current(p, memories.get(p.id))]
    ours = {point.id: point for point in await own(behind)} if own is not None and behind else {}

    def joined(point: Found) -> Found:
        mine = ours.get(point.id)
        if mine is not None and (mine.rows is not None or mine.memory is not None):
            return replace(point, rows=mine.rows, memory=mine.memory)
        return replace(point, memory=memories.get(point.id))

    return [joined(point) for point in found]


def _current(point: Found, memory: Memory | None) -> bool:
    note: Mapping[str, Any] = point.payload.get(RESERVED, {})
    return memory is not None and memory.content_hash == note.get("content_hash")


def _document(codec: PointCodec, point: Found) -> Document | SchemaError:
    try:
        document: Document = codec.schema.to_document(point.id, point.payload)
    except SchemaError as error:
        return error
    return document
