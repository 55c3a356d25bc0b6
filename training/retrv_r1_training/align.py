"""Stage `align`: only the compression module learns, until the frozen LM says of two tokens what it says of the full ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import VISION_END, VISION_START, Batch, Chunk, Processor, collate
from retrv_r1_retriever.prompt import CHECK_CUE, Prompt, query_segments
from retrv_r1_retriever.trace import Compressed, Sampled, Segment, Text
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query
from retrv_r1_training.base import DESCRIBE
from retrv_r1_training.data import Item, Pool
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
        items = [pool.items[i] for part in picks for i in part]
        hidden, batch = _forward(model, processor, [q.query for q in queries], items, cache)
        fine_ids = {i for item in items for w in Caption.of(item.caption).fine for i in processor.tokenise(f" {w}")}
        fine = torch.isin(batch.input_ids, torch.tensor(sorted(fine_ids))) & batch.sampled
        weight = batch.sampled.float() * torch.where(fine, 0.5, 1.0)
        coarse = accuracy(model, hidden, batch.input_ids, batch.sampled & ~fine)
        metrics = {"coarse": coarse, "fine": accuracy(model, hidden, batch.input_ids, fine)}
        return weighted_ce(model, hidden, batch.input_ids, weight), metrics

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


def _forward(
    model: RetrvR1ForConditionalGeneration, processor: Processor, queries: Sequence[Query], items: Sequence[Item],
    cache: dict[int, Tensor],
) -> tuple[Tensor, Batch]:  # fmt: skip
    """One row per candidate: its two tokens where the full ones would stand, "Describe:", its caption. `items` holds the
    candidates of each query in turn; the queries stay outside the rows, only their T_q is used.

    One candidate a row and no label tag: the frozen LM has never described one picture among several, and labels mean
    nothing to it yet.
    """
    inner = model.model
    batch = collate([_chunk(processor, item) for item in items], processor, model.device)
    memories = [inner.icm.memory(e) for e in content_embeds(model, processor, [i.content for i in items], cache)]
    memory = pad_sequence(memories, batch_first=True)
    mask = torch.arange(memory.shape[1]) < torch.tensor([len(m) for m in memories])[:, None]
    asked = collate([processor.chunk(query_segments(q), Prompt(q, (), ())) for q in queries], processor, model.device)
    with torch.no_grad():
        features = encode_pictures(inner, processor, asked.pictures)
        query_embeds = inner.embed(asked.input_ids, features, asked.image_mask, None)
    query, query_mask = inner.query_rows(query_embeds, asked.compressed.query_mask)
    row = torch.arange(len(queries)).repeat_interleave(len(items) // len(queries))
    tokens = inner.icm(memory, mask, query, query_mask, row)
    embeds = inner.place(inner.get_input_embeddings()(batch.input_ids), batch.compressed, *tokens)
    hidden = inner.language_model(
        inputs_embeds=embeds, position_ids=batch.positions, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    return hidden, batch


def _chunk(processor: Processor, item: Item) -> Chunk:
    nothing = Memory(np.zeros((1, 1), np.float16), "", "", 0)  # the rows are made with gradient, in `_forward`
    prompt = Prompt(Query(item.content), (Candidate(Document("", item.content), None, 1, nothing),), ())
    picture = item.content.image is not None
    shown: tuple[Segment, ...] = (Text(VISION_START), Compressed(0), Text(VISION_END)) if picture else (Compressed(0),)
    return processor.chunk((*shown, Text(CHECK_CUE), DESCRIBE, Sampled(f" {item.caption}")), prompt)
