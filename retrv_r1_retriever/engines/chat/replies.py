"""What a chat model is asked to fill in, and what is taken from its reply. Pure, and total: any text gives a value, never a wrong label.

Verdict and grade of every candidate are one JSON object with a key per label, so that a server that follows the schema can
neither forget a candidate, nor name one twice, nor invent one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrv_r1_retriever.prompt import KEEP, NONE_INDEX, escape

MAX_GRADE = 9  # one digit, so that it is one token and its log-probabilities can be read
_VERDICT_CHARS, _TEXT_CHARS = 160, 4000
_ENTRY = r'"{label}"\s*:\s*(\{{[^{{}}]*\}})'
_GRADE = re.compile(r'"grade"\s*:\s*"?([0-9])')

#: One sampled token with its likeliest alternatives (itself included) and their natural-log probabilities.
Token = tuple[str, tuple[tuple[str, float], ...]]


@dataclass(frozen=True, slots=True)
class Grade:
    """verdict: "keep", or the first reason against; value: 0 to 9, with log-probabilities the expectation over the digits."""

    verdict: str
    value: float

    @property
    def logprob(self) -> float:
        """The grade as the log of a probability, never of 0: a stated number, not a measured one."""
        return math.log((self.value + 0.5) / (MAX_GRADE + 1))


@dataclass(frozen=True, slots=True)
class Reading:
    """A judgement of several candidates, by index. answer: an index, `NONE_INDEX`, or None if no valid one was named."""

    looking_for: str = ""
    grades: Mapping[int, Grade] = field(default_factory=dict, hash=False)
    none_fits: float | None = None
    answer: int | None = None
    open: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Checked:
    """What was said about an opened candidate; match is None if nothing usable was."""

    text: str = ""
    match: bool | None = None
    answer: int | None = None
    open: tuple[int, ...] = ()


def name(index: int) -> str:
    return "none" if index == NONE_INDEX else f"c{index}"


def reading_schema(indices: Sequence[int]) -> dict[str, Any]:
    grade = {"type": "integer", "enum": list(range(MAX_GRADE + 1))}
    entry = _object({"verdict": {"type": "string"}, "grade": grade})
    return _object(
        {
            "looking_for": {"type": "string"},
            "candidates": _object({name(i): entry for i in indices}),
            "none_fits": grade,
            "answer": {"type": "string", "enum": [*map(name, indices), "none"]},
            "open": {"type": "array", "items": {"type": "string", "enum": [*map(name, indices)]}},
        }
    )


def check_schema(indices: Sequence[int]) -> dict[str, Any]:
    return _object(
        {
            "check": {"type": "string"},
            "match": {"type": "boolean"},
            "answer": {"type": "string", "enum": [*map(name, indices), "none"]},
            "open": {"type": "array", "items": {"type": "string", "enum": [*map(name, indices)]}},
        }
    )


def parse_reading(text: str, indices: Sequence[int], tokens: Sequence[Token] = ()) -> Reading:
    """Only labels among `indices` count; what is cut or broken is read as far as its entries are whole."""
    data = _json(text)
    grades = {}
    for i in indices:
        entry, span = _entry(data.get("candidates"), text, i)
        stated = _grade(entry.get("grade")) if entry else None
        if entry and stated is not None:
            expected = _expected(tokens, text, span) if span else None
            grades[i] = Grade(_verdict(entry.get("verdict"), stated), stated if expected is None else expected)
    return Reading(
        looking_for=clean(data.get("looking_for"), _TEXT_CHARS),
        grades=grades,
        none_fits=_grade(data.get("none_fits")),
        answer=_label(data["answer"] if "answer" in data else _bare_label(text), indices),
        open=_labels(data.get("open"), indices),
    )


def parse_check(text: str, indices: Sequence[int]) -> Checked:
    data = _json(text)
    match = data.get("match")
    return Checked(
        clean(data.get("check"), _TEXT_CHARS),
        match if isinstance(match, bool) else None,
        _label(data.get("answer"), indices),
        _labels(data.get("open"), indices),
    )


def merge(readings: Iterable[Reading]) -> Reading:
    """Several parts of one list. The best answer is the one with the highest grade; none only if every part says none."""
    parts = list(readings)
    grades = {i: grade for part in parts for i, grade in part.grades.items()}

    def sure(index: int) -> float:
        return grades[index].value if index in grades else -1.0

    answers = [p.answer for p in parts if p.answer is not None]
    named = [a for a in answers if a != NONE_INDEX]
    nones = [p.none_fits for p in parts if p.none_fits is not None]
    return Reading(
        looking_for=next((p.looking_for for p in parts if p.looking_for), ""),
        grades=grades,
        none_fits=min(nones) if nones else None,
        answer=max(named, key=sure) if named else next(iter(answers), None),
        open=tuple(sorted({i for p in parts for i in p.open}, key=lambda i: (-sure(i), i))),
    )


def clean(value: object, chars: int) -> str:
    """A model's words as one harmless line."""
    text = " ".join(escape(value).split()) if isinstance(value, str) else ""
    return text if len(text) <= chars else f"{text[:chars]}…"


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _json(text: str) -> dict[str, Any]:
    """The first whole JSON object of the reply, or what single fields of a broken one say."""
    begin = text.find("{")
    if begin < 0:
        return {}
    try:
        data, _ = json.JSONDecoder().raw_decode(text, begin)
        return data if isinstance(data, dict) else {}
    except (ValueError, RecursionError):
        answer = re.search(r'"answer"\s*:\s*"(c\d{1,3}|none)"', text)
        return {"answer": answer[1]} if answer else {"answer": None}


def _entry(listed: object, text: str, index: int) -> tuple[dict[str, Any] | None, tuple[int, int] | None]:
    """The entry of a candidate and its place in the text; none if two contradict each other."""
    found = list(re.finditer(_ENTRY.format(label=name(index)), text))
    entries = [_json(one[1]) for one in found]
    if isinstance(listed, dict) and isinstance(listed.get(name(index)), dict):
        entries.append(listed[name(index)])
    elif isinstance(listed, list):  # without a schema some models write a list
        entries += [one for one in listed if isinstance(one, dict) and one.get("label") == name(index)]
    if not entries or any(entry != entries[0] for entry in entries):
        return None, None
    return entries[0], found[0].span(1) if found else None


def _expected(tokens: Sequence[Token], text: str, span: tuple[int, int]) -> float | None:
    """The grade as the expectation over the digits at its token; None where the tokens do not show it."""
    digit = _GRADE.search(text, *span)
    whole = "".join(token for token, _ in tokens)
    offset = whole.rfind(text)
    if digit is None or not text or offset < 0:
        return None
    place, passed = offset + digit.start(1), 0
    for token, likely in tokens:
        if passed <= place < passed + len(token):
            if token.strip() != digit[1]:
                return None
            weights = [(int(t.strip()), math.exp(p)) for t, p in likely if t.strip() in set("0123456789")]
            total = sum(weight for _, weight in weights)
            return sum(value * weight for value, weight in weights) / total if total > 0 else None
        passed += len(token)
    return None


def _grade(value: object) -> float | None:
    if isinstance(value, str) and re.fullmatch(r"[0-9]", value.strip()):
        return float(value)
    right = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_GRADE
    return float(value) if right else None  # type: ignore[arg-type]


def _verdict(value: object, grade: float) -> str:
    words = clean(value, _VERDICT_CHARS)
    return (KEEP if words.lower().rstrip(".") == KEEP else words) or f"grade {grade:g}"


def _bare_label(text: str) -> str | None:
    """A reply that is nothing but a label. A label inside a sentence is no answer: the sentence may reject it."""
    words = text.strip().strip("\"'`.").strip()
    return words if re.fullmatch(r"c\d{1,3}|none", words) else None


def _label(value: object, indices: Sequence[int]) -> int | None:
    if value == "none":
        return NONE_INDEX
    return next((i for i in indices if value == name(i)), None)


def _labels(value: object, indices: Sequence[int]) -> tuple[int, ...]:
    found = [_label(one, indices) for one in value] if isinstance(value, list) else []
    return tuple(dict.fromkeys(i for i in found if i is not None and i != NONE_INDEX))
