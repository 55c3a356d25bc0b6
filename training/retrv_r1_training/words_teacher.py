"""A teacher without a model, for any data set whose candidates can be put in words: qrels, first-stage lists and captions suffice.

Frequent words are taken for *coarse* (two tokens should carry them), rare ones and those with a digit for *fine* (only opening the
candidate shows them). Sought are the words that every right candidate in the list has and the query can know:
all of them where the query has a picture, those in its text where it has not.

A candidate that lacks a sought coarse word is out ("no red"). The others are kept, and opened where a fine word can settle them.
What words cannot settle is never claimed: a wrong candidate with every sought word stays kept and unopened.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from retrv_r1_retriever.prompt import DIFFERS, KEEP, MATCH
from retrv_r1_training.labelled import LabelledList
from retrv_r1_training.synthesize import Cost, Written
from retrv_r1_training.teacher import Caption, Judgement, TeacherStyle, compose

_WORD = re.compile(r"\w+")
#: English words that tell no candidate from another, however rare they are. Ours.
_SILENT = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by for from has have her his in into is it its of on or our that the their them there these they this"
        " those to was were which while who with",
    )
)
#: Fine words of its own that a check reads aloud before it compares. Ours.
_READ_ALOUD = 4


@dataclass(frozen=True, slots=True)
class Wording:
    """Which words of a data set are coarse, which fine (all others), which say nothing.

    coarse: without a digit and in at least `share` and at least `least` captions
    silent: in more than half of all captions, and common English function words
    """

    coarse: frozenset[str]
    silent: frozenset[str]

    @classmethod
    def of(cls, captions: Iterable[str], share: float = 0.01, least: int = 3) -> Wording:
        counts: Counter[str] = Counter()
        total = 0
        for caption in captions:
            total += 1
            counts.update(set(_words(caption)))
        silent = _SILENT | {w for w, n in counts.items() if n > total / 2 and total >= 2 * least}
        coarse = {w for w, n in counts.items() if n >= max(least, share * total) and not _has_digit(w)}
        return cls(frozenset(coarse - silent), frozenset(silent))

    def read(self, text: str) -> Caption:
        """The words that say something, each once, in order."""
        words = [w for w in dict.fromkeys(_words(text)) if w not in self.silent]
        return Caption(tuple(w for w in words if w in self.coarse), tuple(w for w in words if w not in self.coarse))


@dataclass(frozen=True, slots=True)
class WordsTeacher:
    """Writes thoughts out of captions; the same list always gets the same thought."""

    wording: Wording
    style: TeacherStyle = field(default_factory=TeacherStyle)
    seed: int = 0
    name: str = "words"
    licence: str = field(default="", compare=False)
    pays: bool = False

    def prompt_hash(self, task: LabelledList) -> str:
        # The wording is part of it: other captions anywhere may turn a coarse word into a fine one here.
        shown = [
            task.query.content.text, task.query.content.image is not None, task.ids, task.captions, task.right, task.target,
            repr(self.style), self.seed, sorted(self._sought(task).coarse), sorted(self._sought(task).fine),
        ]  # fmt: skip
        return hashlib.blake2b(json.dumps(shown).encode(), digest_size=16).hexdigest()

    def estimate(self, task: LabelledList) -> Cost:
        return Cost()

    async def write(self, task: LabelledList, attempt: int) -> Written:
        captions = [self.wording.read(c) for c in task.captions]
        sought = self._sought(task)
        if not sought.coarse and not sought.fine:
            return Written(rejected="no_words_to_seek")
        rng = random.Random(f"{self.seed}:{task.query_id}:{attempt}")
        judged = {i: _judge(c, sought, i in task.right) for i, c in enumerate(captions)}
        target = task.right[0] if task.right else None
        return Written(compose(str(sought), judged, target, rng, self.style))

    def _sought(self, task: LabelledList) -> Caption:
        """What every right candidate of the list has and the query can know."""
        right = [set(_words(task.captions[i])) for i in task.right if task.captions[i]]
        asked = self.wording.read(task.query.content.text or "")
        shared = _only(self.wording.read(task.target) if task.target else asked, *right)
        if task.query.content.image is not None or not task.target:
            return shared
        known = _only(shared, {*asked.coarse, *asked.fine})
        # A query that shares no word with its answer: its hypothesis is a guess, and frequent words are the fair ones to guess.
        return known if known.coarse or known.fine else Caption(shared.coarse, ())


def _judge(candidate: Caption, sought: Caption, is_right: bool) -> Judgement:
    words = {*candidate.coarse, *candidate.fine}
    if not words:
        return Judgement(KEEP)
    missing = next((w for w in sought.coarse if w not in words), None)
    verdict = KEEP if missing is None else f"no {missing}"
    if not sought.fine:
        return Judgement(verdict)
    lacks = any(w not in words for w in sought.fine)
    match = is_right if is_right or lacks or missing else None
    return Judgement(verdict, _check(candidate, sought, words, match), match, tells=lacks)


def _check(candidate: Caption, sought: Caption, words: set[str], match: bool | None) -> str:
    """`a4 b9, a4 same b7 diff differs`: what is read, each sought fine word compared, the conclusion."""
    aloud = " ".join(candidate.fine[:_READ_ALOUD])
    marks = " ".join(f"{w} {'same' if w in words else 'diff'}" for w in sought.fine)
    return f"{aloud}, {marks} {MATCH if match else DIFFERS}" if aloud else f"{marks} {MATCH if match else DIFFERS}"


def _only(caption: Caption, *allowed: set[str]) -> Caption:
    """The words that are in all of these sets."""
    coarse, fine = (tuple(w for w in part if all(w in words for words in allowed))
                    for part in (caption.coarse, caption.fine))  # fmt: skip
    return Caption(coarse, fine)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _has_digit(word: str) -> bool:
    return any(c.isdigit() for c in word)
