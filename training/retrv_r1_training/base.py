"""Stage `base` (miniature only): a backbone that can see, caption, read a code aloud and compare two codes.

Two parts: `captions` trains tower and language model; `episodes` trains the language model on query -> hypothesis -> opened cards,
with no candidate list yet. The text-only comparisons run beside them from the start: equality is the slow skill, and cheap to drill.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Batch, Chunk, Processor
from retrv_r1_retriever.parser import Check, Thought, Verdict, render
from retrv_r1_retriever.prompt import (
    ASSISTANT,
    CHECK_CUE,
    KEEP,
    LABELS,
    NONE_INDEX,
    OPENING,
    SYSTEM,
    Prompt,
    query_segments,
)
from retrv_r1_retriever.trace import Full, Sampled, Segment, Text
from retrv_r1_retriever.types import Content, Query
from retrv_r1_training.data import Pool
from retrv_r1_training.loop import Schedule, train
from retrv_r1_training.loss import TokenWeights, accuracy, hidden_states, of_each_sequence, token_weights, weighted_ce
from retrv_r1_training.teacher import Caption, agrees, check_text, wanted

DESCRIBE = Text("\nDescribe:")
#: The words of prompt and thought that are in no caption.
FRAME = frozenset(
    (" same diff match differs keep but", f"system\n{SYSTEM}", "user\nCandidates:\n", "assistant\n", "\nQuery:")
)


def vocabulary(pools: Sequence[Pool]) -> list[str]:
    """Every text the miniature's tokenizer must spell in whole words."""
    texts = {" " + item.caption for pool in pools for item in pool.items}
    texts |= {f" {q.query.content.text}" for pool in pools for q in pool.queries if q.query.content.text}
    texts |= {f"Query: {q.query.instruction}" for pool in pools for q in pool.queries}
    return [*sorted(texts | FRAME), CHECK_CUE, DESCRIBE.text]


def caption_chunk(processor: Processor, content: Content, caption: str) -> Chunk:
    segments: list[Segment] = [Full(0, content), DESCRIBE, Sampled(f" {caption}<|im_end|>")]
    return processor.chunk(segments, Prompt(Query(content), (), ()))


def caption_loss(
    model: RetrvR1ForConditionalGeneration, processor: Processor, chunks: Sequence[Chunk]
) -> tuple[Tensor, Tensor, Batch]:
    """Cross-entropy of the captions, each one's mean; hidden states (B, L, H) and batch, to measure with."""
    hidden, batch = hidden_states(model, processor, chunks)
    return weighted_ce(model, hidden, batch.input_ids, of_each_sequence(batch.sampled)), hidden, batch


def train_captions(
    model: RetrvR1ForConditionalGeneration, processor: Processor, pictures: Sequence[tuple[Content, str]],
    held_out: Sequence[tuple[Content, str]], schedule: Schedule, seed: int, log_file: Path,
) -> None:  # fmt: skip
    """Tower and language model from scratch: picture -> caption."""
    rng = random.Random(seed)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = rng.sample(range(len(pictures)), schedule.batch_size)
        chunks = [caption_chunk(processor, *pictures[i]) for i in chosen]
        return caption_loss(model, processor, chunks)[0], {}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        hidden, batch = hidden_states(model, processor, [caption_chunk(processor, *p) for p in held_out[:256]])
        first = batch.sampled.long().argmax(1)
        scores = {}
        for k, word in enumerate(("count", "colour", "shape", "pattern", "frame", "a", "b", "c")):
            at = torch.zeros_like(batch.sampled)
            at[torch.arange(len(first)), first + k] = True
            scores[word] = accuracy(model, hidden, batch.input_ids, at)
        return scores

    train("captions", schedule, model.parameters(), loss_fn, log_file, evaluate=evaluate)


def episode(processor: Processor, query: Query, want: Caption, opened: Sequence[tuple[Content, Caption]],
            rng: random.Random) -> Chunk:  # fmt: skip
    """query -> hypothesis -> opened cards with their checks, the last one described again; labels are random, there is no list."""
    labels = rng.sample(range(len(LABELS)), len(opened))
    checks = [Check(i, check_text(c, want), agrees(c, want)) for i, (_, c) in zip(labels, opened, strict=True)]
    turn = render(Thought(str(want), (), tuple(checks), None))[:-1]
    contents = dict(zip(labels, (content for content, _ in opened), strict=True))
    turn = tuple(Full(s.index, contents[s.index]) if isinstance(s, Full) else s for s in turn)
    prompt = Prompt(query, (), (Text(OPENING), *query_segments(query), Text(ASSISTANT)))
    content, caption = opened[-1]
    described = (Full(labels[-1], content), DESCRIBE, Sampled(f" {caption}"))
    return processor.chunk((*prompt.segments, *turn, *described), prompt)


def sample_episode(processor: Processor, pool: Pool, rng: random.Random, siblings: dict[int, list[int]]) -> Chunk:
    query = rng.choice(pool.queries)
    target = pool.target(query)
    chosen = []
    for _ in range(2):
        roll = rng.random()
        near = siblings[target]
        chosen.append(
            target
            if roll < 0.4
            else rng.choice(near)
            if roll < 0.8
            else rng.choice(pool.by_modality[query.target_modality])
        )
    opened = [(pool.items[i].content, Caption.of(pool.items[i].caption)) for i in chosen]
    return episode(processor, query.query, wanted(query), opened, rng)


def comparison(processor: Processor, rng: random.Random, captions: Sequence[str]) -> Chunk:
    """Text only, no candidates: verdicts as given, the kept ones opened in turn until the match, and the answer.

    Drills what no candidate list is needed for: comparing two codes (60 % of the digits agree), opening what was kept, and
    answering with the label that matched, for all 127 labels alike.
    """
    want = Caption.of(rng.choice(captions))
    labels = sorted(rng.sample(range(len(LABELS)), 8))
    kept = sorted(rng.sample(labels, rng.choice((1, 2, 3, 4))))
    verdicts = tuple(Verdict(i, KEEP if i in kept else rng.choice(want.coarse)) for i in labels)
    checks, contents, answer = [], {}, NONE_INDEX
    for label in kept:
        fine = tuple(w if rng.random() < 0.6 else w[0] + rng.choice("0123456789") for w in want.fine)
        caption = Caption(want.coarse, fine)
        contents[label] = Content(str(caption))
        checks.append(Check(label, check_text(caption, want), agrees(caption, want)))
        if checks[-1].match:
            answer = label
            break
    turn = render(Thought(str(want), verdicts, tuple(checks), answer))
    filled = tuple(Full(s.index, contents[s.index]) if isinstance(s, Full) else s for s in turn)
    prompt = Prompt(Query.of(str(want)), (), (Text(OPENING), *query_segments(Query.of(str(want))), Text(ASSISTANT)))
    return processor.chunk((*prompt.segments, *filled), prompt)


def siblings_of(pool: Pool) -> dict[int, list[int]]:
    """Items of the same modality and coarse words."""
    groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for i, item in enumerate(pool.items):
        groups.setdefault((item.modality, Caption.of(item.caption).coarse), []).append(i)
    return {i: group for group in groups.values() for i in group}


def train_episodes(
    model: RetrvR1ForConditionalGeneration, processor: Processor, pools: Sequence[Pool], held_out: Pool,
    schedule: Schedule, comparisons: int, seed: int, log_file: Path,
) -> None:  # fmt: skip
    """Language model only, tower frozen; `comparisons` text-only sequences beside every batch."""
    rng = random.Random(seed)
    siblings = [siblings_of(p) for p in pools]
    captions = [item.caption for pool in pools for item in pool.items]
    weights = TokenWeights(list_label=0.0, inspect=0.0)
    _freeze_tower(model)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = [rng.randrange(len(pools)) for _ in range(schedule.batch_size)]
        chunks = [sample_episode(processor, pools[p], rng, siblings[p]) for p in chosen]
        loss, metrics = _loss(model, processor, chunks, weights, "")
        drill, more = comparison_loss(model, processor, captions, comparisons, rng)
        return loss + 2 * drill, metrics | more

    held_siblings = siblings_of(held_out)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        chunks = [sample_episode(processor, held_out, random.Random(i), held_siblings) for i in range(100)]
        return _loss(model, processor, chunks, weights, "val_")[1]

    train("episodes", schedule, model.parameters(), loss_fn, log_file, evaluate=evaluate)


def comparison_loss(
    model: RetrvR1ForConditionalGeneration,
    processor: Processor,
    captions: Sequence[str],
    count: int,
    rng: random.Random,
) -> tuple[Tensor, dict[str, float]]:
    """Also the rehearsal beside later stages: without it the comparison is forgotten."""
    drill = [comparison(processor, rng, captions) for _ in range(count)]
    return _loss(model, processor, drill, TokenWeights(default=0.2, list_label=0.0, verdict=0.0), "drill_")


def _loss(
    model: RetrvR1ForConditionalGeneration,
    processor: Processor,
    chunks: Sequence[Chunk],
    weights: TokenWeights,
    tag: str,
) -> tuple[Tensor, dict[str, float]]:
    hidden, batch = hidden_states(model, processor, chunks)
    weight = token_weights(batch, processor, weights)
    metrics = {
        f"{tag}{name}": accuracy(model, hidden, batch.input_ids, weight == value)
        for name, value in (
            ("words", weights.default),
            ("marks", weights.mark),
            ("conclusion", weights.conclusion),
            ("answer", weights.answer),
            ("inspect", weights.inspect),
        )
        if value
    }
    return weighted_ce(model, hidden, batch.input_ids, weight), metrics


def _freeze_tower(model: RetrvR1ForConditionalGeneration) -> None:
    for parameter in (*model.model.visual.parameters(), *model.model.icm.parameters()):
        parameter.requires_grad_(False)
