"""Runs coroutines for the sync methods on one private event loop in a background thread.

One loop for the whole process, so that clients bound to it (connection pools, locks) live longer than one call, and so that
the sync form also works where a loop is already running, as in Jupyter.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result. Interrupting the wait (Ctrl-C) cancels it."""
    loop = _private_loop()
    if _running_loop() is loop:
        coroutine.close()
        raise RuntimeError("a sync method was called from inside its own event loop. Await the async form there.")
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        return future.result()
    finally:
        future.cancel()  # no effect on a finished call


def _private_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="retrv-r1-sync", daemon=True).start()
        return _loop


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _forget() -> None:
    """A forked child has the loop object but not its thread."""
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
