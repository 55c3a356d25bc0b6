"""The core's progress as LangChain's custom events: `retrv_r1.retrieved`, `.thinking`, `.opened`, `.answered`."""

from __future__ import annotations

import asyncio
from typing import Any

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager

from retrv_r1_retriever import Progress, ProgressFn
from retrv_r1_retriever.plain import artifact


def reporter(manager: AsyncCallbackManager | CallbackManager) -> ProgressFn | None:
    """None where nobody listens."""
    if not manager.handlers:
        return None

    async def report(progress: Progress) -> None:
        name, data = _event(progress)
        if isinstance(manager, AsyncCallbackManager):
            await manager.on_custom_event(name, data, run_id=manager.parent_run_id)
        else:  # a caller's own sync handlers may take their time: not on the loop that all sync calls share
            await asyncio.to_thread(manager.on_custom_event, name, data, run_id=manager.parent_run_id)

    return report


def _event(progress: Progress) -> tuple[str, dict[str, Any]]:
    data: dict[str, Any] = {}
    if progress.stage == "retrieved":
        data = {"candidates": progress.candidates}
    elif progress.stage == "opened":
        data = {"index": progress.index, "id": progress.id}
    elif progress.results is not None:
        data = artifact(progress.results)
    return f"retrv_r1.{progress.stage}", data
