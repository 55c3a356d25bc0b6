"""One forward for all language-model stages, and the weighted cross-entropy on sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Batch, Chunk, Processor, collate
from retrv_r1_retriever.prompt import ANSWER_START, DIFFERS, INSPECT_END, INSPECT_START, MATCH
from retrv_r1_training.checks import check_ranges


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Loss weights by the role of a sampled token; ours (the paper does not weight).

    The few tokens that decide (verdicts, marks, whether to inspect, the answer) are rare beside those that copy.
    """

    default: float = 1.0
    list_label: float = 0.3  # the labels of the elimination come in order
    verdict: float = 2.0
    inspect: float = 3.5
    inspect_end: float = 0.1  # follows every label that was opened
    mark: float = 2.5
    conclusion: float = 3.0
    answer: float = 2.2

    def __post_init__(self) -> None:
        check_ranges(self, {"0 or more": " ".join(f.name for f in fields(self))})


def hidden_states(
    model: RetrvR1ForConditionalGeneration, processor: Processor, chunks: Sequence[Chunk]
) -> tuple[Tensor, Batch]:
    """Last hidden states (B, L, H) of right-padded chunks."""
    batch = collate(chunks, processor, model.device)
    features = encode_pictures(model.model, processor, batch.pictures)
    embeds = model.model.embed(batch.input_ids, features, batch.image_mask, batch.compressed)
    out = model.model.language_model(
        inputs_embeds=embeds, position_ids=batch.positions, attention_mask=batch.attention_mask, use_cache=False
    )
    return out.last_hidden_state, batch


def token_weights(batch: Batch, processor: Processor, weights: TokenWeights) -> Tensor:
    """(B, L) weight of predicting each token; 0 for what was not sampled. The role follows from the token before."""
    ids, previous = batch.input_ids, F.pad(batch.input_ids[:, :-1], (1, 0))
    before = F.pad(previous[:, :-1], (1, 0))
    slots = torch.tensor(processor.slot_ids, device=ids.device)
    start, end = processor.token_id(INSPECT_START), processor.token_id(INSPECT_END)
    marks = torch.tensor([i for w in ("same", "diff") for i in processor.tokenise(f" {w}")], device=ids.device)
    conclusions = torch.tensor([i for w in (MATCH, DIFFERS) for i in processor.tokenise(f" {w}")], device=ids.device)
    is_label, after_label = torch.isin(ids, slots), torch.isin(previous, slots)
    out = torch.full(ids.shape, weights.default, device=ids.device)
    out[is_label] = weights.list_label
    out[after_label & (before != start)] = weights.verdict
    out[torch.isin(ids, marks)] = weights.mark
    out[torch.isin(ids, conclusions)] = weights.conclusion
    out[(ids == start) | (previous == start)] = weights.inspect
    out[ids == end] = weights.inspect_end
    out[previous == processor.token_id(ANSWER_START)] = weights.answer
    return out * batch.sampled


def weighted_ce(model: RetrvR1ForConditionalGeneration, hidden: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of -log p(token | before); logits only where a weight is not 0."""
    weight = weight[:, 1:]
    picked = weight > 0
    logits = model.lm_head(hidden[:, :-1][picked]).float()
    losses = F.cross_entropy(logits, ids[:, 1:][picked], reduction="none")
    return (losses * weight[picked]).sum() / weight[picked].sum()


def of_each_sequence(sampled: Tensor) -> Tensor:
    """(B, L) weights that make `weighted_ce` a mean over sequences of each one's mean: unlike a mean over tokens it is the same
    however a batch is cut into micro-batches and processes. sampled (B, L) bool, some in every row"""
    return sampled / sampled.sum(1, keepdim=True)


@torch.no_grad()
def accuracy(model: RetrvR1ForConditionalGeneration, hidden: Tensor, ids: Tensor, picked: Tensor) -> float:
    """Share of the tokens at `picked` (B, L) bool that are the arg-max."""
    picked = picked[:, 1:]
    if not picked.any():
        return float("nan")
    logits: Tensor = model.lm_head(hidden[:, :-1][picked])
    return (logits.argmax(-1) == ids[:, 1:][picked]).float().mean().item()
