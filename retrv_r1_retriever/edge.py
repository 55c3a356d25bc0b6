"""The embedded store: Qdrant Edge, the real engine in this process. Needs the extra `edge`."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from retrv_r1_retriever._lock import FolderLock
from retrv_r1_retriever.errors import SchemaError, StoreError, explain, missing_extra, not_indexed
from retrv_r1_retriever.filters import SAMPLED, FilterTranslator, payload_indexes
from retrv_r1_retriever.memory_file import MemoryFile
from retrv_r1_retriever.points import CollectionSpec, Encoded, Found, PointCodec
from retrv_r1_retriever.sidecar import Sidecars, join
from retrv_r1_retriever.sidecar_edge import EdgeBackend
from retrv_r1_retriever.store import Filter, Point, Scalar
from retrv_r1_retriever.types import Candidate

if TYPE_CHECKING:
    from collections.abc import Iterator

_SPEC_FILE, _SHARD_FOLDER, _MEMORY_FILE = "retrv.json", "shard", "memory.sqlite"
#: Version of the folder: 2 keeps memory in a file beside the shard, 1 had it among the shard's vectors.
FOLDER_VERSION = 2
_T = TypeVar("_T")


class EdgeStore:
    """A collection in a folder. One process at a time may have it open; any number of threads in that process may use it.

    spec: makes the collection if there is none; compared with the one that is there otherwise. None = it must be there
    tenant: (payload field, value) this store is limited to, in reads and writes
    read_only: refuses writes (the folder is locked all the same)

    `sidecars`: memory beside the collection (docs/memory.md); the one in use is read in place of the collection's own
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        spec: CollectionSpec | None = None,
        tenant: tuple[str, Scalar] | None = None,
        read_only: bool = False,
    ) -> None:
        self._edge = _import_edge()
        self.path, self.read_only = Path(path), read_only
        where = f"index {self.path}"
        if not (self.path / _SPEC_FILE).exists():
            if spec is None or read_only:
                raise not_indexed(
                    where, expected="an index made by this package", got="none there",
                    fix="Run `retrv-r1 index SOURCE` first, fix the path, or pass spec=CollectionSpec(...) without read_only.",
                )  # fmt: skip
            with self._errors():
                _write_spec(self.path, spec)
        self.spec = _read_spec(self.path)
        if spec is not None:
            self.spec.check_against(spec, where)
        self._codec = PointCodec(self.spec, tenant=tenant)
        self._native = FilterTranslator(self._edge, self._edge.RangeFloat, own=True)
        self._closed = False
        with self._errors():
            self._lock = FolderLock(self.path)
            try:
                self._open()
            except BaseException:
                self._lock.release()  # or the folder stays locked as long as the error is looked at
                raise
        self._beside = EdgeBackend(self.path, self._edge, self._shard, self._codec, self._call)
        self.sidecars = Sidecars(self._beside)

    def _open(self) -> None:
        """Only under a lock of ours. Qdrant Edge has one, but an attempt to open a shard that is in use resets one of its files
        before it fails, and whoever uses the shard can write no more.
        """
        self._shard = _open_shard(self._edge, self.path / _SHARD_FOLDER, self._config())
        try:
            self._memory = MemoryFile(self.path / _MEMORY_FILE) if self.spec.memory_width is not None else None
        except StoreError:
            self._shard.close()
            raise

    def for_tenant(self, field: str, value: Scalar) -> EdgeStore:
        """The same open index, limited to one tenant, for as long as this store is open; closing the view closes nothing."""
        if self._codec.tenant is not None:
            fix = "Open the index without a tenant."
            raise StoreError(explain(f"index {self.path}", expected="no tenant", got=self._codec.tenant, fix=fix))
        view = copy.copy(self)
        view._codec = replace(self._codec, tenant=(field, value))
        view._beside = self._beside.seen_with(view._codec)
        view.sidecars = Sidecars(view._beside)
        view._closed = True
        return view

    async def search(
        self, vector: np.ndarray, top_k: int, *, filter: Filter | None = None, with_memory: bool = True
    ) -> list[Candidate]:
        query = self._codec.check_query(vector, top_k)
        beside = with_memory and await self.sidecars.ready()
        native = self._native(self._codec.filter(filter))
        request = self._edge.QueryRequest(
            limit=top_k,
            query=self._edge.Query.Nearest(query, using=self._codec.schema.vector),
            filter=native,
            with_payload=True,
            # The graph knows no payload: behind a filter it lost all but 0.0001 of the nearest 50 of 100,000 (docs/experiments.md).
            params=self._edge.SearchParams(exact=native is not None),
        )
        found = await self._call(lambda: self._found(self._shard.query(request), with_memory and not beside))
        if not found and await self.count() == 0:
            raise not_indexed(
                f"index {self.path}", expected="documents", got="an empty collection", fix="Index some first."
            )
        return self._codec.decode(await self._joined(found) if beside else found)

    async def get(self, ids: Sequence[str], *, with_memory: bool = True) -> list[Candidate]:
        beside = with_memory and await self.sidecars.ready()
        point_ids = [self._codec.point_id(id) for id in dict.fromkeys(ids)]
        found = await self._retrieve(point_ids, True, with_memory and not beside)
        self._codec.check_ids(ids, found)
        return self._codec.in_order(ids, await self._joined(found) if beside else found)

    async def upsert(self, points: Sequence[Point]) -> None:
        """Written to disk when this returns."""
        self._check_writable("upsert")

        def write() -> None:
            encoded = self._codec.encode(points)  # in the thread too: pictures may have to be encoded
            with self._errors():
                # Memory first: a point without it would look finished. A kill in between leaves rows that their own note tells apart.
                if self._memory is not None:
                    self._memory.replace({one.id: one.memory for one in encoded})
                self._shard.update(self._edge.UpdateOperation.upsert_points([self._point(one) for one in encoded]))
                self._shard.flush()

        await asyncio.to_thread(write)

    async def content_hashes(self, ids: Sequence[str], *, memory_digest: str | None = None) -> dict[str, str]:
        point_ids = [self._codec.point_id(id) for id in dict.fromkeys(ids)]
        found = await self._retrieve(point_ids, self._codec.note_fields, with_memory=False)
        self._codec.check_ids(ids, found)
        file = self._memory
        if (
            memory_digest is not None and file is not None
        ):  # the point remembers its memory also where the file was lost
            made = await self._call(lambda: file.content_hashes(point_ids))
            found = [point for point in found if point.id in made]
        return self._codec.hashes(found, memory_digest)

    async def sample(self, limit: int = 10) -> list[Candidate]:
        """A few documents, in no particular order."""
        request = self._edge.ScrollRequest(
            limit=limit, filter=self._native(self._codec.filter(None)), with_payload=True, with_vector=False
        )
        return self._codec.decode(await self._call(lambda: self._found(self._shard.scroll(request)[0], False)))

    async def count(self) -> int:
        request = self._edge.CountRequest(exact=True, filter=self._native(self._codec.filter(None)))
        count: int = await self._call(lambda: self._shard.count(request))
        return count

    async def memory_count(self) -> int:
        """Points with memory in the index's own file, over all tenants; 0 for an index without memory."""
        file = self._memory
        return await self._call(file.count) if file is not None else 0

    async def index_fields(self, *fields: str) -> None:
        """Make filters on these payload fields, and on the tenant's, fast. Without, each one reads the payload of every point.

        Once for all: it stays with the index, also for points that come later. Raises `InputError` for a field whose kind the
        documents do not tell; needs some documents.
        """
        self._check_writable("index_fields")
        named = self._codec.filtered_fields(fields)
        indexes = payload_indexes(named, [candidate.document for candidate in await self.sample(SAMPLED)])
        kinds = self._edge.PayloadSchemaType

        def work() -> None:
            for field, kind in indexes.items():
                self._shard.update(
                    self._edge.UpdateOperation.create_field_index(field, getattr(kinds, kind.capitalize()))
                )
            self._shard.flush()

        await self._call(work)

    async def optimize(self) -> None:
        """Build the approximate index. Worth it from about 100,000 documents on: until then every search is exact and fast."""
        await self._call(self._shard.optimize)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True

        def close() -> None:
            self._beside.close()
            if self._memory is not None:
                self._memory.close()
            self._shard.flush()
            self._shard.close()
            self._lock.release()

        await self._call(close)

    def _check_writable(self, what: str) -> None:
        if self.read_only:
            raise StoreError(explain(f"index {self.path}", expected="no writes", got=what, fix="Drop read_only."))

    async def _joined(self, found: list[Found]) -> list[Found]:
        return await join(found, self.sidecars, lambda ids: self._retrieve(ids, True, True))

    async def _retrieve(self, ids: Sequence[str], payload: bool | list[str], with_memory: bool) -> list[Found]:
        return await self._call(lambda: self._found(self._shard.retrieve(list(ids), payload, False), with_memory))

    def _found(self, points: Sequence[Any], with_memory: bool) -> list[Found]:
        ids = [str(point.id) for point in points]
        memories = self._memory.read(ids) if with_memory and self._memory is not None else {}
        return [
            Found(id, point.payload or {}, getattr(point, "score", None), memory=memories.get(id))
            for id, point in zip(ids, points, strict=True)
        ]

    async def _call(self, work: Callable[[], _T]) -> _T:
        def guarded() -> _T:
            with self._errors():
                return work()

        return await asyncio.to_thread(guarded)

    def _point(self, encoded: Encoded) -> Any:
        return self._edge.Point(encoded.id, encoded.vectors, encoded.payload)

    def _config(self) -> Any:
        edge = self._edge
        params = edge.EdgeVectorParams(size=self.spec.vector_size, distance=edge.Distance.Cosine)
        return edge.EdgeConfig(vectors={self._codec.schema.vector: params})

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Qdrant Edge raises bare `Exception`; its own lock shows by its words only."""
        try:
            yield
        except (StoreError, SchemaError):
            raise
        except Exception as error:
            if isinstance(error, BlockingIOError) or "WouldBlock" in str(error):
                raise StoreError(
                    explain(
                        f"index {self.path}", expected="to be its only user",
                        got="an index locked by another process, or by another EdgeStore in this one",
                        fix="Close that one; several processes need a Qdrant server (QdrantStore).",
                    )
                ) from error  # fmt: skip
            if isinstance(error, OSError):
                fix = "Check the path, its permissions and the space on it."
                raise StoreError(
                    explain(f"index {self.path}", expected="a folder that can be written to", got=error, fix=fix)
                ) from error
            raise StoreError(
                explain(f"index {self.path}", expected="an answer", got=f"{error}", fix="Run `retrv-r1 doctor` on it.")
            ) from error


def _write_spec(path: Path, spec: CollectionSpec) -> None:
    path.mkdir(parents=True, exist_ok=True)
    aside = path / f".{_SPEC_FILE}.{os.getpid()}"
    aside.write_text(json.dumps({**spec.to_json(), "folder": FOLDER_VERSION}, indent=2), "utf-8")
    aside.replace(path / _SPEC_FILE)


def _read_spec(path: Path) -> CollectionSpec:
    try:
        values = json.loads((path / _SPEC_FILE).read_text("utf-8"))
        spec = CollectionSpec.from_json(values, f"index {path}")
        if values.get("folder", 1) != FOLDER_VERSION:
            raise SchemaError(
                explain(
                    f"index {path}", expected=f"folder version {FOLDER_VERSION}", got=values.get("folder", 1),
                    fix="Index again into a new folder, or use the package version it was made with: memory has another place now.",
                )
            )  # fmt: skip
        return spec
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, SchemaError):
            raise
        raise StoreError(
            explain(f"{path / _SPEC_FILE}", expected="JSON", got=error, fix="Restore it from a backup, or index again.")
        ) from error


def _open_shard(edge: Any, folder: Path, config: Any) -> Any:
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


def _import_edge() -> Any:
    try:
        import qdrant_edge
    except ImportError as error:
        raise missing_extra("qdrant-edge-py", "edge") from error
    return qdrant_edge
