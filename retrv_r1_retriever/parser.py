"""The grammar of a thought, both ways: `parse(render(thought)) == thought`. No `eval`, no guessing: what does not parse is left out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from retrv_r1_retriever.prompt import (
    ANSWER_END,
    ANSWER_START,
    DIFFERS,
    INSPECT_END,
    INSPECT_START,
    LABELS,
    MATCH,
    NONE,
    NONE_INDEX,
    THINK_END,
    THINK_START,
    label,
    label_index,
)  # fmt: skip
from retrv_r1_retriever.trace import Forced, Full, Sampled, Segment


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of the elimination: `keep`, or the first reason against candidate `index`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Check:
    """What was written after candidate `index` was opened. `match` is None if the last word is neither word of the grammar."""

    index: int
    text: str
    match: bool | None = None


@dataclass(frozen=True, slots=True)
class Thought:
    """A parsed turn. `answer` is a candidate index, `NONE_INDEX` for none, or None if there is no valid answer."""

    hypothesis: str = ""
    verdicts: tuple[Verdict, ...] = ()
    checks: tuple[Check, ...] = ()
    answer: int | None = None


_LABEL = re.compile(r"<\|(?:c\d{1,3}|none)\|>")
_SAFE_INSPECTION = re.compile(re.escape(INSPECT_START) + r"\s*(<\|c\d{1,3}\|>)\s*" + re.escape(INSPECT_END) + r"$")
_TAGS = (THINK_START, THINK_END, ANSWER_START, ANSWER_END)
_TAG = re.compile(f"({'|'.join(map(re.escape, _TAGS))})")
_STRAY = re.compile("|".join(re.escape(t) for t in (INSPECT_START, INSPECT_END)))


def requested_inspection(text: str) -> int | None:
    """The index a generation that stopped at `<inspection-index-end>` asks for; None if it is malformed."""
    found = _SAFE_INSPECTION.search(text)
    return label_index(found.group(1)) if found else None


def render(thought: Thought) -> tuple[Segment, ...]:
    """The turn a teacher writes: exactly the segments a session would produce for this thought.

    Sampled segments carry text only; a trainer tokenises each on its own. This is the direction synthetic CoT is made in.
    """
    head = f" {thought.hypothesis}" if thought.hypothesis else ""
    head += "".join(f"{label(v.index)} {v.text}" for v in thought.verdicts)
    segments: list[Segment] = [Forced(THINK_START)]
    for check in thought.checks:
        segments += [Sampled(f"{head}{INSPECT_START}{label(check.index)}{INSPECT_END}"), Full(check.index)]
        head = f" {check.text}" if check.text else ""
    segments += [Sampled(head + THINK_END)]
    return (*segments, *answer_segments(thought.answer))


def readable(text: str, name: Callable[[int], str]) -> str:
    """The model's words for people: a candidate's label as `name(index)`, the none label as `none`, long repetitions counted."""

    def shown(found: re.Match[str]) -> str:
        index = label_index(found.group())
        return f" {'none' if index == NONE_INDEX else '?' if index is None else name(index)} "

    runs = [(word, len(list(run))) for word, run in itertools.groupby(_LABEL.sub(shown, text).split())]
    return " ".join(f"{word} (×{times})" if times > 2 else " ".join([word] * times) for word, times in runs)


def answer_segments(answer: int | None) -> tuple[Segment, ...]:
    """`<answer><|c3|></answer>`; also the whole turn of a direct answer."""
    if answer is None:
        return (Forced(ANSWER_START),)
    text = NONE if answer == NONE_INDEX else label(answer)
    return (Forced(ANSWER_START), Sampled(text), Forced(ANSWER_END))


def parse(turn: Iterable[Segment]) -> Thought:
    """Read a turn. Total: any segments give a `Thought`; text outside the grammar is ignored."""
    hypothesis, answer = "", None
    verdicts: tuple[Verdict, ...] = ()
    checks: list[Check] = []
    opened: int | None = None
    thinking, answering, first, buffer = False, False, True, ""

    def flush() -> None:
        nonlocal hypothesis, verdicts, buffer, first, opened
        if first:
            hypothesis, verdicts = _elimination(buffer)
            first = False
        elif opened is not None:
            checks.append(_check(opened, buffer))
            opened = None
        buffer = ""

    for segment in turn:
        if isinstance(segment, Full):
            flush()
            opened = segment.index
        elif isinstance(segment, Forced | Sampled):
            for piece in _TAG.split(segment.text):
                if piece in (THINK_END, ANSWER_START) and thinking:
                    flush()
                if piece in _TAGS:
                    thinking, answering = piece == THINK_START, piece == ANSWER_START
                elif thinking:
                    buffer += piece
                elif answering and answer is None:
                    answer = label_index(piece.strip())
    if thinking:
        flush()
    return Thought(hypothesis, verdicts, tuple(checks), answer)


def _elimination(text: str) -> tuple[str, tuple[Verdict, ...]]:
    text = _strip_inspections(text)
    marks = list(_LABEL.finditer(text))
    hypothesis = text[: marks[0].start()] if marks else text
    verdicts: dict[int, Verdict] = {}
    for mark, following in zip(marks, [*marks[1:], None], strict=False):  # no marks: nothing to pair
        index = label_index(mark.group())
        if index is None or index >= len(LABELS):
            continue
        words = text[mark.end() : following.start() if following else len(text)]
        verdicts.setdefault(index, Verdict(index, words.strip()))
    return hypothesis.strip(), tuple(verdicts.values())


def _check(index: int, text: str) -> Check:
    words = _strip_inspections(text).strip()
    last = words.rsplit(maxsplit=1)[-1] if words else ""
    return Check(index, words, {MATCH: True, DIFFERS: False}.get(last))


def _strip_inspections(text: str) -> str:
    """Drop inspection requests, refused ones included, and stray halves of them."""
    whole = re.compile(re.escape(INSPECT_START) + r"\s*(?:<\|c\d{1,3}\|>)?\s*" + re.escape(INSPECT_END))
    return _STRAY.sub("", whole.sub("", text))
