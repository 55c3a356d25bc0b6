"""Where the examples of `sft` and `distill` come from: any sequence of `Example`; recorded thoughts over an M-BEIR folder.

A source is indexed by number and says the same every time, so that a resumed run sees what an uninterrupted one sees, and processes
share the work without talking.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_retriever.evaluation.mbeir import Dataset, JudgedQuery
from retrv_r1_retriever.evaluation.offsets import MAX_BAD_SHARE, LineFormat, LineIndex, Skipped
from retrv_r1_retriever.model.checkpoint import Checkpoint
from retrv_r1_retriever.parser import Thought, render
from retrv_r1_retriever.prompt import NONE_INDEX, Prompt
from retrv_r1_retriever.types import Document
from retrv_r1_training.candidate_reader import CandidateReader
from retrv_r1_training.data_config import Part
from retrv_r1_training.lists import prompt_under, spread_labels
from retrv_r1_training.mbeir_tasks import Folder
from retrv_r1_training.sft import Example, example_of, filled
from retrv_r1_training.sft_recipe import ExampleSettings, SftRecipe
from retrv_r1_training.traces import TeacherTrace
from retrv_r1_training.unreadable import Chosen, Unreadable

log = logging.getLogger(__name__)


class Source(Protocol):
    """A sequence of examples; `source[number]` is the same each time."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Example: ...


@dataclass(frozen=True)
class Traces:
    """Thoughts of one part, read by line. usable: lines that fit the data; teachers: who wrote them -> licence."""

    data: Dataset
    lines: LineIndex
    usable: Sequence[int]
    teachers: dict[str, str]

    @classmethod
    def open(cls, folder: Folder, part: Part) -> Traces:
        """Raises `InputError` if more lines than `max_bad_share` are broken, or do not fit queries, pool and judgements."""
        if part.traces is None:
            fix = "Run `retrv-r1-train synthesize` and name its traces.jsonl."
            raise OptionsError(explain(f"traces of {part.queries}", expected="a file", got="none", fix=fix))
        data = folder.dataset(part)
        lines = folder.limits.open(Path(part.traces), LineFormat("traces-1", lambda line: _trace(line).query_id, False))
        usable, bad, teachers = [], [], {}
        for number, line in enumerate(lines):
            trace = _trace(line)
            if problem := _unusable(trace, data, folder.config.top_k):
                bad.append(f"{part.traces}, query {trace.query_id}: {problem}")
            else:
                usable.append(number)
                teachers[trace.teacher] = trace.licence
        Skipped(len(bad), len(lines), tuple(bad[:3])).check(part.traces, folder.config.max_bad_share)
        return cls(data, lines, usable, teachers)

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, number: int) -> TeacherTrace:
        return _trace(self.lines[self.usable[number]])


class TraceExamples:
    """`count` examples, every thought once before any comes again; query wording and labels depend on (seed, number) alone.

    Where a picture of one cannot be read, the next one stands in for it; too many are an `InputError`.
    """

    def __init__(
        self, parts: Sequence[Traces], reader: CandidateReader, count: int, settings: ExampleSettings, seed: int,
        max_bad_share: float = MAX_BAD_SHARE,
    ) -> None:  # fmt: skip
        self._parts, self._reader, self._count = parts, reader, count
        self._settings, self._seed, self._unreadable = settings, seed, Unreadable(max_bad_share)
        self._ends = np.cumsum([len(part) for part in parts])
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Example:
        if not 0 <= number < self._count:
            raise IndexError(number)
        return self._unreadable.first(
            map(self._at, range(number, number + int(self._ends[-1]))), lambda at: self._drawn(at, number)
        )

    def readable(self, max_share: float) -> Chosen[Example]:
        """To measure with: those that can be read, without anything in the others' place. Raises `InputError` above the share."""
        found = Unreadable(max_share, len(self)).each(range(len(self)), self._own)
        return Chosen([number for number, _ in found], self._own)

    def _own(self, number: int) -> Example:
        return self._drawn(self._at(number), number)

    def _at(self, number: int) -> int:
        """Of all thoughts, the one that comes as number `number`."""
        epoch, place = divmod(number, int(self._ends[-1]))
        return int(self._order(epoch)[place])

    def _drawn(self, at: int, number: int) -> Example:
        part = int(np.searchsorted(self._ends, at, side="right"))
        traces = self._parts[part]
        rng = random.Random(f"{self._seed}:{number}")
        example = self._make(traces[at - int(self._ends[part])], traces.data, rng)
        return replace(example, direct=rng.random() < self._settings.direct_share)

    def _make(self, trace: TeacherTrace, data: Dataset, rng: random.Random) -> Example:
        judged = data.find(trace.query_id, rng)
        assert judged is not None, "checked when the traces were opened"
        count = len(trace.candidates)
        labels = spread_labels(count, rng) if rng.random() < self._settings.spread else list(range(count))
        thought = relabelled(trace.thought, labels)
        prompt = over(self._reader, judged, _documents(data, trace.candidates), labels)
        shown = _with_opened(prompt, thought, self._reader)
        also = tuple(labels[i] for i in _right(trace, judged) if labels[i] != thought.answer)
        return example_of(self._reader.processor, shown, thought, filled(render(thought), shown), also)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(int(self._ends[-1]))


def trace_examples(recipe: SftRecipe, start: Checkpoint, folder: Folder) -> tuple[Source, Source, dict[str, str]]:
    """Training and validation examples of the recipe's folder, and the teachers who wrote the former, with licences."""
    data = recipe.data
    reader = CandidateReader(start, folder.images, data.cache_gb)
    train = [Traces.open(folder, part) for part in data.train]
    held_out = [Traces.open(folder, part) for part in data.validation] if data.validation_queries else []
    for name, parts in (("train", train), ("validation", held_out)):
        if parts and not sum(map(len, parts)):
            raise InputError(explain(f"data.{name}", expected="thoughts", got="none", fix="Run synthesize first."))
    count = recipe.optim.steps * recipe.optim.batch_size
    share = data.max_bad_share
    drawn = TraceExamples(train, reader, count, recipe.examples, recipe.seed, share)
    few = min(data.validation_queries, sum(map(len, held_out)))
    served = TraceExamples(held_out, reader, few, ExampleSettings(spread=0.0), recipe.seed).readable(share)
    if few:
        log.info("validation: %d of %d lists can be read and are measured", len(served), few)
    return drawn, served, {name: licence for part in train for name, licence in part.teachers.items()}


def over(reader: CandidateReader, judged: JudgedQuery, documents: Sequence[Document], labels: Sequence[int]) -> Prompt:
    return prompt_under(reader.query(judged.query), reader.candidates(documents), labels)


def relabelled(thought: Thought, labels: Sequence[int]) -> Thought:
    """The thought over candidates under other labels (ascending): the i-th is now called `labels[i]`."""
    answer = thought.answer
    return replace(
        thought,
        verdicts=tuple(replace(v, index=labels[v.index]) for v in thought.verdicts),
        checks=tuple(replace(c, index=labels[c.index]) for c in thought.checks),
        answer=answer if answer in (None, NONE_INDEX) else labels[answer],
    )


def _with_opened(prompt: Prompt, thought: Thought, reader: CandidateReader) -> Prompt:
    """Candidates that the thought opens with their pictures read; the others stay references."""
    candidates = list(prompt.candidates)
    for check in thought.checks:
        candidate = candidates[check.index]
        document = replace(candidate.document, content=reader.open(candidate.document.content))
        candidates[check.index] = replace(candidate, document=document)
    return replace(prompt, candidates=tuple(candidates))


def _unusable(trace: TeacherTrace, data: Dataset, top_k: int) -> str | None:
    judged = data.find(trace.query_id, random.Random(0))
    if judged is None:
        return f"not in {data.queries.lines.path.name}"
    if len(trace.candidates) > top_k:
        return f"{len(trace.candidates)} candidates, data.top_k is {top_k}"
    if unknown := next((did for did in trace.candidates if did not in data.pool), None):
        return f"candidate {unknown} is not in {data.pool.lines.path.name}"
    if sorted(v.index for v in trace.thought.verdicts) != list(range(len(trace.candidates))):
        return "not one verdict for each candidate"
    right = _right(trace, judged)
    if trace.thought.answer not in (right or (NONE_INDEX,)):
        return f"answers {trace.answer or 'none'}, which is judged wrong"
    return None


def _right(trace: TeacherTrace, judged: JudgedQuery) -> tuple[int, ...]:
    return tuple(place for place, did in enumerate(trace.candidates) if did in judged.grades)


def _documents(data: Dataset, ids: Sequence[str]) -> list[Document]:
    def found() -> Iterator[Document]:
        for did in ids:
            document = data.pool.get(did)
            assert document is not None, "checked when the traces were opened"
            yield document

    return list(found())


def _trace(line: bytes) -> TeacherTrace:
    data = json.loads(line)
    if not isinstance(data, dict):
        raise InputError(explain("line", expected="a JSON object", got=type(data).__name__, fix="Fix the line."))
    return TeacherTrace.from_dict(data)
