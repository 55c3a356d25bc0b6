"""A peer: the same backbone as a pointwise cross-encoder, one candidate in full at a time, its label or none. K prompts for a list of K."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Chunk, Processor
from retrv_r1_retriever.prompt import ANSWER_START
from retrv_r1_retriever.trace import Text
from retrv_r1_training.base import comparison_loss
from retrv_r1_training.lists import Lists, prompt_of
from retrv_r1_training.loop import Schedule, train
from retrv_r1_training.loss import hidden_states
from retrv_r1_training.quality import Quality, by_stratum
from retrv_r1_training.sft import freeze_for_sft, mask_embedding_gradient

PAIRS = 8  #: per prompt of the listwise stages' batch: about as many tokens


def train_pointwise(
    model: RetrvR1ForConditionalGeneration, processor: Processor, lists: Sequence[Lists], schedule: Schedule, rehearsal: int,
    seed: int, log_file: Path,
) -> None:  # fmt: skip
    """Half of the candidates are right, the others from the first stage's list. The last of `lists` is for validation.

    rehearsal: as in `sft.train_sft`
    """
    rng = random.Random(seed)
    captions = [item.caption for part in lists for item in part.pool.items]
    freeze_for_sft(model)

    def batch(parts: Sequence[Lists], count: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Logit differences and whether each candidate is right."""
        chosen = [_pair(rng.choice(parts), rng) for _ in range(count)]
        return margins(model, processor, [_chunk(processor, *pair) for pair, _ in chosen]), torch.tensor(
            [y for _, y in chosen]
        )

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        margin, right = batch(lists[:-1], PAIRS * schedule.batch_size, rng)
        drill, more = comparison_loss(model, processor, captions, rehearsal, rng)
        loss = F.binary_cross_entropy_with_logits(margin, right.float())
        return loss + drill, {"accuracy": _accuracy(margin, right)} | more

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        return {"val_accuracy": _accuracy(*batch(lists[-1:], 400, random.Random(0)))}

    def mask() -> None:
        mask_embedding_gradient(model, processor)

    train("pointwise", schedule, model.parameters(), loss_fn, log_file, mask, evaluate)


@torch.inference_mode()
def quality(
    model: RetrvR1ForConditionalGeneration, processor: Processor, lists: Lists, top_k: int, together: int = 400
) -> dict[str, Quality]:
    """Candidates by margin, as `quality.quality` measures the others; nothing is thought or opened."""
    model.eval()
    rows = []
    for number, query in enumerate(lists.pool.queries):
        chosen = lists.ranked[number, :top_k].tolist()
        rows += [(query, number, item) for item in chosen]
    scores: list[float] = []
    for start in range(0, len(rows), together):
        chunks = [_chunk(processor, lists, number, item) for _, number, item in rows[start : start + together]]
        scores += margins(model, processor, chunks).tolist()
    found = []
    for start in range(0, len(rows), top_k):
        query, number, first = rows[start]
        order = np.argsort(-np.array(scores[start : start + top_k]), kind="stable")
        items = [rows[start + i][2] for i in order]
        right = lists.pool.target(query)
        best, best_5 = items[0] == right, right in items[:5]
        found.append((query.stratum, [first == right, best, best, best_5, 0, 0, False, 0]))
    return by_stratum(found)


def margins(model: RetrvR1ForConditionalGeneration, processor: Processor, chunks: Sequence[Chunk]) -> Tensor:
    """(n,) logit of the candidate's label above that of none, behind `<answer>`."""
    hidden, _ = hidden_states(model, processor, chunks)
    last = torch.tensor([len(chunk) - 1 for chunk in chunks])
    logits: Tensor = model.lm_head(hidden[torch.arange(len(chunks)), last]).float()
    return logits[:, processor.slot_ids[0]] - logits[:, processor.slot_ids[-1]]


def _pair(lists: Lists, rng: random.Random) -> tuple[tuple[Lists, int, int], bool]:
    number = rng.randrange(len(lists.pool.queries))
    positive = lists.pool.target(lists.pool.queries[number])
    wrong = [i for i in lists.ranked[number].tolist() if i != positive]
    right = rng.random() < 0.5
    return (lists, number, positive if right else rng.choice(wrong)), right


def _chunk(processor: Processor, lists: Lists, number: int, item: int) -> Chunk:
    prompt = prompt_of(replace(lists, full=True), number, [item], [0])
    return processor.chunk((*prompt.segments, Text(ANSWER_START)), prompt)


def _accuracy(margin: Tensor, right: Tensor) -> float:
    return ((margin > 0) == right).float().mean().item()
