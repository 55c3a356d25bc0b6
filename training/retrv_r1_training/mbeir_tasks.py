"""M-BEIR folders as training sees them: parts opened, K-lists as tasks of a rollout, read from disk one at a time."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

from retrv_r1_retriever.config import Config, ModelConfig, checkpoint_path
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.mbeir import Dataset, Limits, RunFile
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.model.embedding import BackboneEmbedder
from retrv_r1_retriever.prompt import NONE_INDEX, build_prompt
from retrv_r1_training.candidate_reader import CandidateReader
from retrv_r1_training.data_config import DataConfig, Part
from retrv_r1_training.embedded_lists import EmbeddedLists, open_embedder
from retrv_r1_training.klists import KList, KListConfig, KLists, Missing, Ranked
from retrv_r1_training.rollout import Task
from retrv_r1_training.unreadable import Unreadable
from retrv_r1_training.waiting import counted

log = logging.getLogger(__name__)

#: The list of query `number`, or None where there is none to train on.
MakeList = Callable[[KLists, int], KList | None]


def checkpoint_folder(name: str) -> Path:
    """A folder, or "miniature" for the one in the package."""
    return Path(checkpoint_path(Config(model=ModelConfig(checkpoint=name))))


class Folder:
    """The recipe's data, opened. Pictures are read from below its root only."""

    def __init__(self, config: DataConfig, checkpoint: Path, seed: int) -> None:
        self.config, self._checkpoint, self._seed = config, checkpoint, seed
        self.root = Path(config.root)
        if not self.root.is_dir():
            fix = "Fix data.root, or make the folder with `retrv-r1-train convert`."
            raise InputError(
                explain(f"data.root {config.root}", expected="a folder of M-BEIR files", got="none", fix=fix)
            )
        self.images = LocalImages(self.root)
        self.limits = Limits(max_bad_share=config.max_bad_share)

    def dataset(self, part: Part) -> Dataset:
        return Dataset.open(self.root, part.queries, part.pool, qrels=part.qrels, limits=self.limits)

    def lists(self, part: Part) -> KLists:
        data = self.dataset(part)
        run: Ranked
        if part.lists is not None:
            run = RunFile(Path(part.lists), self.limits)
        else:
            run = EmbeddedLists(self._embedder, data, self.images, self.config.top_k, self._seed)
        return KLists(data, run, self._seed)

    def query_ids(self) -> Iterator[str]:
        """Of the training queries."""
        for part in self.config.train:
            queries = self.dataset(part).queries
            yield from (queries[number].id for number in range(len(queries)))

    def training(
        self, reader: CandidateReader, shuffle: float, missing: str, only: frozenset[str] | None = None
    ) -> Tasks:
        """only: ids of the queries to take, None = all"""
        config = KListConfig(self.config.top_k, shuffle=shuffle, missing=Missing(missing), min_k=self.config.min_k or 0)

        def make(lists: KLists, number: int) -> KList | None:
            if only is not None and lists.data.queries[number].id not in only:
                return None
            return lists.draw(number, config, epoch=0)

        return Tasks(map(self.lists, self.config.train), make, reader, Unreadable(self.config.max_bad_share))

    def validation(self, reader: CandidateReader) -> Sequence[Task]:
        """As served: a positive that the first stage did not find is a miss. Lists that cannot be read are left out, here and for good."""
        if not self.config.validation or not self.config.validation_queries:
            return []
        lists = map(self.lists, self.config.validation)
        tasks = Tasks(lists, lambda part, n: part.as_served(n, self.config.top_k), reader)
        asked = tasks.spread(self.config.validation_queries)
        readable = counted(asked.each(self.config.max_bad_share), "validation lists read", len(asked))
        found = asked.only([where for where, _ in readable])
        log.info("validation: %d of %d lists can be read and are measured", len(found), len(asked))
        return found

    @cached_property
    def _embedder(self) -> BackboneEmbedder:
        return open_embedder(self._checkpoint)


class Tasks(Sequence[Task]):
    """Queries with their candidates, made when they are asked for; the same number gives an equal task every time.

    unreadable: counts those with a picture that cannot be read, for which the next one stands in; None = they are an `InputError`
    """

    def __init__(
        self, parts: Iterable[KLists], make: MakeList, reader: CandidateReader, unreadable: Unreadable | None = None,
        where: Sequence[tuple[int, int]] | None = None,
    ) -> None:  # fmt: skip
        self._parts, self._make, self._reader, self._unreadable = list(parts), make, reader, unreadable
        self._where = self._usable() if where is None else where
        if where is None and not self._where:
            counts = [dict(part.counts) for part in self._parts]
            fix = "Check lists and qrels (`retrv-r1-train check`): a query needs a first-stage list."
            raise InputError(explain("data", expected="queries with candidates", got=counts, fix=fix))

    @overload
    def __getitem__(self, number: int) -> Task: ...
    @overload
    def __getitem__(self, number: slice) -> Tasks: ...
    def __getitem__(self, number: int | slice) -> Task | Tasks:
        if isinstance(number, slice):
            return self.only(self._where[number])
        if self._unreadable is None:
            return self._task(self._where[number])
        self._where[number]  # raises IndexError
        following = (self._where[(number + step) % len(self)] for step in range(len(self)))
        return self._unreadable.first(following, self._task)

    def each(self, max_share: float) -> Iterator[tuple[tuple[int, int], Task]]:
        """Those that can be read, each once, with where it stands: nothing stands in for another. Raises `InputError` above the share."""
        return Unreadable(max_share, len(self)).each(self._where, self._task)

    def _task(self, where: tuple[int, int]) -> Task:
        return make_task(self._klist(where), self._parts[where[0]], self._reader)

    def _klist(self, where: tuple[int, int]) -> KList:
        klist = self._make(self._parts[where[0]], where[1])
        assert klist is not None, "made before"
        return klist

    def __len__(self) -> int:
        return len(self._where)

    def spread(self, count: int) -> Tasks:
        """At most `count` of them, evenly."""
        count = min(count, len(self))
        return self.only([self._where[n * len(self) // count] for n in range(count)])

    def sample(self, count: int, seed: int) -> Tasks:
        """At most `count` of them at random; a larger count has those of a smaller one."""
        where = list(self._where)
        random.Random(seed).shuffle(where)
        return self.only(where[:count])

    def others(self, known: Collection[str]) -> Tasks:
        """The first of each query whose id is not known. Reads no picture."""
        first: dict[str, tuple[int, int]] = {}
        for where in self._where:
            first.setdefault(self._klist(where).query.id, where)
        return self.only([where for id, where in first.items() if id not in known])

    def only(self, where: Sequence[tuple[int, int]]) -> Tasks:
        return Tasks(self._parts, self._make, self._reader, self._unreadable, where)

    def _usable(self) -> list[tuple[int, int]]:
        where = []
        for number, part in enumerate(self._parts):
            name, numbers = part.data.queries.lines.path.name, range(len(part.data))
            waiting = counted(numbers, f"lists of {name}", len(part.data))
            found = [n for n in waiting if (made := self._make(part, n)) is not None and made.candidates]
            said = ", ".join(f"{count} {what}" for what, count in part.counts.items() if count)
            log.info("%s: %d of %d queries; %s", name, len(found), len(part.data), said)
            where += [(number, n) for n in found]
        return where


def make_task(klist: KList, lists: KLists, reader: CandidateReader) -> Task:
    prompt = build_prompt(reader.query(klist.query.query), reader.candidates(lists.documents(klist)))
    stratum = klist.query.stratum or lists.data.queries.lines.path.stem
    return Task(klist.query.id, stratum, prompt, klist.answers or (NONE_INDEX,))
