"""Rollouts: the session and the driver that serve, on the local engine, many at once; and what the scorer needs of each.

Nothing here decodes by itself: train and serve are one loop. A completion is a turn as the session wrote it, opened candidates and
forced tags included; only what the policy chose is scored.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.driver import Reading, read
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.errors import EngineError
from retrv_r1_retriever.images import ImageData, ImageSource, load_content
from retrv_r1_retriever.model.checkpoint import Checkpoint
from retrv_r1_retriever.model.processing import Chunk, Processor
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.prompt import NONE_INDEX, Prompt
from retrv_r1_retriever.session import Outcome
from retrv_r1_retriever.trace import Full, Sampled, Segment
from retrv_r1_retriever.types import Content, ImageInput, StopReason
from retrv_r1_training.lists import ListConfig, Lists, candidate_list, prompt_of
from retrv_r1_training.reward import is_correct

TOGETHER = 256  #: thoughts that share forward passes, at most


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One query over its candidates. The query's picture is decoded or encoded; what a candidate's is, the runner's source can load.

    right: slots of the right answers, best grade first; (`NONE_INDEX`,) if no candidate is
    rank: of the first positive in the list, 1-based, None without
    """

    id: str
    stratum: str
    prompt: Prompt
    right: tuple[int, ...]

    @property
    def rank(self) -> int | None:
        return None if self.right == (NONE_INDEX,) else min(self.right) + 1

    @property
    def top_k(self) -> int:
        return len(self.prompt.candidates)


def tasks_of(lists: Sequence[Lists], top_k: int, missing: str = "none", short: float = 0.0) -> list[Task]:
    """Every query over the first stage's own list. missing: a list without its positive asks for `none`, or is left out (`drop`);
    short: see `ListConfig`
    """
    config, tasks = replace(ListConfig.as_served(top_k), short=short), []
    for part in lists:
        for number, query in enumerate(part.pool.queries):
            chosen, place = candidate_list(part, number, config, random.Random(number))
            if place is None and missing == "drop":
                continue
            prompt = prompt_of(part, number, chosen, range(len(chosen)))
            right = (NONE_INDEX if place is None else place,)
            tasks.append(Task(query.query.id or str(number), query.stratum, prompt, right))
    return tasks


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One finished thought. Arrays are over the completion, C tokens.

    chunk: prompt and completion as tensors-to-be; prompt_tokens: length of the first part
    scored (C,) bool: tokens the policy drew, which carry gradient. Not the forced ones, not opened candidates, and not an answer
        that a spent budget forced (it is an arg-max)
    logprobs (C,): of the sampler, 0 where nothing was drawn
    answer_at: column of the answer within the completion, if it is scored; it was drawn among `slots` (token ids) only
    """

    task: Task
    outcome: Outcome
    chunk: Chunk
    prompt_tokens: int
    scored: np.ndarray
    logprobs: np.ndarray
    answer_at: int | None
    slots: tuple[int, ...]

    @property
    def correct(self) -> bool:
        """As the reward has it; R@1 on held-out lists counts forced answers, too, as users get them."""
        return is_correct(self.outcome, self.task.right)

    @property
    def ids(self) -> list[int]:
        return [int(i) for i in self.chunk.ids]


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 = greedy."""

    temperature: float = 1.0
    max_inspections: int = 4
    max_new_tokens: int = 512


class RolloutRunner:
    """Runs thoughts on the model as it is at that moment. One engine for a whole training: its KV pool is made once.

    images: of the candidates that are opened; None = tasks carry decoded or encoded pictures; autocast: see `LocalEngine`
    """

    def __init__(
        self, checkpoint: Checkpoint, images: ImageSource | None = None, concurrency: int = TOGETHER,
        autocast: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self._model, self.processor = checkpoint.model, checkpoint.processor
        training = self._model.training
        self.engine = LocalEngine(checkpoint, autocast=autocast)
        self._model.train(training)
        self._images, self._concurrency = images or _Decoded(), concurrency

    def run(self, tasks: Sequence[Task], seeds: Sequence[int], sampling: Sampling) -> list[Rollout]:
        """One rollout per task, in order. Raises `EngineError`: a rollout must never be replaced by a fallback."""
        out = []
        for task, reading in zip(tasks, self.read(tasks, seeds, sampling), strict=True):
            if reading.outcome is None:
                raise EngineError(f"rollout of {task.id!r}: expected a thought, got none: {reading.problem}")
            out.append(make_rollout(self.processor, task, reading.outcome, self.opened(task, reading.outcome)))
        return out

    def opened(self, task: Task, outcome: Outcome) -> dict[int, Content]:
        """The contents that the model saw in full, by candidate."""

        async def load(index: int) -> Content:
            return (await load_content(self._images, task.prompt.candidates[index].document.content))[0]

        return {index: run(load(index)) for index in outcome.inspected}

    def read(self, tasks: Sequence[Task], seeds: Sequence[int], sampling: Sampling) -> list[Reading]:
        """The driver's own readings, direct read and thought."""
        return [reading for _, reading in self.readings(tasks, seeds, sampling)]

    def readings(
        self, tasks: Sequence[Task], seeds: Sequence[int], sampling: Sampling
    ) -> Iterator[tuple[Task, Reading]]:
        """The same one after another; `concurrency` of them share forward passes, and only so many tasks are held."""
        for start in range(0, len(tasks), self._concurrency):
            part = list(tasks[start : start + self._concurrency])  # made here, not inside the loop that reads
            with self._serving():
                done = run(self._all(part, seeds[start : start + self._concurrency], sampling))
            yield from zip(part, done, strict=True)

    async def _all(self, tasks: Sequence[Task], seeds: Sequence[int], sampling: Sampling) -> list[Reading]:
        return await asyncio.gather(*(self._one(t, s, sampling) for t, s in zip(tasks, seeds, strict=True)))

    async def _one(self, task: Task, seed: int, sampling: Sampling) -> Reading:
        options = RerankOptions(
            top_k=task.top_k, think="always", temperature=sampling.temperature, seed=seed, timeout_s=None,
            max_inspections=sampling.max_inspections, max_new_tokens=sampling.max_new_tokens,
        )  # fmt: skip
        return await read(self.engine, task.prompt, options, images=self._images)

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Dropout and gradient checkpointing off; back to what was after."""
        training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(training)


def turn_of(task: Task, outcome: Outcome, opened: Mapping[int, Content]) -> tuple[Segment, ...]:
    """What follows the prompt, opened candidates with their contents."""
    turn = outcome.segments[len(task.prompt.segments) :]
    return tuple(replace(s, content=opened[s.index]) if isinstance(s, Full) else s for s in turn)


def make_rollout(processor: Processor, task: Task, outcome: Outcome, opened: Mapping[int, Content]) -> Rollout:
    """The arrays of a finished session, from its segments alone."""
    turn = turn_of(task, outcome, opened)
    answered = outcome.stop_reason is StopReason.ANSWERED
    head = processor.chunk(task.prompt.segments, task.prompt)
    last = max(i for i, s in enumerate(turn) if isinstance(s, Sampled))
    chunks, answer_at, at = [head], None, head.next_position
    scored: list[np.ndarray] = []
    logprobs: list[np.ndarray] = []
    for number, segment in enumerate(turn):
        chunk = processor.chunk([segment], task.prompt, at)
        at = chunk.next_position
        is_answer = number == last
        if is_answer and answered:
            answer_at = sum(len(part) for part in scored)
        graded = isinstance(segment, Sampled) and (answered or not is_answer)
        chunks.append(chunk)
        scored.append(np.full(len(chunk), graded))
        logprobs.append(_logprobs(segment, len(chunk)))
    if answered:  # TRL tells a finished completion by its end token
        chunks.append(Chunk.plain([processor.tokenizer.eos_token_id], at))
        scored.append(np.zeros(1, dtype=bool))
        logprobs.append(np.zeros(1))
    slots = tuple(processor.token_id(s) for s in task.prompt.slots)
    return Rollout(
        task, outcome, Chunk.join(chunks), len(head), np.concatenate(scored), np.concatenate(logprobs), answer_at, slots
    )


def _logprobs(segment: Segment, length: int) -> np.ndarray:
    if not isinstance(segment, Sampled) or segment.logprobs is None:
        return np.zeros(length)
    assert len(segment.logprobs) == length, "a sampled id was tokenised again"
    return np.asarray(segment.logprobs)


def padded(rollout: Rollout, prompt_width: int, width: int, pad_id: int) -> Chunk:
    """The sequence in a trainer's layout: prompts end in column `prompt_width`, completions begin there."""
    left = prompt_width - rollout.prompt_tokens
    right = width - left - len(rollout.chunk)
    return Chunk.join([Chunk.plain([pad_id] * left, 0), rollout.chunk, Chunk.plain([pad_id] * right, 0)])


class _Decoded:
    """Tasks carry decoded pictures already."""

    async def load(self, image: ImageInput) -> ImageData:
        return ImageData(image, "")  # type: ignore[arg-type]
