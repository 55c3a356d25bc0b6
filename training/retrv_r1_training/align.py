"""Stage `align`: only the compression module learns, until the frozen LM says of two tokens what it says of the full ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import VISION_END, VISION_START, Chunk, Processor, collate
from retrv_r1_retriever.prompt import CHECK_CUE, CONTENT_PAD, Prompt, query_segments
from retrv_r1_retriever.trace import Compressed, Sampled, Segment, Text
from retrv_r1_retriever.types import Candidate, Content, Document, Memory
from retrv_r1_training.base import DESCRIBE
from retrv_r1_training.data import Pool
from retrv_r1_training.loop import Schedule, train
from retrv_r1_training.loss import accuracy, weighted_ce
from retrv_r1_training.teacher import Caption


def train_align(
    model: RetrvR1ForConditionalGeneration, processor: Processor, pools: Sequence[Pool], held_out: Pool,
    schedule: Schedule, per_query: int, seed: int, log_file: Path,
) -> None:  # fmt: skip
    """Describe `per_query` candidates of each query from their two tokens. The caption's fine words weigh half."""
    rng = random.Random(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.model.icm.parameters():
        parameter.requires_grad_(True)
    sample = content_embeds(model, processor, [i.content for i in random.Random(0).sample(pools[0].items, 64)], {})
    model.model.init_icm(float(torch.cat(sample).norm(dim=-1).mean()))  # as long as what the LM reads in full
    cache: dict[int, Tensor] = {}

    def run(pool: Pool, rng: random.Random, size: int) -> tuple[Tensor, dict[str, float]]:
        queries = [rng.choice(pool.queries) for _ in range(size)]
        picks = [_pick(pool, pool.target(q), q.target_modality, per_query, rng) for q in queries]
        chunks, fines = zip(
            *(_chunk(processor, pool, q.query, p) for q, p in zip(queries, picks, strict=True)), strict=True
        )
        items = [pool.items[i].content for p in picks for i in p]
        hidden, ids, sampled = _forward(model, processor, chunks, items, cache)
        fine = torch.zeros_like(sampled)
        for row, columns in enumerate(fines):
            fine[row, columns] = True
        weight = sampled.float() * torch.where(fine, 0.5, 1.0)
        metrics = {"coarse": accuracy(model, hidden, ids, sampled & ~fine), "fine": accuracy(model, hidden, ids, fine)}
        return weighted_ce(model, hidden, ids, weight), metrics

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        _, metrics = run(held_out, random.Random(0), 64)
        return {f"val_{k}": v for k, v in metrics.items()}

    train(
        "align", schedule, model.parameters(), lambda step: run(rng.choice(pools), rng, schedule.batch_size), log_file,
        evaluate=evaluate,
    )  # fmt: skip


def content_embeds(
    model: RetrvR1ForConditionalGeneration, processor: Processor, contents: Sequence[Content], cache: dict[int, Tensor]
) -> list[Tensor]:
    """T_c of each content, (n, H) without gradient (the LM and the tower are frozen), cached by object."""
    missing = [c for c in contents if id(c) not in cache]
    if missing:
        with torch.no_grad():
            chunks = [processor.content_chunk(c) for c in missing]
            batch = collate(chunks, processor, model.device)
            features = encode_pictures(model.model, processor, batch.pictures)
            embeds = model.model.embed(batch.input_ids, features, batch.image_mask, None)
        for content, chunk, row in zip(missing, chunks, embeds, strict=True):
            cache[id(content)] = row[: len(chunk)].clone()
    return [cache[id(c)] for c in contents]


def _pick(pool: Pool, target: int, modality: str, count: int, rng: random.Random) -> list[int]:
    members = pool.by_modality[modality]
    return [target if rng.random() < 0.2 else rng.choice(members) for _ in range(count)]


def _chunk(processor: Processor, pool: Pool, query: object, picks: Sequence[int]) -> tuple[Chunk, list[int]]:
    """Per candidate: two tokens where the full ones would stand, "Describe:", its caption; the query last. Also the columns of
    the fine words.

    No labels here: the frozen LM has learned nothing about them yet, and their rows would be noise on the two tokens.
    """
    nothing = Memory(np.zeros((1, 1), np.float16), "", "", 0)  # rows are filled in below, with gradient
    empty = Candidate(Document("", Content(" .")), None, 1, nothing)
    candidates = tuple(empty for _ in picks)
    segments: list[Segment] = []
    for i, pick in enumerate(picks):
        shown = (
            (Text(VISION_START), Compressed(i), Text(VISION_END))
            if pool.items[pick].modality == "image"
            else (Compressed(i),)
        )
        segments += [*shown, Text(CHECK_CUE), DESCRIBE, Sampled(f" {pool.items[pick].caption}")]
    segments += query_segments(query)  # type: ignore[arg-type]
    chunk = processor.chunk(segments, Prompt(query, candidates, ()))  # type: ignore[arg-type]
    fine_ids = {
        i for pick in picks for w in Caption.of(pool.items[pick].caption).fine for i in processor.tokenise(f" {w}")
    }
    fine = [c for c in np.flatnonzero(chunk.sampled).tolist() if chunk.ids[c] in fine_ids]
    return chunk, fine


def _forward(
    model: RetrvR1ForConditionalGeneration, processor: Processor, chunks: Sequence[Chunk], contents: Sequence[Content],
    cache: dict[int, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch = collate(chunks, processor, model.device)
    memories = [model.model.icm.memory(e) for e in content_embeds(model, processor, contents, cache)]
    batch.compressed.memory = nn_pad(memories)
    batch.compressed.label = torch.full_like(batch.compressed.label, processor.token_id(CONTENT_PAD))
    lengths = torch.tensor([len(m) for m in memories])
    batch.compressed.memory_mask = torch.arange(batch.compressed.memory.shape[1]) < lengths[:, None]
    features = encode_pictures(model.model, processor, batch.pictures)
    embeds = model.model.embed(batch.input_ids, features, batch.image_mask, batch.compressed)
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=batch.positions, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    return hidden, batch.input_ids, batch.sampled


def nn_pad(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
