"""Lazy memory: what a query had to make is kept, so that a collection gets its memory from being used."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import Sequence

from retrv_r1_retriever.errors import StoreError, explain
from retrv_r1_retriever.images import content_hash
from retrv_r1_retriever.sidecar import Sidecars
from retrv_r1_retriever.types import Candidate, Memory

_log = logging.getLogger(__name__)


class WriteBack:
    """Writes memory into the sidecar in use, in the background: it never delays or fails a query.

    The first write makes a sidecar, and puts it in use if none is. What cannot be written is logged and made again by a later
    query. max_waiting: candidates on their way, at most; more are passed over. Works on any number of event loops; writes of a
    loop that ends are lost: await `flush()` before.
    """

    def __init__(self, sidecars: Sidecars, *, max_waiting: int = 1024) -> None:
        self._sidecars, self._max_waiting = sidecars, max_waiting
        self._waiting = 0
        self._writes: set[concurrent.futures.Future[None]] = set()
        self._checked: set[str] = set()

    def __call__(self, candidates: Sequence[Candidate]) -> None:
        """Candidates with the memory to be kept. Needs a running event loop."""
        if self._waiting + len(candidates) > self._max_waiting:
            _log.warning("memory of %d candidates is not written back: %d wait", len(candidates), self._waiting)
            return
        self._waiting += len(candidates)
        write = asyncio.run_coroutine_threadsafe(self._write(candidates), asyncio.get_running_loop())
        self._writes.add(write)
        write.add_done_callback(lambda done: self._finished(done, len(candidates)))

    async def flush(self, timeout_s: float = 30.0) -> None:
        """Wait for what is on its way. What takes longer than `timeout_s` is logged."""
        waiting = [asyncio.wrap_future(write) for write in self._writes]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=timeout_s)
            if late:
                _log.warning("%d writes of memory did not end within %.0f s", len(late), timeout_s)

    async def _write(self, candidates: Sequence[Candidate]) -> None:
        made = {c.document.id: c.memory for c in candidates if c.memory is not None}
        digest = next(iter(made.values())).digest
        await self._check(digest, next(iter(made.values())))
        # Read again: a point whose content changed since the query must not get this memory.
        fitting: dict[str, Memory] = {}
        for point_id, document in await self._sidecars.locate(list(made)):
            present = content_hash(document.content)
            for memory in (made.get(document.id), made.get(point_id)):
                if memory is not None and memory.content_hash == present:
                    fitting[point_id] = memory
        await self._sidecars.write(digest, fitting)
        if not fitting:
            _log.warning(
                "memory of %d candidates is not kept: the collection holds none of them with the text and picture they were "
                "read with. Its fields (text, image, id) have to be those that candidates are made of",
                len(made),
            )

    async def _check(self, digest: str, memory: Memory) -> None:
        if digest in self._checked:
            return
        in_use = await self._sidecars.in_use()
        check_pointer(in_use, digest)
        await self._sidecars.make(digest, memory.rows.shape[1])
        if in_use is None:
            await self._sidecars.switch(digest)
        self._checked.add(digest)

    def _finished(self, write: concurrent.futures.Future[None], count: int) -> None:
        self._waiting -= count
        self._writes.discard(write)
        if not write.cancelled() and (error := write.exception()) is not None:
            _log.warning("memory of %d candidates could not be written back: %s", count, error)


def check_pointer(in_use: str | None, digest: str) -> None:
    """Lazy memory goes where queries look for it. Raises `StoreError` if they look at another model's."""
    if in_use not in (None, digest):
        raise StoreError(
            explain(
                'memory = "lazy"', expected=f"memory {digest}, or none yet", got=f"memory {in_use} in use",
                fix='Run `retrv-r1 memory build` and `retrv-r1 memory switch`, or set memory = "stored".',
            )
        )  # fmt: skip
