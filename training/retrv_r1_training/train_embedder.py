"""`retrv-r1-train embedder`: a first stage from the backbone's last-token embedding, by contrast with wrong candidates.

Every query of a step, over all processes, competes with the candidates of all others. The batch is read in parts whose activations
are made again in the backward pass (gradient caching, Gao et al. 2021, arXiv 2101.06983), so its size costs time and no memory.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint

from retrv_r1_retriever.errors import ImageError
from retrv_r1_retriever.evaluation.mbeir import MODALITIES, modality_of
from retrv_r1_retriever.model.checkpoint import Manifest, save_checkpoint
from retrv_r1_retriever.model.embedding import BackboneEmbedder, embed_chunks, embedding_chunk
from retrv_r1_retriever.model.modeling import RetrvR1Model
from retrv_r1_retriever.model.processing import Chunk, EncodedImage, Processor
from retrv_r1_retriever.types import Content, Query
from retrv_r1_training.adapters import language_model_only, load_trained, merged
from retrv_r1_training.data import encode
from retrv_r1_training.draws import Contrasted, Contrasts, Opened, Source
from retrv_r1_training.embedder import info_nce
from retrv_r1_training.processes import is_first, world
from retrv_r1_training.run_folder import finish
from retrv_r1_training.stage_recipe import EmbedderRecipe
from retrv_r1_training.stage_run import Figures, Work, dtype_of, load_start, train
from retrv_r1_training.trl_sft import SftModel
from retrv_r1_training.unreadable import Chosen

log = logging.getLogger(__name__)


def train_embedder(recipe: EmbedderRecipe, run: Path) -> Path:
    """Train or resume in folder `run`; returns the checkpoint: the start's, with the trained embedder inside."""
    torch.manual_seed(recipe.seed)
    start = load_start(recipe.start, recipe.run.dtype)
    files, dim = Opened(recipe.data), recipe.dim or start.model.config.text_config.hidden_size
    model = language_model_only(SftModel.of(start.model), recipe.tune, recipe.lora, recipe.run.deepspeed is not None)
    objective = Objective(start.processor, dim, recipe.temperature, recipe.optim.per_device, recipe.across_modalities)
    measure = None
    if files.validated:
        held_out = _contrasts(recipe, files.validation).draws(files.validated, 0).readable(recipe.data.max_bad_share)
        measure = Measure(recipe, start.processor, dim, files.validation, held_out)
    count = recipe.optim.steps * recipe.optim.batch_size
    draws = _contrasts(recipe, files.train).draws(count, recipe.seed, recipe.data.max_bad_share)
    work = Work(start.processor, model, draws, objective, measure)
    state = train(recipe, run, work, per_device=recipe.optim.batch_size // world())
    out = run / "checkpoint"
    if is_first():
        finish(out, lambda aside: export(recipe, state, aside, dim))
    return out


def _contrasts(recipe: EmbedderRecipe, sources: Sequence[Source]) -> Contrasts:
    return Contrasts(sources, recipe.hard_negatives, recipe.hard_negatives, recipe.depth)


def export(recipe: EmbedderRecipe, state: dict[str, Tensor], out: Path, dim: int) -> Manifest:
    """The start with the embedder inside; model and memory stay what they were."""
    trained = load_start(recipe.start, "float32", "cpu")
    model = language_model_only(trained.model, recipe.tune, recipe.lora)
    load_trained(model, state)
    embedder = merged(model)
    start = load_start(recipe.start, "float32", "cpu")
    manifest = replace(start.manifest, embedder_dim=dim)
    return save_checkpoint(out, start.model, start.processor, manifest, embedder, dtype_of(recipe))


@dataclass(frozen=True)
class Objective:
    """InfoNCE over all candidates of the step. A candidate that is right for a query never counts against it."""

    processor: Processor
    dim: int
    temperature: float
    at_once: int
    across_modalities: bool

    def __call__(self, net: SftModel, examples: Sequence[Contrasted]) -> tuple[Tensor, Figures]:
        contents: list[Query | Content] = [e.query for e in examples]
        contents += [item.content for e in examples for item in e.items]
        chunks = [embedding_chunk(self.processor, content) for content in contents]
        vectors = embed_in_parts(net.model, self.processor, chunks, self.dim, self.at_once)
        queries, candidates = vectors[: len(examples)], over_all(vectors[len(examples) :])
        right, allowed = competition(examples, self.across_modalities, vectors.device)
        loss, hit = info_nce(queries, candidates, right, allowed, 1 / self.temperature)
        return loss, {"accuracy": hit.float().mean().item(), "candidates": allowed.sum(1).float().mean().item()}


def embed_in_parts(
    model: RetrvR1Model, processor: Processor, chunks: Sequence[Chunk], dim: int, at_once: int
) -> Tensor:
    """`embed_chunks` with the activations of `at_once` chunks at a time: each part is computed again when its gradient is due.

    Pictures pass the frozen tower once, before.
    """
    order = sorted(range(len(chunks)), key=lambda i: len(chunks[i]))  # alike lengths together: little padding
    parts = []
    for start in range(0, len(order), at_once):
        part = [_encoded(model, processor, chunks[i]) for i in order[start : start + at_once]]
        parts.append(checkpoint(embed_chunks, model, processor, part, dim, use_reentrant=False))
    back = torch.empty(len(order), dtype=torch.long)
    back[order] = torch.arange(len(order))
    return torch.cat(parts)[back.to(parts[0].device)]


def _encoded(model: RetrvR1Model, processor: Processor, chunk: Chunk) -> Chunk:
    raw = [p for p in chunk.pictures if not isinstance(p, EncodedImage)]
    return replace(chunk, pictures=tuple(encode(model, processor, raw))) if raw else chunk


def competition(examples: Sequence[Contrasted], across_modalities: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns of the own positives (n,), and which candidates of all processes compete (n, m) bool.

    Left out are other right answers of the query, and candidates of other modalities than the positive's unless asked for.
    """
    items = [item for e in examples for item in e.items]
    keys = over_all(torch.tensor([_key(item.id) for item in items], device=device)).cpu()
    kinds = over_all(torch.tensor([MODALITIES.index(item.modality) for item in items], device=device)).cpu()
    width = len(examples[0].items)
    right = torch.arange(len(examples)) * width + (dist.get_rank() * len(items) if _spread() else 0)
    wrong = [~torch.isin(keys, torch.tensor([_key(did) for did in e.right])) for e in examples]
    allowed = torch.stack(wrong)
    if not across_modalities:
        allowed &= kinds[None] == kinds[right][:, None]
    allowed[torch.arange(len(examples)), right] = True
    return right.to(device), allowed.to(device)


def _key(did: str) -> int:
    """Ids travel between processes as numbers."""
    return int.from_bytes(blake2b(did.encode(), digest_size=8).digest(), "big", signed=True)


def _spread() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def over_all(rows: Tensor) -> Tensor:
    """Rows of all processes in order of their ranks; gradients find their way back."""
    if not _spread():
        return rows
    if rows.requires_grad:
        return torch.cat(all_gather(rows))  # type: ignore[no-untyped-call]  # torch leaves it without types
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@dataclass(frozen=True)
class Measure:
    """Recall@k on held-out queries: the first right answer among `pool` candidates of its modality."""

    recipe: EmbedderRecipe
    processor: Processor
    dim: int
    sources: Sequence[Source]
    held_out: Chosen[Contrasted]

    def __call__(self, net: SftModel) -> Figures:
        examples = [self.held_out[n] for n in range(len(self.held_out))]
        items = {item.id: (item.modality, item.content) for e in examples for item in e.items}
        rng = random.Random(0)
        for n in range(self.recipe.pool - len(items)):
            source = self.sources[n % len(self.sources)]
            document = source.data.pool[rng.randrange(len(source.data.pool))]
            if document.id in items:
                continue
            try:
                items[document.id] = (modality_of(document), source.load([document.content])[0])
            except ImageError as error:  # one candidate fewer: `candidates` says how many there were
                log.warning("validation: left out of the pool: %s", error)
        embedder = BackboneEmbedder(net.model, self.processor, self.dim, self.recipe.optim.per_device)
        queries = embedder.embed([e.query for e in examples])
        candidates = embedder.embed([content for _, content in items.values()])
        return recall(examples, queries @ candidates.T, list(items), [kind for kind, _ in items.values()])


def recall(
    examples: Sequence[Contrasted], scores: np.ndarray, ids: Sequence[str], kinds: Sequence[str], at: Sequence[int] = (1, 5, 20)
) -> Figures:  # fmt: skip
    """Share of the queries with a right answer among the first k. scores (queries, candidates)."""
    places = []
    for example, row in zip(examples, scores, strict=True):
        same = np.array([kind == example.items[0].modality for kind in kinds])
        right = np.array([id in example.right for id in ids]) & same
        best = row[right].max()
        places.append(int((row[same & ~right] >= best).sum()))
    figures = {f"recall@{k}": float(np.mean([place < k for place in places])) for k in at}
    return figures | {"candidates": float(len(ids))}
