"""A teacher without a model: writes the thought's grammar from captions, first-stage lists and the right answer.

A caption is words; words with a digit are its fine part (what only an inspection reads), the others its coarse part.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from retrv_r1_retriever.demo.catalogue import LabelledQuery
from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.prompt import DIFFERS, KEEP, MATCH, NONE_INDEX


@dataclass(frozen=True, slots=True)
class Caption:
    coarse: tuple[str, ...]
    fine: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Caption:
        words = text.split()
        fine = tuple(w for w in words if any(c.isdigit() for c in w))
        return cls(tuple(w for w in words if w not in fine), fine)

    def __str__(self) -> str:
        return " ".join((*self.coarse, *self.fine))


def wanted(query: LabelledQuery) -> Caption:
    """What the query asks for in words: the target, less what the query cannot know (a text query without a code)."""
    target = Caption.of(query.target_text)
    text = query.query.content.text or ""
    if query.query.content.image is None and not Caption.of(text).fine:
        return Caption(target.coarse, ())
    return target


def verdict(candidate: Caption, want: Caption) -> str:
    """`keep`, or the candidate's first word that contradicts."""
    return next((c for c, w in zip(candidate.coarse, want.coarse, strict=False) if c != w), KEEP)


def check_text(candidate: Caption, want: Caption) -> str:
    """`a4 same b7 diff c1 same differs`: the fine part read aloud, each word compared, then the conclusion."""
    marks = [f"{c} {'same' if c == w else 'diff'}" for c, w in zip(candidate.fine, want.fine, strict=False)]
    return " ".join([*marks, MATCH if agrees(candidate, want) else DIFFERS])


def agrees(candidate: Caption, want: Caption) -> bool:
    return verdict(candidate, want) == KEEP and (not want.fine or candidate.fine == want.fine)


@dataclass(frozen=True, slots=True)
class TeacherStyle:
    """How the teacher looks around; shares in [0, 1].

    extra: also opens eliminated candidates (else the number of mismatches so far would predict the match)
    exhaustive: opens every kept candidate instead of stopping at the match
    careful: opens even when only one candidate is left
    max_inspections: 0 = answers from the elimination alone
    """

    extra: float = 0.25
    exhaustive: float = 0.3
    careful: float = 0.35
    max_inspections: int = 4


@dataclass(frozen=True, slots=True)
class Judgement:
    """All that can be said of one candidate: the elimination's verdict and, once it is opened, the check.

    match: the check's conclusion; None = its words cannot tell, so it is never opened
    tells: opened although eliminated, it would show a difference
    """

    verdict: str
    check: str = ""
    match: bool | None = None
    tells: bool = False


def write_thought(
    captions: Mapping[int, Caption], want: Caption, target: int | None, rng: random.Random, style: TeacherStyle
) -> Thought:
    """The chain of thought over the candidates, by label in ascending order; `target` None means none of them answers."""
    judged = {i: _judge(c, want) for i, c in captions.items()}
    return compose(str(want), judged, target, rng, style)


def compose(
    hypothesis: str, judged: Mapping[int, Judgement], target: int | None, rng: random.Random, style: TeacherStyle
) -> Thought:
    """A thought out of what can be said of each candidate, by label in ascending order."""
    verdicts = tuple(Verdict(i, j.verdict) for i, j in judged.items())
    opened = _choose(judged, target, rng, style)
    checks = tuple(Check(i, judged[i].check, judged[i].match) for i in opened)
    return Thought(hypothesis, verdicts, checks, NONE_INDEX if target is None else target)


def _judge(candidate: Caption, want: Caption) -> Judgement:
    word = verdict(candidate, want)
    if not want.fine:
        return Judgement(word)
    return Judgement(word, check_text(candidate, want), agrees(candidate, want), candidate.fine != want.fine)


def _choose(judged: Mapping[int, Judgement], target: int | None, rng: random.Random, style: TeacherStyle) -> list[int]:
    """Ascending order always: a shuffled order taught the prototype to open candidates twice."""
    kept = [i for i, j in judged.items() if j.verdict == KEEP]
    openable = [i for i in kept if judged[i].match is not None]
    if not openable or not style.max_inspections:
        return []
    if len(kept) == 1 and target is not None and rng.random() > style.careful:
        return []
    others = [i for i, j in judged.items() if j.verdict != KEEP and j.tells]
    extra = rng.sample(others, 1) if others and rng.random() < style.extra else []
    chosen = sorted({*openable, *extra})
    if target in chosen and rng.random() >= style.exhaustive:
        chosen = chosen[: chosen.index(target) + 1]
    if len(chosen) > style.max_inspections and target in chosen:
        chosen = sorted({target, *rng.sample([i for i in chosen if i != target], style.max_inspections - 1)})
    return chosen[: style.max_inspections]
