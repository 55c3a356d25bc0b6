"""What is wrong with a body, in words for whoever sent it; without the input, which may be of any size, and no JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retrv_r1_retriever.errors import explain

_SHOWN = 5
_WORDS = {"model_attributes_type": "Input should be an object"}  # pydantic's own tell of dictionaries in Python


def explain_body(errors: Sequence[Mapping[str, Any]], body: Any, content_type: str) -> str:
    """errors: as pydantic lists them; body: what was read of it, JSON only where `content_type` says so"""
    if body and not _is_json(content_type):
        got = repr(content_type[:80]) if content_type else "no content type"
        return explain("body", expected="JSON sent as application/json", got=got, fix="Set the header Content-Type.")
    if any(error["type"] == "json_invalid" for error in errors):
        why = errors[0].get("ctx", {}).get("error", "")
        return explain("body", expected="JSON", got=f"none ({why})", fix="Send what a JSON library writes.")
    # Fields that take a text or an object are wrong in as many ways: one line for each place.
    said: dict[str, dict[str, None]] = {}
    for error in errors:
        said.setdefault(_place(error, body), {})[_WORDS.get(error["type"], error["msg"])] = None
    shown = [f"{place}: {', or '.join(words)}" for place, words in list(said.items())[:_SHOWN]]
    return "; ".join(shown) + (f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else "")


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _place(error: Mapping[str, Any], body: Any) -> str:
    """`documents.0.image`: without the names of our types, which pydantic puts between where a field takes several."""
    kept, at = [], body
    path = error["loc"][1:]
    for i, part in enumerate(path):
        last = i == len(path) - 1
        inside = part in at if isinstance(at, Mapping) else isinstance(at, list) and part in range(len(at))
        if inside:
            at = at[part]
        elif not (last and error["type"] == "missing"):
            continue
        kept.append(str(part))
    return ".".join(kept) or "body"
