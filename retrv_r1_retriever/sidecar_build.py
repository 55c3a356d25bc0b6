"""Fills a sidecar: an estimate from a small sample first, then every document, in shards, safe to stop at any moment."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from retrv_r1_retriever.engines.base import Compressor
from retrv_r1_retriever.errors import EngineError, InputError, OptionsError, SchemaError, StoreError, explain
from retrv_r1_retriever.images import ImageSource, content_hash, load_content
from retrv_r1_retriever.indexing import IndexFailure
from retrv_r1_retriever.points import memory_note, memory_rows
from retrv_r1_retriever.qdrant_transport import json_bytes
from retrv_r1_retriever.sidecar import Sidecars
from retrv_r1_retriever.types import Content, Document, Memory

_SAMPLED_FROM = 2048  # point ids the sample is spread over


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` (1-based) of `count`: points are divided by a hash of their id, so that parts are alike and disjoint."""

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise OptionsError(
                explain("shard", expected="i/n with 1 <= i <= n", got=f"{self.index}/{self.count}", fix="Use 1/4 ... 4/4.")
            )  # fmt: skip

    @classmethod
    def parse(cls, text: str) -> Shard:
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()):
            raise OptionsError(explain("shard", expected="i/n", got=repr(text), fix="E.g. --shard 1/4."))
        return cls(int(index), int(count))

    def has(self, point_id: str) -> bool:
        digest = hashlib.blake2b(point_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.count == self.index - 1


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a build will take, from a sample. bytes, json_bytes: of one document's memory, stored and as REST sends it

    present: in this sidecar already, perhaps of older content; unreadable: of the sample, with the reason of the first
    """

    documents: int
    present: int
    sampled: int
    unreadable: int
    reason: str | None
    bytes: float
    grpc_bytes: float
    json_bytes: float
    seconds: float

    @property
    def total_bytes(self) -> float:
        return self.bytes * self.documents

    @property
    def total_seconds(self) -> float:
        """Of one process, for what is not there yet."""
        return self.seconds * max(0, self.documents - self.present)


@dataclass(frozen=True, slots=True)
class BuildReport:
    """seen: points looked at, of all shards; written, current, failed: of this shard; current: there already, unchanged"""

    seen: int = 0
    written: int = 0
    current: int = 0
    failed: tuple[IndexFailure, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Work:
    """One document that needs memory. content: with its picture decoded"""

    point_id: str
    document: Document
    content: Content
    image_hash: str | None


class MemoryBuilder:
    """Makes the memory of one model for a whole collection, beside it.

    A point whose stored memory is of its present content is skipped, so a second run finishes what the first one left, and
    brings changed documents up to date. One bad document is reported and skipped; a store that cannot be written to ends the run.
    """

    def __init__(
        self, sidecars: Sidecars, compressor: Compressor, images: ImageSource, *, batch_size: int = 32
    ) -> None:
        if batch_size < 1:
            raise OptionsError(explain("batch_size", expected="1 or more", got=batch_size, fix="Raise it."))
        self.sidecars, self.compressor, self.images, self.batch_size = sidecars, compressor, images, batch_size

    async def plan(self, documents: int, *, sample: int = 32) -> MemoryPlan:
        """Nothing is written. documents: how many the collection has."""
        ids = list((await self.sidecars.page(None, _SAMPLED_FROM)).ids)
        chosen = ids[:: max(1, len(ids) // max(1, sample))][:sample]
        if not chosen:
            raise InputError(explain("memory plan", expected="documents", got="none", fix="Check [store]."))
        warm, _ = await self._load({chosen[0]: (await self.sidecars.documents(chosen[:1]))[chosen[0]]})
        await asyncio.to_thread(self._compress, warm)  # the first batch of a process pays for much that others do not
        started = time.monotonic()
        work, failures = await self._load(await self.sidecars.documents(chosen))
        made: dict[str, Memory] = {}
        for batch in _chunks(work, self.batch_size):
            made |= await asyncio.to_thread(self._compress, batch)
        seconds = time.monotonic() - started
        sizes = {one.digest: one.points for one in await self.sidecars.all()}
        n = max(1, len(made))
        return MemoryPlan(
            documents=documents,
            present=sizes.get(self.compressor.memory_digest, 0),
            sampled=len(chosen),
            unreadable=len(failures),
            reason=failures[0].reason if failures else None,
            bytes=sum(_stored_bytes(memory) for memory in made.values()) / n,
            grpc_bytes=sum(4 * memory.rows.size for memory in made.values()) / n,
            json_bytes=sum(_json_bytes(memory) for memory in made.values()) / n,
            seconds=seconds / len(chosen),
        )

    async def build(
        self, shard: Shard = Shard(), *, progress: Callable[[BuildReport], None] | None = None
    ) -> BuildReport:
        """progress: called after every batch."""
        started, report = time.monotonic(), BuildReport()
        digest = self.compressor.memory_digest
        await self.sidecars.make(digest, self.compressor.memory_shape[1])
        async for ids in self._pages(self.batch_size * shard.count):
            mine = [id for id in ids if shard.has(id)]
            documents = await self.sidecars.documents(mine)
            stored = await self.sidecars.hashes(digest, mine)
            wanted = {id: d for id, d in documents.items() if not _is_current(d, stored.get(id))}
            work, failures = await self._load(wanted)
            written = 0
            for batch in _chunks(work, self.batch_size):
                unwritten = await self._write(batch)
                written, failures = written + len(batch) - len(unwritten), [*failures, *unwritten]
            report = BuildReport(
                report.seen + len(ids),
                report.written + written,
                report.current + len(documents) - len(wanted),
                (*report.failed, *failures),
                time.monotonic() - started,
            )
            if progress is not None:
                progress(report)
        return report

    async def _pages(self, limit: int) -> AsyncIterator[Sequence[str]]:
        page = await self.sidecars.page(None, min(limit, 2048))
        yield page.ids
        while page.next is not None:
            page = await self.sidecars.page(page.next, min(limit, 2048))
            yield page.ids

    async def _load(self, documents: Mapping[str, Document | SchemaError]) -> tuple[list[_Work], list[IndexFailure]]:
        async def load(point_id: str, document: Document | SchemaError) -> _Work | IndexFailure:
            if isinstance(document, SchemaError):
                return IndexFailure(point_id, str(document))
            try:
                content, image_hash = await load_content(self.images, document.content)
            except Exception as error:  # a user's own ImageSource may raise anything
                return IndexFailure(document.id, _reason(error))
            return _Work(point_id, document, content, image_hash)

        outcomes = await asyncio.gather(*(load(id, document) for id, document in documents.items()))
        return [o for o in outcomes if isinstance(o, _Work)], [o for o in outcomes if isinstance(o, IndexFailure)]

    async def _write(self, batch: Sequence[_Work]) -> list[IndexFailure]:
        """All at once; if that fails, one by one, so that only the bad ones are left out."""
        try:
            memories = await asyncio.to_thread(self._compress, batch)
            await self.sidecars.write(self.compressor.memory_digest, memories)
            return []
        except StoreError:
            raise
        except Exception as error:
            if len(batch) == 1:
                return [IndexFailure(batch[0].document.id, _reason(error))]
            return [failure for work in batch for failure in await self._write([work])]

    def _compress(self, batch: Sequence[_Work]) -> dict[str, Memory]:
        if not batch:
            return {}
        made = self.compressor.compress([work.content for work in batch])
        if len(made) != len(batch):
            raise EngineError(f"the compressor failed: expected {len(batch)} memories, got {len(made)}.")
        digest = self.compressor.memory_digest
        return {
            w.point_id: Memory(one.rows, digest, content_hash(w.document.content), one.full_tokens, w.image_hash)
            for w, one in zip(batch, made, strict=True)
        }


def _json_bytes(memory: Memory) -> int:
    return json_bytes(memory_rows(memory))


def _stored_bytes(memory: Memory) -> int:
    """Rows and note; the index of the store itself comes on top."""
    return 2 * memory.rows.size + len(json.dumps(memory_note(memory)))


def _is_current(document: Document | SchemaError, stored_hash: str | None) -> bool:
    return isinstance(document, Document) and stored_hash == content_hash(document.content)


def _chunks(work: Sequence[_Work], size: int) -> list[Sequence[_Work]]:
    return [work[i : i + size] for i in range(0, len(work), size)]


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, InputError | SchemaError) else f"{type(error).__name__}: {error}"
