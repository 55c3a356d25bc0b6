"""Sidecars of an embedded index: one shard per memory digest below `memory/`, the one in use named in `memory.json`."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import StoreError, explain
from retrv_r1_retriever.filters import FilterTranslator
from retrv_r1_retriever.points import MEMORY, Encoded, Found, PointCodec
from retrv_r1_retriever.sidecar import COLLECTION, IN_USE, Page

_FOLDER, _POINTER = "memory", "memory.json"


class EdgeBackend:
    """call: runs work in a thread, errors as the store's; shard: the collection's own"""

    def __init__(
        self,
        path: Path,
        edge: Any,
        shard: Any,
        codec: PointCodec,
        call: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._path, self._edge, self._call, self._codec = path, edge, call, codec
        self._shards: dict[str, Any] = {COLLECTION: shard}
        self._loading = threading.Lock()  # a shard can be loaded once only, and queries run in many threads
        self._tenant = FilterTranslator(edge, edge.RangeFloat, own=True)(codec.filter(None))

    def seen_with(self, codec: PointCodec) -> EdgeBackend:
        """The same open shards, another tenant's view."""
        view = copy.copy(self)
        view._codec = codec
        view._tenant = FilterTranslator(self._edge, self._edge.RangeFloat, own=True)(codec.filter(None))
        return view

    async def codec(self) -> PointCodec:
        return self._codec

    async def page(self, place: str, after: str | None, limit: int) -> Page:
        def work() -> Page:
            request = self._edge.ScrollRequest(
                limit=limit, offset=after, filter=self._tenant if place == COLLECTION else None,
                with_payload=False, with_vector=False,
            )  # fmt: skip
            records, following = self._shard(place).scroll(request)
            return Page(tuple(str(r.id) for r in records), None if following is None else str(following))

        page: Page = await self._call(work)
        return page

    async def points(self, place: str, ids: Sequence[str], payload: bool | list[str], rows: bool) -> list[Found]:
        def work() -> list[Found]:
            return found_points(self._shard(place).retrieve(list(ids), payload, [MEMORY] if rows else False))

        found: list[Found] = await self._call(work)
        return found

    async def by_document(self, ids: Sequence[str]) -> list[Found]:
        return await self.points(COLLECTION, [self._codec.point_id(id) for id in dict.fromkeys(ids)], True, False)

    async def write(self, digest: str, points: Sequence[Encoded]) -> None:
        operation = self._edge.UpdateOperation.upsert_points(
            [self._edge.Point(one.id, one.vectors, one.payload) for one in points]
        )
        await self._update(digest, operation)

    async def delete(self, digest: str, ids: Sequence[str]) -> None:
        await self._update(digest, self._edge.UpdateOperation.delete_points(list(ids)))

    async def sizes(self) -> dict[str, int]:
        def work() -> dict[str, int]:
            folder = self._path / _FOLDER
            names = [one.name for one in folder.iterdir() if not one.name.startswith(".")] if folder.is_dir() else []
            return {name: int(self._shard(name).count(self._edge.CountRequest(exact=True))) for name in names}

        sizes: dict[str, int] = await self._call(work)
        return sizes

    async def create(self, digest: str, width: int) -> None:
        config = self._edge.EdgeConfig(vectors={MEMORY: memory_params(self._edge, width)})

        def work() -> None:
            with self._loading:
                if digest not in self._shards:
                    self._shards[digest] = open_shard(self._edge, self._path / _FOLDER / digest, config)

        await self._call(work)

    async def remove(self, digest: str) -> None:
        def work() -> None:
            self._shard(digest).close()
            with self._loading:
                del self._shards[digest]
            shutil.rmtree(self._path / _FOLDER / digest)

        await self._call(work)

    async def pointer(self) -> str | None:
        digest: str | None = await self._call(self._pointer)
        return digest

    async def point_to(self, digest: str) -> None:
        def work() -> None:
            aside = self._path / f".{_POINTER}.{os.getpid()}"
            aside.write_text(json.dumps({"memory_digest": digest}), "utf-8")
            aside.replace(self._path / _POINTER)

        await self._call(work)

    def close(self) -> None:
        """All but the collection's own shard, which the store closes."""
        for digest in [name for name in self._shards if name != COLLECTION]:
            self._shards.pop(digest).close()

    async def _update(self, digest: str, operation: Any) -> None:
        def work() -> None:
            shard = self._shard(digest)
            shard.update(operation)
            shard.flush()

        await self._call(work)

    def _pointer(self) -> str | None:
        path = self._path / _POINTER
        if not path.exists():
            return None
        try:
            return str(json.loads(path.read_text("utf-8"))["memory_digest"])
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                explain(f"{path}", expected='{"memory_digest": ...}', got=error, fix="Run `retrv-r1 memory switch`.")
            ) from error

    def _shard(self, place: str) -> Any:
        digest = str(self._pointer()) if place == IN_USE else place
        with self._loading:
            if digest not in self._shards:
                folder = self._path / _FOLDER / digest
                if not folder.is_dir():
                    raise StoreError(
                        explain(f"memory {digest}", expected=f"the folder {folder}", got="none",
                                fix="Run `retrv-r1 memory build`, then `retrv-r1 memory switch`.")
                    )  # fmt: skip
                self._shards[digest] = self._edge.EdgeShard.load(str(folder))
            return self._shards[digest]


def open_shard(edge: Any, folder: Path, config: Any) -> Any:
    """Loaded; made first if there is none."""
    if not folder.exists():  # made aside and moved here in one step: a kill in between leaves no half-made shard
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.mkdtemp(prefix=".new-", dir=folder.parent)
        try:
            edge.EdgeShard.create(aside, config).close()
            os.rename(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return edge.EdgeShard.load(str(folder))


def memory_params(edge: Any, width: int) -> Any:
    """Fetched by id, never searched: no graph."""
    return edge.EdgeVectorParams(
        size=width,
        distance=edge.Distance.Dot,
        datatype=edge.VectorStorageDatatype.Float16,
        multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim),
        hnsw_config=edge.HnswIndexConfig(m=0, ef_construct=4, full_scan_threshold=10),
    )


def found_points(points: Iterable[Any]) -> list[Found]:
    found = []
    for point in points:
        vectors = point.vector or {}
        found.append(Found(str(point.id), point.payload or {}, getattr(point, "score", None), vectors.get(MEMORY)))
    return found
