"""For people who wait: a line on standard error every few seconds, and none where work is done sooner."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
EVERY_S = 5.0


def every(seconds: float = EVERY_S) -> Callable[[], bool]:
    """A function that is true at most once in so many seconds, and not at first."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < seconds:
            return False
        last = now
        return True

    return due


def counted(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The same items, and while they are asked for "WHAT: 1,200 of 5,000, 16 s left, 240.0/s"."""
    due, begin = every(), time.monotonic()
    for done, item in enumerate(items):
        if due():
            rate = done / (time.monotonic() - begin)
            of = f" of {total:,}, {(total - done) / rate:,.0f} s left" if total and rate else ""
            sys.stderr.write(f"{what}: {done:,}{of}, {rate:,.1f}/s\n")
        yield item
