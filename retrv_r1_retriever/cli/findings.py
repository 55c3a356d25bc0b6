"""What a check found, and what to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from retrv_r1_retriever.errors import NotIndexedError, RetrvR1Error

#: What a person at a terminal does about a `NotIndexedError`; its own words also speak to programmers.
INDEX_FIRST = (
    "Run: retrv-r1 index SOURCE (a folder of pictures and texts, or a JSONL). Was it indexed elsewhere? Then name the "
    "settings of that place: --config FILE"
)

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. fix: what to change; empty if there is nothing, or the detail says it"""

    level: Level
    name: str
    detail: str
    fix: str = ""


def guarded(name: str, look: Callable[[], Any]) -> tuple[Any, Finding | None]:
    """What `look` finds, or a finding in place of an error: one broken part must not hide the others."""
    try:
        return look(), None
    except NotIndexedError as error:
        return None, Finding("fail", name, error.found, INDEX_FIRST)
    except (RetrvR1Error, ImportError, OSError) as error:
        return None, Finding("fail", name, str(error))
