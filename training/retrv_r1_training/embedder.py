"""Stage `embedder`: the backbone's last-token embedding by contrast with the other targets of the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrv_r1_retriever.model.embedding import BackboneEmbedder, embed_chunks, embedding_chunk
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_training.base import siblings_of
from retrv_r1_training.data import Pool
from retrv_r1_training.loop import Schedule, train


def train_embedder(
    model: RetrvR1ForConditionalGeneration, processor: Processor, pools: Sequence[Pool], held_out: Pool, dim: int,
    schedule: Schedule, enough: float, seed: int, log_file: Path,
) -> None:  # fmt: skip
    """InfoNCE over the batch, negatives of the target's modality only (as the pool is filtered when searching).

    Any card with the target's coarse words counts as found: an embedding of real pictures does not read what is printed small on
    them either, and telling such cards apart is what the inspection is for.
    enough: mean R@20 of the strata on `held_out` at which it stops: a first stage must leave something to do, and not too much
    """
    rng = random.Random(seed)
    alike = {id(pool): siblings_of(pool) for pool in pools}
    log_scale = nn.Parameter(torch.tensor(2.3))
    for parameter in (*model.model.visual.parameters(), *model.model.icm.parameters()):
        parameter.requires_grad_(False)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pool = rng.choice(pools)
        queries = rng.sample(pool.queries, schedule.batch_size)
        targets = [rng.choice(alike[id(pool)][pool.target(q)]) for q in queries]
        q_chunks = [embedding_chunk(processor, q.query) for q in queries]
        t_chunks = [embedding_chunk(processor, pool.items[t].content) for t in targets]
        q = embed_chunks(model.model, processor, q_chunks, dim)
        t = embed_chunks(model.model, processor, t_chunks, dim)
        ids = torch.tensor([alike[id(pool)][t][0] for t in targets])
        image = torch.tensor([pool.items[t].modality == "image" for t in targets])
        same = (ids[:, None] == ids[None]) & ~torch.eye(len(ids), dtype=torch.bool)
        allowed = (image[:, None] == image[None]) & ~same
        loss, _ = info_nce(q, t, torch.arange(len(ids)), allowed, log_scale.exp())
        return loss, {"scale": log_scale.exp().item()}

    def evaluate() -> dict[str, float]:
        ranks = first_stage_lists(model, processor, held_out, dim, 20)
        return recalls(held_out, ranks)

    def until(found: dict[str, float]) -> bool:
        return (found["coarse_R@20"] + found["fine_R@20"]) / 2 >= enough

    train(
        "embedder", schedule, [*model.parameters(), log_scale], loss_fn, log_file,
        evaluate=evaluate, every=10, until=until,
    )  # fmt: skip


def info_nce(
    queries: Tensor, candidates: Tensor, right: Tensor, allowed: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Mean -log p(right candidate) of each query, and whether it scored best (n,) bool.

    queries (n, d), candidates (m, d), both of norm 1; right (n,): column of the positive; allowed (n, m) bool: what competes
    scale: 1 / temperature
    """
    scores = (scale * queries @ candidates.T).masked_fill(~allowed, -1e9)
    return F.cross_entropy(scores, right), scores.argmax(1) == right


def first_stage_lists(
    model: RetrvR1ForConditionalGeneration, processor: Processor, pool: Pool, dim: int, top_k: int
) -> np.ndarray:
    """(queries, top_k) indices into `pool.items`, best first, within the modality asked for."""
    embedder = BackboneEmbedder(model.model, processor, dim, batch_size=256)
    items = embedder.embed([item.content for item in pool.items])
    queries = embedder.embed([q.query for q in pool.queries])
    model.train()
    out = np.zeros((len(queries), top_k), dtype=np.int64)
    for modality, members in pool.by_modality.items():
        rows = [i for i, q in enumerate(pool.queries) if q.target_modality == modality]
        scores = queries[rows] @ items[list(members)].T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        out[rows] = np.asarray(members)[order]
    return out


def recalls(pool: Pool, lists: np.ndarray) -> dict[str, float]:
    scores: dict[str, float] = {}
    for stratum in ("coarse", "fine"):
        rows = [i for i, q in enumerate(pool.queries) if q.stratum == stratum]
        hit = np.stack([lists[i] == pool.target(pool.queries[i]) for i in rows])
        for k in (1, 5, 20):
            scores[f"{stratum}_R@{k}"] = float(hit[:, :k].any(1).mean())
    return scores
