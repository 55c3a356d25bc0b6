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
    """

    extra: float = 0.25
    exhaustive: float = 0.3
    careful: float = 0.35
    max_inspections: int = 4


def write_thought(
    captions: Mapping[int, Caption], want: Caption, target: int | None, rng: random.Random, style: TeacherStyle
) -> Thought:
    """The chain of thought over the candidates, by label in ascending order; `target` None means none of them answers."""
    verdicts = tuple(Verdict(i, verdict(c, want)) for i, c in captions.items())
    kept = [v.index for v in verdicts if v.text == KEEP]
    opened = _choose(kept, captions, want, target, rng, style)
    checks = tuple(Check(i, check_text(captions[i], want), agrees(captions[i], want)) for i in opened)
    return Thought(str(want), verdicts, checks, NONE_INDEX if target is None else target)


def _choose(
    kept: list[int],
    captions: Mapping[int, Caption],
    want: Caption,
    target: int | None,
    rng: random.Random,
    style: TeacherStyle,
) -> list[int]:
    """Ascending order always: a shuffled order taught the prototype to open candidates twice."""
    if not want.fine or not kept:
        return []
    if len(kept) == 1 and target is not None and rng.random() > style.careful:
        return []
    others = [i for i in captions if i not in kept and captions[i].fine != want.fine]
    extra = rng.sample(others, 1) if others and rng.random() < style.extra else []
    chosen = sorted({*kept, *extra})
    if target in chosen and rng.random() >= style.exhaustive:
        chosen = chosen[: chosen.index(target) + 1]
    if len(chosen) > style.max_inspections and target in chosen:
        chosen = sorted({target, *rng.sample([i for i in chosen if i != target], style.max_inspections - 1)})
    return chosen[: style.max_inspections]
