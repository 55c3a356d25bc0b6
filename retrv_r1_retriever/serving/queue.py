"""How many calls are in the model, how many wait, and when one more is too many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from retrv_r1_retriever.serving.metrics import Metrics


class QueueFull(Exception):
    """No place for another call, or none in time."""


class Queue:
    """A call is `admitted` while its body arrives and it waits, so that memory is bounded, and gets its `turn` in the model."""

    def __init__(self, running: int, waiting: int, metrics: Metrics) -> None:
        self._places, self._metrics = running + waiting, metrics
        self._inside = 0
        self._turns = asyncio.Semaphore(running)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Raises `QueueFull`."""
        if self._inside >= self._places:
            raise QueueFull(f"{self._places} calls are running or waiting, and no more are taken")
        self._inside += 1
        self._metrics.waiting.inc()
        try:
            yield
        finally:
            self._inside -= 1
            self._metrics.waiting.dec()

    @asynccontextmanager
    async def turn(self, timeout_s: float) -> AsyncIterator[float]:
        """Gives the seconds waited. Raises `QueueFull` if there was no turn within `timeout_s`."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await self._turns.acquire()
        except TimeoutError:
            raise QueueFull(f"no turn within timeout_s={timeout_s:g}") from None
        waited = time.monotonic() - started
        self._metrics.waited.observe(waited)
        self._metrics.running.inc()
        self._metrics.waiting.dec()
        try:
            yield waited
        finally:
            self._turns.release()
            self._metrics.running.dec()
            self._metrics.waiting.inc()
