"""Candidate lists to train on: as the first stage made them, made harder, or made so that one token can tell the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_retriever.prompt import LABELS, Prompt, build_full_prompt, build_prompt, label_index
from retrv_r1_retriever.trace import Compressed, Full, Text
from retrv_r1_retriever.types import Candidate, Document, Memory, Query
from retrv_r1_training.data import Pool, content_embeds
from retrv_r1_training.memory_training import learns_memory

#: Shortest list.
MIN_K = 2


@dataclass(frozen=True, slots=True)
class ListConfig:
    """How training lists are made from first-stage lists. top_k: K.

    shuffle: share of lists in random order, so that rank alone decides nothing
    inject: share of lists without the positive that get it put in at a random place; the others train `<|none|>`
    diversify: share of lists in which every second negative is exchanged for one whose first contradiction is a random word:
        a first stage that is good at colours would otherwise leave no colours to learn from
    spread: share of lists under labels drawn from all 127
    short: share of lists cut to a random length of MIN_K to K: a thought taught on one length is wrong on every other
    """

    top_k: int = 20
    shuffle: float = 0.5
    inject: float = 0.5
    diversify: float = 0.7
    spread: float = 0.2
    short: float = 0.5

    @classmethod
    def as_served(cls, top_k: int) -> ListConfig:
        """The first stage's lists as they are."""
        return cls(top_k, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Lists:
    """A pool with its first-stage lists and every candidate's memory. full: prompts show every candidate in full instead."""

    pool: Pool
    ranked: np.ndarray
    memories: Sequence[Memory]
    full: bool = False


def make_lists(
    model: RetrvR1ForConditionalGeneration, processor: Processor, pool: Pool, ranked: np.ndarray, full: bool = False
) -> Lists:
    """Memory as the model makes it now; where it is made anew in every pass (`memory_training`), what it is made of."""
    made = (lambda rows: rows) if learns_memory(model) else model.model.icm.memories
    memories = []
    contents = [item.content for item in pool.items]
    with torch.no_grad():
        for start in range(0, len(contents), 256):
            part = contents[start : start + 256]
            for rows in made(content_embeds(model, processor, part, {})):
                memories.append(Memory(rows.to(torch.float16).cpu().numpy(), "", "", 0))
    return Lists(pool, ranked, memories, full)


def candidate_list(lists: Lists, number: int, config: ListConfig, rng: random.Random) -> tuple[list[int], int | None]:
    positive = lists.pool.target(lists.pool.queries[number])
    length = rng.randint(min(MIN_K, config.top_k), config.top_k) if rng.random() < config.short else config.top_k
    chosen: list[int] = lists.ranked[number, :length].tolist()
    if positive not in chosen and rng.random() < config.inject:
        chosen[rng.randrange(len(chosen))] = positive
    if rng.random() < config.diversify:
        for place, item in enumerate(chosen):
            if item != positive and rng.random() < 0.5:
                other = lists.pool.contradicting(positive, rng)
                chosen[place] = other if other not in chosen else item
    if rng.random() < config.shuffle:
        rng.shuffle(chosen)
    return chosen, chosen.index(positive) if positive in chosen else None


@dataclass(frozen=True, slots=True)
class Contrast:
    """Lists in which coarse words tell the answer: one positive and K - 1 negatives, of which the shares come from the
    first stage's list and from items that contradict at a random word; the rest are random items of the modality.
    """

    top_k: int = 20
    first_stage: float = 0.3
    contradicting: float = 0.4


def contrast(pool: Pool, number: int, ranked: Sequence[int], config: Contrast, rng: random.Random) -> list[int]:
    """The positive, then K - 1 items that two tokens can tell from it (other coarse words)."""
    query = pool.queries[number]
    positive = pool.target(query)
    members = pool.by_modality[query.target_modality]
    chosen = [positive]
    for _ in range(20 * config.top_k):
        if len(chosen) == config.top_k:
            break
        roll = rng.random()
        if roll < config.first_stage:
            other = rng.choice(ranked)
        elif roll < config.first_stage + config.contradicting:
            other = pool.contradicting(positive, rng)
        else:
            other = rng.choice(members)
        if other not in chosen and pool.captions[other].coarse != pool.captions[positive].coarse:
            chosen.append(other)
    return chosen + rng.choices(members, k=config.top_k - len(chosen))


def largest_list(growth: Sequence[tuple[float, int]], progress: float, top_k: int) -> int:
    """growth: (share of the steps done, largest list until then), in order; K after the last."""
    return next((min(size, top_k) for share, size in growth if progress < share), top_k)


def prompt_of(lists: Lists, number: int, chosen: Sequence[int], labels: Sequence[int]) -> Prompt:
    """Query `number` over the items `chosen`, the i-th under `labels[i]` (ascending). 0, 1, 2 ... is the prompt as served.

    Other labels exist in training only: where the same twenty stand in every list, copying one of them earns nothing, and the
    direct read stays at chance (docs/experiments.md). Slots without an item are not shown, yet may be answered.
    """
    documents = [Document(lists.pool.items[i].id, lists.pool.items[i].content) for i in chosen]
    ranked = [
        Candidate(document, None, rank, lists.memories[i])
        for rank, (document, i) in enumerate(zip(documents, chosen, strict=True), start=1)
    ]
    return prompt_under(lists.pool.queries[number].query, ranked, labels, lists.full)


def prompt_under(query: Query, candidates: Sequence[Candidate], labels: Sequence[int], full: bool = False) -> Prompt:
    """The i-th candidate under `labels[i]` (ascending); see `prompt_of`."""
    shown = dict(zip(labels, candidates, strict=True))
    build = build_full_prompt if full else build_prompt
    prompt = build(query, [shown.get(at, candidates[0]) for at in range(labels[-1] + 1)])
    return replace(prompt, segments=tuple(s for s in prompt.segments if _label_of(s) in (None, *shown)))


def _label_of(segment: object) -> int | None:
    if isinstance(segment, (Compressed, Full)):
        return segment.index
    return label_index(segment.text) if isinstance(segment, Text) else None


def spread_labels(count: int, rng: random.Random) -> list[int]:
    return sorted(rng.sample(range(len(LABELS)), count))
