"""Lists of K candidates to train on and to measure with, made from a first stage's lists: its mistakes are the hard negatives."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import numpy as np

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.evaluation.mbeir import Dataset, JudgedQuery
from retrv_r1_retriever.types import MAX_CANDIDATES, Document


class Missing(StrEnum):
    """What becomes of a training list without any positive."""

    NONE = "none"  #: it stays and trains `<|none|>`
    INJECT = "inject"  #: a positive takes the place of a random negative
    DROP = "drop"  #: it is left out


class Outcome(StrEnum):
    PRESENT = "present"  #: the first stage found a positive
    NONE = "none"  #: no positive in the list, on purpose: trains `<|none|>`
    INJECTED = "injected"
    DROPPED = "dropped"
    MISS = "miss"  #: no positive in an evaluation list: counts as a wrong answer
    NO_LIST = "no first-stage list"


@dataclass(frozen=True, slots=True)
class KListConfig:
    """top_k: K; depth: the K are drawn from this many (None = they are the first K; LamRA draws from 100)
    min_k: half of the lists are cut to a random length from this to K; 0 = none is
    shuffle: share of lists in random order, so that rank alone decides nothing
    """

    top_k: int = 20
    depth: int | None = None
    shuffle: float = 1.0
    missing: Missing = Missing.NONE
    min_k: int = 0

    def __post_init__(self) -> None:
        for what, good, expected, got in (
            ("top_k", 1 <= self.top_k <= MAX_CANDIDATES, f"1 to {MAX_CANDIDATES}", self.top_k),
            ("min_k", 0 <= self.min_k <= self.top_k, f"0 to top_k ({self.top_k})", self.min_k),
            ("depth", self.depth is None or self.depth >= self.top_k, "None, or top_k and more", self.depth),
            ("shuffle", 0 <= self.shuffle <= 1, "0 to 1", self.shuffle),
            ("missing", self.missing in tuple(Missing), f"one of {', '.join(Missing)}", self.missing),
        ):
            if not good:
                raise OptionsError(explain(f"KListConfig.{what}", expected=expected, got=got, fix="Fix the value."))


@dataclass(frozen=True, slots=True)
class KList:
    """candidates: ids in the order of the slots."""

    query: JudgedQuery
    candidates: tuple[str, ...]
    outcome: Outcome

    @property
    def grades(self) -> tuple[int, ...]:
        """By slot; 0 = no positive."""
        return tuple(self.query.grades.get(did, 0) for did in self.candidates)

    @property
    def answers(self) -> tuple[int, ...]:
        """Slots of the positives, best grade first; empty = the right answer is none."""
        grades = self.grades
        return tuple(sorted((slot for slot, grade in enumerate(grades) if grade > 0), key=lambda slot: -grades[slot]))


def list_length(min_k: int, top_k: int, rng: random.Random) -> int:
    """Of one list: K, or, with a `min_k`, in half of the cases a random one from there to K."""
    return rng.randint(min_k, top_k) if min_k and rng.random() < 0.5 else top_k


def training_list(query: JudgedQuery, ranked: Sequence[str], config: KListConfig, rng: random.Random) -> KList:
    """ranked: ids of the first stage, best first. An outcome `dropped` is not to be trained on."""
    size = list_length(config.min_k, config.top_k, rng)
    head = list(ranked[: config.depth or size])
    found = [did for did in head if did in query.grades]
    kept = {rng.choice(found)} if found else set()  # one is sure; others come along as often as they would be drawn
    others = [did for did in head if did not in kept]
    kept |= set(rng.sample(others, min(size - len(kept), len(others))))
    chosen = [did for did in head if did in kept]
    outcome = Outcome.PRESENT if found else Outcome.NONE
    if not found and config.missing is Missing.DROP:
        outcome = Outcome.DROPPED
    if not found and config.missing is Missing.INJECT and query.grades:
        place = rng.randrange(len(chosen)) if chosen else 0
        chosen[place : place + 1] = [rng.choice(list(query.grades))]
        outcome = Outcome.INJECTED
    if rng.random() < config.shuffle:
        rng.shuffle(chosen)
    return KList(query, tuple(chosen), outcome)


def evaluation_list(query: JudgedQuery, ranked: Sequence[str], top_k: int) -> KList:
    """As the first stage made it: a positive that it did not find is a miss and never put in."""
    chosen = tuple(ranked[:top_k])
    return KList(query, chosen, Outcome.PRESENT if any(d in query.grades for d in chosen) else Outcome.MISS)


def hard_negatives(query: JudgedQuery, ranked: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Up to `count` of the first stage's mistakes, for contrastive training."""
    wrong = [did for did in ranked if did not in query.grades]
    return rng.sample(wrong, min(count, len(wrong)))


class Ranked(Protocol):
    """A first stage's lists: a `RunFile`, or anything else that knows them."""

    def ranked(self, qid: str) -> list[str]:
        """Candidate ids, best first; empty for an unknown query."""


class KLists:
    """A data set's lists, one query at a time.

    counts: how many lists had which `Outcome`, and ids that no pool row stands behind ("... outside the pool")
    """

    def __init__(self, data: Dataset, run: Ranked, seed: int) -> None:
        self.data, self.run, self.seed = data, run, seed
        self.counts: Counter[str] = Counter()

    def training(self, config: KListConfig, epoch: int, *, rank: int = 0, world: int = 1) -> Iterator[KList]:
        """All queries once in an order drawn from seed and epoch; every rank gets its share. Same arguments, same lists."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.data))
        for number in order[rank::world].tolist():
            klist = self.draw(number, config, epoch)
            if klist is not None:
                yield klist

    def draw(self, number: int, config: KListConfig, epoch: int) -> KList | None:
        """The list of query `number` in that epoch; None if there is no first-stage list or it is dropped."""
        rng = random.Random(f"{self.seed} {epoch} {number}")
        query, ranked = self._parts(number, config.depth or config.top_k, rng)
        if not ranked:
            self.counts[Outcome.NO_LIST.value] += 1
            return None
        klist = training_list(query, ranked, config, rng)
        self.counts[klist.outcome.value] += 1
        return None if klist.outcome is Outcome.DROPPED else klist

    def evaluation(self, top_k: int) -> Iterator[KList]:
        """All queries in the file's order; one without a first-stage list comes without candidates, as a miss."""
        return (self.as_served(number, top_k) for number in range(len(self.data)))

    def as_served(self, number: int, top_k: int) -> KList:
        """The first stage's list of query `number` as it is."""
        query, ranked = self._parts(number, top_k, random.Random(f"{self.seed} {number}"))
        klist = evaluation_list(query, ranked, top_k)
        self.counts[klist.outcome.value] += 1
        return klist

    def documents(self, klist: KList) -> list[Document]:
        """The candidates' contents, in slot order; pictures as paths relative to the data folder."""
        found = [self.data.pool.get(did) for did in klist.candidates]
        assert all(found), "lists hold ids of the pool only"
        return [document for document in found if document is not None]

    def _parts(self, number: int, depth: int, rng: random.Random) -> tuple[JudgedQuery, list[str]]:
        """The query and the first `depth` of its first-stage list, both without ids that are not in the pool."""
        query, pool = self.data.query(number, rng), self.data.pool
        grades = {did: grade for did, grade in query.grades.items() if did in pool}
        listed = self.run.ranked(query.id)[:depth]
        ranked = [did for did in listed if did in pool]
        self.counts["positives outside the pool"] += len(query.grades) - len(grades)
        self.counts["candidates outside the pool"] += len(listed) - len(ranked)
        return replace(query, grades=grades), ranked
