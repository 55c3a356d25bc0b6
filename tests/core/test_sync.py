from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from retrv_r1_retriever import _sync


async def double(number: int) -> int:
    await asyncio.sleep(0.001)
    return 2 * number


def test_results_and_errors_come_back() -> None:
    async def fail() -> None:
        raise KeyError("mine")

    assert _sync.run(double(4)) == 8
    with pytest.raises(KeyError, match="mine"):
        _sync.run(fail())


async def test_it_works_inside_a_running_loop_as_in_a_notebook() -> None:
    assert _sync.run(double(4)) == 8


def test_all_threads_share_one_loop() -> None:
    async def loop() -> Any:
        return asyncio.get_running_loop()

    with ThreadPoolExecutor(8) as pool:
        assert len({id(x) for x in pool.map(lambda _: _sync.run(loop()), range(32))}) == 1


def test_calling_it_from_its_own_loop_is_an_error_not_a_deadlock() -> None:
    async def nested() -> int:
        return _sync.run(double(1))

    with pytest.raises(RuntimeError, match="inside its own event loop"):
        _sync.run(nested())


def test_an_interrupt_cancels_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def forever() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    submit = asyncio.run_coroutine_threadsafe

    def interrupted(coroutine: Any, loop: Any) -> Any:
        future = submit(coroutine, loop)

        def result() -> None:
            started.wait(5)
            raise KeyboardInterrupt("ctrl-c")  # as if Ctrl-C came while waiting

        monkeypatch.setattr(future, "result", result)
        return future

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt, match="ctrl-c"):
        _sync.run(forever())
    assert cancelled.wait(5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_gets_its_own_loop() -> None:
    _sync.run(double(1))
    child = os.fork()
    if child == 0:
        os._exit(0 if _sync.run(double(21)) == 42 else 1)
    assert os.waitpid(child, 0)[1] == 0
