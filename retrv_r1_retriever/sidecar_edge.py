"""Sidecars of an embedded index: one file per memory digest below `memory/`, the one in use named in `memory.json`."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import StoreError, explain
from retrv_r1_retriever.filters import FilterTranslator
from retrv_r1_retriever.memory_file import MemoryFile
from retrv_r1_retriever.points import Found, PointCodec
from retrv_r1_retriever.sidecar import COLLECTION, Page
from retrv_r1_retriever.types import Memory

_FOLDER, _POINTER, _SUFFIX = "memory", "memory.json", ".sqlite"


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
        self._path, self._edge, self._shard, self._call, self._codec = path, edge, shard, call, codec
        self._files: dict[str, MemoryFile] = {}
        self._loading = threading.Lock()  # queries run in many threads, and a file shall be opened once
        self._tenant = FilterTranslator(edge, edge.RangeFloat, own=True)(codec.filter(None))

    def seen_with(self, codec: PointCodec) -> EdgeBackend:
        """The same open files, another tenant's view."""
        view = copy.copy(self)
        view._codec = codec
        view._tenant = FilterTranslator(self._edge, self._edge.RangeFloat, own=True)(codec.filter(None))
        return view

    async def codec(self) -> PointCodec:
        return self._codec

    async def page(self, place: str, after: str | None, limit: int) -> Page:
        def work() -> Page:
            if place != COLLECTION:
                ids, following = self._file(place).page(after, limit)
                return Page(tuple(ids), following)
            request = self._edge.ScrollRequest(
                limit=limit, offset=after, filter=self._tenant, with_payload=False, with_vector=False
            )
            records, following = self._shard.scroll(request)
            return Page(tuple(str(r.id) for r in records), None if following is None else str(following))

        page: Page = await self._call(work)
        return page

    async def points(self, ids: Sequence[str], payload: bool) -> list[Found]:
        def work() -> list[Found]:
            return [
                Found(str(point.id), point.payload or {}) for point in self._shard.retrieve(list(ids), payload, False)
            ]

        found: list[Found] = await self._call(work)
        return found

    async def by_document(self, ids: Sequence[str]) -> list[Found]:
        return await self.points([self._codec.point_id(id) for id in dict.fromkeys(ids)], True)

    async def memories(self, ids: Sequence[str]) -> dict[str, Memory]:
        found: dict[str, Memory] = await self._call(lambda: self._file(str(self._pointer())).read(ids))
        return found

    async def hashes(self, digest: str, ids: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = await self._call(lambda: self._file(digest).content_hashes(ids))
        return found

    async def write(self, digest: str, memories: Mapping[str, Memory]) -> None:
        await self._call(lambda: self._file(digest).replace(memories))

    async def delete(self, digest: str, ids: Sequence[str]) -> None:
        await self._call(lambda: self._file(digest).replace(dict.fromkeys(ids)))

    async def sizes(self) -> dict[str, int]:
        def work() -> dict[str, int]:
            digests = [path.stem for path in (self._path / _FOLDER).glob(f"*{_SUFFIX}")]
            return {digest: self._file(digest).count() for digest in digests}

        sizes: dict[str, int] = await self._call(work)
        return sizes

    async def create(self, digest: str, width: int) -> None:
        def work() -> None:
            with self._loading:
                if digest not in self._files:
                    self._files[digest] = MemoryFile(self._where(digest))

        await self._call(work)

    async def remove(self, digest: str) -> None:
        def work() -> None:
            self._file(digest).close()
            with self._loading:
                del self._files[digest]
            self._where(digest).unlink()

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
        for digest in list(self._files):
            self._files.pop(digest).close()

    def _where(self, digest: str) -> Path:
        return self._path / _FOLDER / f"{digest}{_SUFFIX}"

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

    def _file(self, digest: str) -> MemoryFile:
        with self._loading:
            if digest not in self._files:
                if not self._where(digest).is_file():
                    raise StoreError(
                        explain(f"memory {digest}", expected=f"the file {self._where(digest)}", got="none",
                                fix="Run `retrv-r1 memory build`, then `retrv-r1 memory switch`.")
                    )  # fmt: skip
                self._files[digest] = MemoryFile(self._where(digest))
            return self._files[digest]
