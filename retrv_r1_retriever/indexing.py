"""Fills a store: load, compress, embed, write, in batches; safe to stop at any moment and to run again."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from retrv_r1_retriever import _sync
from retrv_r1_retriever.embedders import Embedder, embed
from retrv_r1_retriever.engines.base import Compressor
from retrv_r1_retriever.errors import InputError, OptionsError, SchemaError, StoreError, explain
from retrv_r1_retriever.images import ImageSource, LocalImages, content_hash, image_reference, load_content
from retrv_r1_retriever.store import Point, Store
from retrv_r1_retriever.types import Content, Document, Memory

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IndexFailure:
    """One item that is not in the index. id: the document's, or file and line of a row that is no document"""

    id: str
    reason: str


#: What readers yield: a bad row is a value, so that it cannot end the stream.
Row: TypeAlias = Document | IndexFailure
Rows: TypeAlias = Iterable[Row] | AsyncIterable[Row]


@dataclass(frozen=True, slots=True)
class IndexReport:
    """indexed: written now; skipped: there already, unchanged; cut: of those written, texts longer than the model reads"""

    indexed: int
    skipped: int
    failed: tuple[IndexFailure, ...]
    seconds: float
    cut: int = 0


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One document on its way. document: as it is stored; content: with its picture decoded"""

    document: Document
    hash: str
    content: Content
    image_hash: str | None


class Indexer:
    """Documents into a store. Memory in use: one batch, the list of failures, and 8 bytes for each id of the run.

    A document that is stored already with the same text, picture reference and memory digest is skipped; a picture that
    changed under the same path is not noticed then: pass `force`. Of several documents with one id the last one is kept, and
    each of the others is reported as a failure.
    One bad item is reported and skipped. A store that cannot be written to, or vectors of the wrong size, end the run.

    compressor: None = an index without memory, for engines that read candidates directly
    images: where pictures come from; None = no files, only data URIs, bytes and Pillow images
    progress: called after every batch with the counts so far
    """

    def __init__(
        self,
        store: Store,
        embedder: Embedder,
        compressor: Compressor | None = None,
        images: ImageSource | None = None,
        *,
        batch_size: int = 32,
        progress: Callable[[IndexReport], None] | None = None,
    ) -> None:
        if batch_size < 1:
            raise OptionsError(explain("batch_size", expected="1 or more", got=batch_size, fix="Raise it."))
        self.store, self.embedder, self.compressor = store, embedder, compressor
        self.images = images if images is not None else LocalImages()
        self.batch_size, self.progress = batch_size, progress

    def index(self, documents: Rows, *, force: bool = False) -> IndexReport:
        return _sync.run(self.aindex(documents, force=force))

    async def aindex(self, documents: Rows, *, force: bool = False) -> IndexReport:
        """force: write everything again, also what looks unchanged."""
        started = time.monotonic()
        report = IndexReport(0, 0, (), 0.0)
        met = _Ids()
        async for rows in _batches(documents, self.batch_size):
            wanted, unchanged, failures = await self._select(rows, force)
            loaded, unreadable = await self._load(wanted)
            unwritten, cut = await self._write(loaded)
            lost = {failure.id for failure in unwritten}
            written = [item.document.id for item in loaded if item.document.id not in lost]
            replacing = met.add([*written, *unchanged])
            report = IndexReport(
                report.indexed + sum(id not in replacing for id in written),
                report.skipped + sum(id not in replacing for id in unchanged),
                (*report.failed, *failures, *unreadable, *unwritten, *map(_repeated, replacing)),
                time.monotonic() - started,
                report.cut + cut,
            )
            if self.progress is not None:
                self.progress(report)
        _logger.info("indexed %d, skipped %d, failed %d", report.indexed, report.skipped, len(report.failed))
        return replace(report, seconds=time.monotonic() - started)

    async def _select(self, rows: Sequence[Row], force: bool) -> tuple[list[Document], list[str], list[IndexFailure]]:
        """Documents to be written, in the form in which they will be stored; ids that need no work; what is no document."""
        documents, failures = await asyncio.to_thread(_as_stored, rows)
        if force:
            return documents, [], failures
        digest = self.compressor.memory_digest if self.compressor is not None else None
        stored = await self.store.content_hashes([document.id for document in documents], memory_digest=digest)
        wanted = [d for d in documents if stored.get(d.id) != content_hash(d.content)]
        changed = {document.id for document in wanted}
        return wanted, [document.id for document in documents if document.id not in changed], failures

    async def _load(self, documents: Sequence[Document]) -> tuple[list[_Loaded], list[IndexFailure]]:
        async def load(document: Document) -> _Loaded | IndexFailure:
            try:
                content, image_hash = await load_content(self.images, document.content)
            except Exception as error:  # a user's own ImageSource may raise anything
                return IndexFailure(document.id, _reason(error))
            return _Loaded(document, content_hash(document.content), content, image_hash)

        outcomes = await asyncio.gather(*(load(document) for document in documents))
        return [o for o in outcomes if isinstance(o, _Loaded)], [o for o in outcomes if isinstance(o, IndexFailure)]

    async def _write(self, items: Sequence[_Loaded]) -> tuple[list[IndexFailure], int]:
        """All at once; if that fails, one by one, so that only the bad ones are left out. Failures, and texts cut.

        Where every single one has the wrong shape, the setup is wrong and not an item: that ends the run.
        """
        try:
            return [], await self._write_batch(items)
        except StoreError:
            raise
        except Exception as error:
            if len(items) == 1:
                if isinstance(error, SchemaError):
                    raise
                return [IndexFailure(items[0].document.id, _reason(error))], 0
            return await self._write_singly(items)

    async def _write_singly(self, items: Sequence[_Loaded]) -> tuple[list[IndexFailure], int]:
        failures: list[IndexFailure] = []
        cut = 0
        misfits: list[SchemaError] = []
        for item in items:
            try:
                failed, cut_now = await self._write([item])
                failures, cut = [*failures, *failed], cut + cut_now
            except SchemaError as error:
                misfits.append(error)
                failures.append(IndexFailure(item.document.id, _reason(error)))
        if len(misfits) == len(items):
            raise misfits[0]
        return failures, cut

    async def _write_batch(self, items: Sequence[_Loaded]) -> int:
        """Number of texts that were cut."""
        if not items:
            return 0
        contents = [item.content for item in items]
        memories, cut = await asyncio.to_thread(self._compress, items)
        vectors = await embed(self.embedder, contents)
        await self.store.upsert(
            [
                Point(item.document, vector, memory)
                for item, vector, memory in zip(items, vectors, memories, strict=True)
            ]
        )
        return cut

    def _compress(self, items: Sequence[_Loaded]) -> tuple[list[Memory | None], int]:
        if self.compressor is None:
            return [None] * len(items), 0
        digest = self.compressor.memory_digest
        compressed = self.compressor.compress([item.content for item in items])
        memories: list[Memory | None] = [
            Memory(one.rows, digest, item.hash, one.full_tokens, item.image_hash)
            for item, one in zip(items, compressed, strict=True)
        ]
        return memories, sum(one.cut_tokens > 0 for one in compressed)


def _as_stored(rows: Sequence[Row]) -> tuple[list[Document], list[IndexFailure]]:
    """Pictures as the references that are kept, so that hashes taken now and from the store are of the same thing."""
    failures: list[IndexFailure] = []
    last: dict[str, Document] = {}
    for row in rows:
        if not isinstance(row, Document):
            failures.append(row if isinstance(row, IndexFailure) else _no_document(row))
            continue
        if reason := _bad_id(row.id):
            failures.append(IndexFailure(str(row.id), reason))
            continue
        if row.id in last:
            failures.append(_repeated(row.id))
        last[row.id] = row
    documents = []
    for document in last.values():
        image = document.content.image
        try:
            if image is not None and not isinstance(image, str):
                document = replace(document, content=replace(document.content, image=image_reference(image)))
            documents.append(document)
        except Exception as error:  # Pillow decodes a file it has opened only now, and raises many types
            failures.append(IndexFailure(document.id, _reason(error)))
    return documents, failures


def _bad_id(id: object) -> str | None:
    """What is wrong with it. A file name that is no UTF-8 reaches us with half surrogate pairs, which no store takes."""
    if not isinstance(id, str) or not id:
        return explain("document id", expected="a non-empty str", got=repr(id), fix="Use str().")
    try:
        id.encode()
    except UnicodeEncodeError:
        return explain("document id", expected="valid Unicode", got=ascii(id), fix="Rename it (a file: in UTF-8).")
    return None


def _repeated(id: str) -> IndexFailure:
    fix = "The last one is kept; give every document its own id."
    return IndexFailure(id, explain("document id", expected="distinct ids", got=f"{id!r} more than once", fix=fix))


class _Ids:
    """Ids met so far, as 64-bit hashes in sorted arrays, each at least twice as long as the next: 8 bytes an id, where a set
    would take a hundred. Two ids with one hash are taken for one about once in a million runs over five million documents.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def add(self, ids: Sequence[str]) -> list[str]:
        """Those that were met before. `ids`: distinct ones."""
        hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
        known = np.zeros(len(ids), bool)
        for array in self._arrays:
            known |= array[np.minimum(np.searchsorted(array, hashes), len(array) - 1)] == hashes
        if not known.all():
            self._arrays.append(np.sort(hashes[~known]))
        while len(self._arrays) > 1 and len(self._arrays[-2]) < 2 * len(self._arrays[-1]):
            self._arrays.append(np.sort(np.concatenate([self._arrays.pop(), self._arrays.pop()])))
        return [id for id, before in zip(ids, known, strict=True) if before]


def _no_document(row: object) -> IndexFailure:
    fix = "Wrap each one: Document(id, Content(text, image))."
    return IndexFailure("?", explain("row", expected="Document", got=type(row).__name__, fix=fix))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, InputError | SchemaError) else f"{type(error).__name__}: {error}"


async def _batches(rows: Rows, size: int) -> AsyncIterator[list[Row]]:
    if isinstance(rows, AsyncIterable):
        batch: list[Row] = []
        async for row in rows:
            batch.append(row)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch
        return
    iterator: Iterator[Row] = iter(rows)
    # Pulled in a thread: readers open files.
    while batch := await asyncio.to_thread(lambda: list(itertools.islice(iterator, size))):
        yield batch
