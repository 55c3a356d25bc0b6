"""Examples drawn from M-BEIR files as they are needed: number n depends on (seed, n) alone, and memory does not grow with the files."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from retrv_r1_retriever import _sync
from retrv_r1_retriever.errors import ImageError, InputError, explain
from retrv_r1_retriever.evaluation.mbeir import Dataset, JudgedQuery, Limits, RunFile, modality_of
from retrv_r1_retriever.evaluation.offsets import MAX_BAD_SHARE
from retrv_r1_retriever.images import LocalImages, load_content
from retrv_r1_retriever.types import Content, Document, Query
from retrv_r1_training.data import Item
from retrv_r1_training.data_config import DataConfig, Part
from retrv_r1_training.klists import hard_negatives
from retrv_r1_training.labelled import Captions
from retrv_r1_training.unreadable import Chosen, Unreadable

log = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 1000  #: rows in turn that cannot be used, before the data set is taken to be the wrong one


class Unusable(Exception):
    """A row that cannot become an example of this stage, by no fault of its own."""


class Draws(Generic[T]):
    """`count` examples over all rows of several files, each row once before any comes again.

    sizes: rows of each file; make(file, row, rng) -> example
    A row that cannot be used (`Unusable`, `ImageError`) is counted in `skipped`, and the next one stands in. Too many unreadable ones
    are an `InputError`.
    """

    def __init__(
        self, sizes: Sequence[int], make: Callable[[int, int, random.Random], T], count: int, seed: int,
        max_bad_share: float = MAX_BAD_SHARE,
    ) -> None:  # fmt: skip
        self._ends, self._make, self._count, self._seed = np.cumsum(sizes), make, count, seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)
        self._unreadable = Unreadable(max_bad_share)
        self.skipped: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> T:
        if not 0 <= number < self._count:
            raise IndexError(number)
        total = int(self._ends[-1])
        if not total:
            raise self._nothing()
        epoch, place = divmod(number, total)
        order = self._shuffled(epoch, total)
        self._unreadable.asked()
        for step in range(min(TRIES, total)):
            row = int(order[(place + step) % total])
            try:
                return self._drawn(row, number)
            except Unusable as reason:
                self.skipped[str(reason)] += 1
            except ImageError as error:
                self.skipped["unreadable picture"] += 1
                self._unreadable.note(row, error)
        raise self._nothing()

    def readable(self, max_share: float) -> Chosen[T]:
        """To measure with: at most `count` examples, no row twice. One that cannot be read is left out, and nothing stands in for it.

        Raises `InputError` above the share.
        """
        total = int(self._ends[-1])
        asked = min(self._count, total)
        order, unreadable = self._shuffled(0, total), Unreadable(max_share, asked)
        found: list[int] = []
        for number in range(total):
            if len(found) + unreadable.count == asked:
                break
            try:
                self._drawn(int(order[number]), number)
                found.append(number)
            except Unusable as reason:
                self.skipped[str(reason)] += 1
            except ImageError as error:
                self.skipped["unreadable picture"] += 1
                unreadable.note(number, error)
        if not found:
            raise self._nothing()
        log.info("validation: %d examples are measured, %d cannot be read", len(found), unreadable.count)
        return Chosen(found, lambda number: self._drawn(int(order[number]), number))

    def _drawn(self, row: int, number: int) -> T:
        file = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[file - 1]) if file else 0
        return self._make(file, row - start, random.Random(f"{self._seed}:{number}"))

    def _nothing(self) -> InputError:
        got = ", ".join(f"{count} x {reason}" for reason, count in self.skipped.most_common(3))
        fix = "`retrv-r1-train check` shows the rows."
        return InputError(explain("data", expected="rows that can be used", got=got or "empty files", fix=fix))

    def _shuffled(self, epoch: int, total: int) -> np.ndarray:
        if epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, epoch)).permutation(total)
            self._epoch = epoch
        return self._order


@dataclass(frozen=True)
class Source:
    """One opened `Part`."""

    data: Dataset
    run: RunFile | None
    captions: Captions
    images: LocalImages

    @classmethod
    def open(cls, folder: Path, part: Part, captions: Captions, limits: Limits) -> Source:
        data = Dataset.open(folder, part.queries, part.pool, qrels=part.qrels, limits=limits)
        return cls(data, RunFile(Path(part.lists), limits) if part.lists else None, captions, LocalImages(folder))

    def judged(self, number: int, rng: random.Random) -> JudgedQuery:
        """A query with those positives that are in the pool."""
        judged = self.data.query(number, rng)
        return replace(judged, grades={d: g for d, g in judged.grades.items() if d in self.data.pool})

    def ranked(self, judged: JudgedQuery, depth: int) -> list[str]:
        """The first `depth` of its first-stage list that are in the pool."""
        return [d for d in self.run.ranked(judged.id)[:depth] if d in self.data.pool] if self.run else []

    def document(self, did: str) -> Document:
        found = self.data.pool.get(did)
        assert found is not None, "ids of the pool only"
        return found

    def at_random(self, modality: str, rng: random.Random) -> Document:
        """A row of the pool, of this modality if a few draws find one."""
        for _ in range(20):
            found = self.data.pool[rng.randrange(len(self.data.pool))]
            if modality_of(found) == modality:
                break
        return found

    def items(self, documents: Sequence[Document]) -> tuple[Item, ...]:
        """Pictures decoded. Raises `ImageError`."""
        contents = self.load([d.content for d in documents])
        return tuple(
            Item(d.id, modality_of(d), c, self.captions.of(d)) for d, c in zip(documents, contents, strict=True)
        )

    def load(self, contents: Sequence[Content]) -> list[Content]:
        async def every() -> list[Content]:
            loaded = await asyncio.gather(*(load_content(self.images, content) for content in contents))
            return [content for content, _ in loaded]

        return _sync.run(every())


@dataclass(frozen=True, slots=True)
class Contrasted:
    """A query, its positive and as many wrong candidates as asked for, the positive first; pictures decoded.

    right: ids of all its positives; described: places of the candidates to be described
    """

    query: Query
    items: tuple[Item, ...]
    right: frozenset[str]
    described: tuple[int, ...] = ()


@dataclass(frozen=True)
class Contrasts:
    """Makes `Contrasted` of a query: `hard` wrong candidates from the first `depth` of its first-stage list, the others at random."""

    sources: Sequence[Source]
    negatives: int
    hard: int
    depth: int
    described: int = 0

    def draws(self, count: int, seed: int, max_bad_share: float = MAX_BAD_SHARE) -> Draws[Contrasted]:
        return Draws([len(s.data) for s in self.sources], self, count, seed, max_bad_share)

    def __call__(self, file: int, row: int, rng: random.Random) -> Contrasted:
        source = self.sources[file]
        judged = source.judged(row, rng)
        if not judged.grades:
            raise Unusable("a query without a positive in the pool")
        positive = source.document(rng.choice(list(judged.grades)))
        documents = [positive, *map(source.document, self._wrong(source, judged, modality_of(positive), rng))]
        content, *_ = source.load([judged.query.content])
        query = replace(judged.query, content=content)
        places = tuple(rng.sample(range(len(documents)), self.described))
        return Contrasted(query, source.items(documents), frozenset(judged.grades), places)

    def _wrong(self, source: Source, judged: JudgedQuery, modality: str, rng: random.Random) -> list[str]:
        chosen = hard_negatives(judged, source.ranked(judged, self.depth), self.hard, rng)
        for _ in range(20 * self.negatives):
            if len(chosen) == self.negatives:
                return chosen
            other = source.at_random(modality, rng).id
            if other not in judged.grades and other not in chosen:
                chosen.append(other)
        if len(chosen) == self.negatives:
            return chosen
        raise Unusable(f"a pool with fewer than {self.negatives} wrong candidates")


class Captioned:
    """Candidates with what they show in words, for `base`: a picture's caption, else its own text."""

    def __init__(self, sources: Sequence[Source]) -> None:
        pools = {source.data.pool.lines.path: source for source in sources}
        self.sources = list(pools.values())

    def draws(self, count: int, seed: int, max_bad_share: float = MAX_BAD_SHARE) -> Draws[tuple[Content, str]]:
        return Draws([len(s.data.pool) for s in self.sources], self, count, seed, max_bad_share)

    def __call__(self, file: int, row: int, rng: random.Random) -> tuple[Content, str]:
        source = self.sources[file]
        document = source.data.pool[row]
        words = source.captions.of(document) or ("" if document.content.image else document.content.text or "")
        if not words:
            raise Unusable("a picture without a caption")
        return source.load([document.content])[0], words

    def texts(self) -> Iterator[str]:
        """Every caption and text of the pools, for the tokenizer."""
        for source in self.sources:
            for number in range(len(source.data.pool)):
                document = source.data.pool[number]
                yield from (f" {t}" for t in (source.captions.of(document), document.content.text) if t)


@dataclass(frozen=True)
class Opened:
    """The files of a recipe."""

    data: DataConfig

    @cached_property
    def captions(self) -> Captions:
        return Captions(Path(self.data.root) / self.data.captions if self.data.captions else None)

    @cached_property
    def train(self) -> list[Source]:
        return self._open(self.data.train)

    @cached_property
    def validation(self) -> list[Source]:
        return self._open(self.data.validation)

    @property
    def validated(self) -> int:
        """Examples to validate on; 0 = none."""
        return self.data.validation_queries if self.data.validation else 0

    def _open(self, parts: Sequence[Part]) -> list[Source]:
        limits = Limits(max_bad_share=self.data.max_bad_share)
        return [Source.open(Path(self.data.root), part, self.captions, limits) for part in parts]
