"""The store on a Qdrant server, cluster or client you already have. Needs the extra `qdrant`."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from retrv_r1_retriever.errors import InputError, OptionsError, StoreError, explain, missing_extra, not_indexed
from retrv_r1_retriever.filters import SAMPLED, FilterTranslator, payload_indexes
from retrv_r1_retriever.points import (
    MEMORY,
    CollectionSpec,
    Encoded,
    Found,
    PointCodec,
    memory_rows,
    native_id,
    whole_number,
)
from retrv_r1_retriever.qdrant_opening import Call, Opening
from retrv_r1_retriever.qdrant_transport import Scales, connect, is_remote
from retrv_r1_retriever.schema import PayloadSchema
from retrv_r1_retriever.sidecar import Sidecars, join
from retrv_r1_retriever.sidecar_qdrant import QdrantBackend, found_points
from retrv_r1_retriever.store import Filter, Point, Scalar
from retrv_r1_retriever.types import Candidate

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient, QdrantClient

_SAME_ID = 256  # points looked at when a few documents are asked for by a payload field: several may have one id
_WITHOUT_COLLECTION = ("get_aliases", "get_collections", "update_collection_aliases")
_REFUSED = (
    400,
    413,
    422,
    "INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED",
)  # HTTP, gRPC: these points are at fault (too large, malformed), not the server
_T = TypeVar("_T")

# Local mode is a numpy scan that breaks when one thread writes while another reads; one lock for each such client.
_local_locks: weakref.WeakKeyDictionary[object, threading.Lock] = weakref.WeakKeyDictionary()


class QdrantStore:
    """One collection. One that this package did not make is *foreign*: it needs `schema` and is never written to; its
    candidates have the memory of its sidecar, if one is in use.

    client: sync (its calls run in threads) or async (for one event loop); the caller closes it. url: a sync client is made and
        closed here
    spec: makes the collection if there is none; compared with the one that is there otherwise. None = it must be there
    tenant: (payload field, value) this store is limited to, in reads and writes
    grpc: with url, whether to talk gRPC; None = if the server's port for it answers

    `sidecars`: memory beside the collection (docs/memory.md); the one in use is read in place of the collection's own
    The collection is checked here; with an async client, on first use.
    """

    def __init__(
        self,
        collection: str,
        *,
        client: QdrantClient | AsyncQdrantClient | None = None,
        url: str | None = None,
        api_key: str | None = None,
        spec: CollectionSpec | None = None,
        schema: PayloadSchema | None = None,
        tenant: tuple[str, Scalar] | None = None,
        read_only: bool = False,
        grpc: bool | None = None,
    ) -> None:
        if (client is None) == (url is None):
            raise OptionsError(explain("QdrantStore", expected="client= or url=", got="both or none", fix="Pass one."))
        qdrant_client = _import_qdrant()
        self._models = qdrant_client.models
        self._owns_client = client is None
        self._client: Any = client if client is not None else connect(qdrant_client, str(url), api_key, grpc)
        self._is_async = isinstance(self._client, qdrant_client.AsyncQdrantClient)
        self._loop: asyncio.AbstractEventLoop | None = None  # of an async client's connections
        self._lock = _local_lock(self._client)
        self.collection, self.read_only = collection, read_only

        def opening(call: Call) -> Coroutine[Any, Any, PointCodec]:
            return Opening(call, qdrant_client.models, self._where, spec, schema, tenant, read_only)()

        self._open = opening
        self._codec: PointCodec | None = None
        self._opening = asyncio.Lock()
        self._scales = Scales(self._client, self._where)
        self.sidecars = Sidecars(
            QdrantBackend(
                collection, self._call, self._models, self.open, self._points_of_documents, self._scales.weigh
            )
        )
        if not self._is_async:
            self._codec = _finish(self._open(self._call_here))

    @property
    def spec(self) -> CollectionSpec:
        """What the collection was made with; of a foreign one, the vector size."""
        if self._codec is None:
            raise StoreError(explain(self._where, expected="a checked collection", got="none yet", fix="Await open()."))
        return self._codec.spec

    async def open(self) -> PointCodec:
        """Check (or make) the collection, once. Every other method does this first."""
        if self._codec is None:
            async with self._opening:
                if self._codec is None:
                    self._codec = await self._open(self._call)
        return self._codec

    async def search(
        self, vector: np.ndarray, top_k: int, *, filter: Filter | None = None, with_memory: bool = True
    ) -> list[Candidate]:
        codec = await self.open()
        beside = with_memory and await self.sidecars.ready()
        answer = await self._call(
            "query_points",
            query=codec.check_query(vector, top_k),
            using=codec.schema.vector or None,
            limit=top_k,
            query_filter=self._native(codec, filter),
            with_payload=True,
            with_vectors=_memory_of(codec, with_memory and not beside),
        )
        if not answer.points and (await self._call("count", exact=False)).count == 0:
            raise not_indexed(self._where, expected="documents", got="an empty collection", fix="Index some first.")
        found = found_points(answer.points)
        await self._scales.weigh(found)
        return codec.decode(await self._joined(codec, found) if beside else found)

    async def get(self, ids: Sequence[str], *, with_memory: bool = True) -> list[Candidate]:
        codec = await self.open()
        beside = with_memory and await self.sidecars.ready()
        found = await self._points_of_documents(ids, with_memory and not beside)
        return codec.in_order(ids, await self._joined(codec, found) if beside else found)

    async def upsert(self, points: Sequence[Point]) -> None:
        codec = await self._writable("upsert")
        encoded = await asyncio.to_thread(codec.encode, points)  # pictures may have to be encoded
        structs = [self._models.PointStruct(id=e.id, vector=_vectors_of(e), payload=e.payload) for e in encoded]
        if structs:
            await self._call("upsert", points=structs, wait=True)

    async def index_fields(self, *fields: str) -> None:
        """Make filters on these payload fields fast, as `EdgeStore.index_fields` does."""
        named = (await self._writable("index_fields")).filtered_fields(fields)
        indexes = payload_indexes(named, [candidate.document for candidate in await self.sample(SAMPLED)])
        for field, kind in indexes.items():
            await self._call("create_payload_index", field_name=field, field_schema=kind, wait=True)

    async def content_hashes(self, ids: Sequence[str], *, memory_digest: str | None = None) -> dict[str, str]:
        codec = await self.open()
        if not codec.own:
            return {}
        found = await self._retrieve(codec, [codec.point_id(id) for id in ids], codec.note_fields, False)
        codec.check_ids(ids, found)
        return codec.hashes(found, memory_digest)

    async def sample(self, limit: int = 10) -> list[Candidate]:
        """A few documents, in no particular order."""
        codec = await self.open()
        return codec.decode(await self._scroll(limit, self._native(codec, None)))

    async def count(self) -> int:
        codec = await self.open()
        answer = await self._call("count", count_filter=self._native(codec, None), exact=True)
        return int(answer.count)

    async def close(self) -> None:
        if self._owns_client:
            await asyncio.to_thread(self._client.close)

    async def _writable(self, what: str) -> PointCodec:
        codec = await self.open()
        if not codec.own or self.read_only:
            why = "this package never writes to a collection it did not make" if not codec.own else "read_only=True"
            raise StoreError(
                explain(self._where, expected="no writes", got=f"{what} ({why})", fix="Index into one of our own.")
            )
        return codec

    @property
    def _where(self) -> str:
        return f"collection {self.collection!r}"

    def _native(self, codec: PointCodec, asked: Filter | None) -> Any:
        return FilterTranslator(self._models, self._models.Range, codec.own)(codec.filter(asked))

    def _by_field(self, field: str, ids: Sequence[str]) -> Any:
        """Ids may be stored as strings or as numbers; the caller's are always strings."""
        models = self._models
        kinds: list[list[Any]] = [list(ids), [n for id in ids if (n := whole_number(id, 2**63)) is not None]]
        return models.Filter(
            should=[models.FieldCondition(key=field, match=models.MatchAny(any=kind)) for kind in kinds if kind]
        )

    async def _points_of_documents(self, ids: Sequence[str], with_memory: bool = False) -> list[Found]:
        codec = await self.open()
        if codec.own:
            found = await self._retrieve(codec, [codec.point_id(id) for id in ids], True, with_memory)
            codec.check_ids(ids, found)
            return found
        if codec.schema.id is None:
            native = [id for text in ids if (id := native_id(text)) is not None]
            return await self._retrieve(codec, native, True, False)
        return await self._scroll(max(len(ids), _SAME_ID), self._by_field(codec.schema.id, ids))

    async def _joined(self, codec: PointCodec, found: list[Found]) -> list[Found]:
        own = codec.own and codec.spec.memory_width is not None
        return await join(found, self.sidecars, (lambda ids: self._retrieve(codec, ids, True, True)) if own else None)

    async def _retrieve(
        self, codec: PointCodec, ids: Sequence[Any], payload: bool | list[str], with_memory: bool
    ) -> list[Found]:
        if not ids:
            return []
        records = await self._call(
            "retrieve", ids=list(dict.fromkeys(ids)), with_payload=payload, with_vectors=_memory_of(codec, with_memory)
        )
        return found_points(records)

    async def _scroll(self, limit: int, native_filter: Any) -> list[Found]:
        records, _ = await self._call(
            "scroll", limit=limit, scroll_filter=native_filter, with_payload=True, with_vectors=False
        )
        return found_points(records)

    async def _call(self, method: str, **arguments: Any) -> Any:  # kwargs: the client's own, passed on unread
        """One call of the client, off the event loop, its errors as ours."""
        if not self._is_async:
            return await asyncio.to_thread(self._call_now, method, arguments)
        self._check_loop()
        try:
            return await getattr(self._client, method)(**self._addressed(method, arguments))
        except Exception as error:
            raise self._error(method, error) from error

    def _check_loop(self) -> None:
        """The connections of an async client live in one event loop; from another one they fail now and then, or hang."""
        loop = asyncio.get_running_loop()
        if self._loop is None and is_remote(self._client):
            self._loop = loop
        if self._loop not in (None, loop):
            raise StoreError(
                explain(
                    f"{self._where}: AsyncQdrantClient", expected="calls from the event loop it was first used in",
                    got="one from another loop (sync methods of this package have a loop of their own)",
                    fix="Stay with the async methods in one loop, or pass a QdrantClient or url=, which serve all loops.",
                )
            )  # fmt: skip

    async def _call_here(self, method: str, **arguments: Any) -> Any:  # kwargs: as `_call`
        """As `_call`, in this thread: awaiting it never suspends."""
        return self._call_now(method, arguments)

    def _call_now(self, method: str, arguments: dict[str, Any]) -> Any:
        addressed = self._addressed(method, arguments)
        try:
            if self._lock is None:
                return getattr(self._client, method)(**addressed)
            with self._lock:
                return getattr(self._client, method)(**addressed)
        except Exception as error:
            raise self._error(method, error) from error

    def _addressed(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments if method in _WITHOUT_COLLECTION else {"collection_name": self.collection, **arguments}

    def _error(self, method: str, error: Exception) -> StoreError | InputError:
        if method == "upsert" and _status(error) in _REFUSED:
            return InputError(
                explain(
                    f"{self._where}: {method}", expected="points that Qdrant takes", got=f"{type(error).__name__}: {error}",
                    fix="Write fewer or smaller ones at a time.",
                )
            )  # fmt: skip
        return StoreError(
            explain(
                f"{self._where}: {method}", expected="an answer from Qdrant", got=f"{type(error).__name__}: {error}",
                fix="Check that the server runs, its url and the api key.",
            )
        )  # fmt: skip


def _vectors_of(encoded: Encoded) -> dict[str, Any]:
    return encoded.vectors if encoded.memory is None else {**encoded.vectors, MEMORY: memory_rows(encoded.memory)}


def _memory_of(codec: PointCodec, with_memory: bool) -> bool | list[str]:
    return [MEMORY] if with_memory and codec.own and codec.spec.memory_width is not None else False


def _status(error: Exception) -> int | str | None:
    """HTTP status or gRPC code of what the client raised."""
    code = getattr(error, "code", None)
    return getattr(code(), "name", None) if callable(code) else getattr(error, "status_code", None)


def _finish(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine that never suspends, without a loop."""
    try:
        work.send(None)
    except StopIteration as done:
        value: _T = done.value
        return value
    work.close()
    raise RuntimeError("a coroutine meant to run through has suspended")


def _local_lock(client: Any) -> threading.Lock | None:
    from qdrant_client.local.qdrant_local import QdrantLocal

    if not isinstance(getattr(client, "_client", None), QdrantLocal):
        return None
    return _local_locks.setdefault(client, threading.Lock())


def _import_qdrant() -> Any:
    try:
        import qdrant_client
    except ImportError as error:
        raise missing_extra("qdrant-client", "qdrant") from error
    return qdrant_client


def look_into(
    collection: str, url: str, api_key: str | None, limit: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Some payloads of a collection of unknown layout, and its dense vectors by name, with sizes. Raises `StoreError`."""
    with _reading(collection, url, api_key) as client:
        vectors = _vectors(client, collection)
        records, _ = client.scroll(collection, limit=limit, with_payload=True, with_vectors=False)
    dense = {name: int(params.size) for name, params in vectors.items() if params.multivector_config is None}
    return [record.payload or {} for record in records], dense


@dataclass(frozen=True, slots=True)
class Seen:
    """version: of the server; vectors: of a collection, by name, e.g. "256 Cosine" """

    version: str
    vectors: dict[str, str]


def look_at(collection: str, url: str, api_key: str | None) -> Seen:
    """What a server and a collection on it are. Raises `StoreError`."""
    with _reading(collection, url, api_key) as client:
        vectors = _vectors(client, collection)
        return Seen(client.info().version, {name: _kind(params) for name, params in vectors.items()})


@contextmanager
def _reading(collection: str, url: str, api_key: str | None) -> Iterator[QdrantClient]:
    """A client for a look around, its errors as ours."""
    client = connect(_import_qdrant(), url, api_key, None)
    try:
        yield client
    except Exception as error:
        raise StoreError(
            explain(f"collection {collection!r}", expected=f"one at {url}", got=f"{type(error).__name__}: {error}",
                    fix="Check the url, the name and the api key.")
        ) from error  # fmt: skip
    finally:
        client.close()


def _vectors(client: QdrantClient, collection: str) -> dict[str, Any]:
    """Parameters by name; "" is the vector without one."""
    vectors: Any = client.get_collection(collection).config.params.vectors or {}
    return vectors if isinstance(vectors, dict) else {"": vectors}


def _kind(params: Any) -> str:
    many = "" if params.multivector_config is None else " multivector"
    return f"{params.size} {getattr(params.distance, 'value', params.distance)}{many}"
