"""What a call is doing, told while it runs: for callbacks, streamed events and progress bars."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from retrv_r1_retriever.types import RankedResults

Stage = Literal["retrieved", "thinking", "opened", "answered"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One step. A call that does not think has no `thinking`; `opened` comes once per candidate inspected.

    candidates: how many the first stage found (`retrieved`)
    index, id: the opened candidate's label and document id (`opened`)
    results: the ranked list, a fallback included (`answered`)
    """

    stage: Stage
    candidates: int | None = None
    index: int | None = None
    id: str | None = None
    results: RankedResults | None = None


#: Awaited at each step; what it raises ends the call.
ProgressFn: TypeAlias = Callable[[Progress], Awaitable[None]]
