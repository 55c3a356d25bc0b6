"""Stage `direct`: the answer in one pass, before any thought is taught. The language model learns to point.

Pointing is two skills that are nothing without each other: to find the candidate whose relation token says yes, and to say its
label. Lists therefore grow from one candidate, where only the label is to be said, to K; and labels are drawn from all 127.
Frozen: as in `sft`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Chunk, Processor
from retrv_r1_retriever.prompt import ANSWER_START, NONE_INDEX
from retrv_r1_retriever.trace import Text
from retrv_r1_training.base import comparison_loss
from retrv_r1_training.lists import Contrast, Lists, contrast, largest_list, prompt_of, spread_labels
from retrv_r1_training.loop import Schedule, train
from retrv_r1_training.loss import hidden_states
from retrv_r1_training.sft import freeze_for_sft, mask_embedding_gradient

#: Largest list, by the share of the steps done.
GROWTH = ((0.25, 1), (0.4, 2), (0.6, 8))
NONE_SHARE = 0.1  # of the lists, whose positive is taken out
MAX_PROMPTS = 4  # times the batch size, when lists are short


def train_direct(
    model: RetrvR1ForConditionalGeneration, processor: Processor, lists: Sequence[Lists], config: Contrast,
    schedule: Schedule, rehearsal: int, seed: int, log_file: Path,
) -> None:  # fmt: skip
    """`batch_size` prompts of K candidates a step, more of shorter ones. The last of `lists` is for validation."""
    rng = random.Random(seed)
    captions = [item.caption for part in lists for item in part.pool.items]
    freeze_for_sft(model)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        size = list_size(step / schedule.steps, config.top_k, rng)
        part = rng.choice(lists[:-1])
        count = schedule.batch_size * min(MAX_PROMPTS, config.top_k // size)
        numbers = [rng.randrange(len(part.pool.queries)) for _ in range(count)]
        loss, right = _loss(
            model, processor, [sample(processor, part, n, replace(config, top_k=size), rng) for n in numbers]
        )
        drill, more = comparison_loss(model, processor, captions, rehearsal, rng)
        return loss + drill, {"size": float(size), "direct": right} | more

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        held_out, rng = lists[-1], random.Random(0)
        numbers = rng.sample(range(len(held_out.pool.queries)), min(100, len(held_out.pool.queries)))
        samples = [sample(processor, held_out, n, config, rng, spread=False) for n in numbers]
        return {"val_direct": _loss(model, processor, samples)[1]}

    train(
        "direct",
        schedule,
        model.parameters(),
        loss_fn,
        log_file,
        lambda: mask_embedding_gradient(model, processor),
        evaluate,
    )


def list_size(progress: float, top_k: int, rng: random.Random) -> int:
    """Between a quarter of the largest list allowed by now and all of it."""
    largest = largest_list(GROWTH, progress, top_k)
    return rng.randint(max(1, largest // 4), largest)


def sample(
    processor: Processor, lists: Lists, number: int, config: Contrast, rng: random.Random, spread: bool = True
) -> tuple[Chunk, int]:
    """A prompt up to `<answer>`, and the slot to say among all 128."""
    chosen = contrast(lists.pool, number, lists.ranked[number].tolist(), config, rng)
    positive = chosen[0]
    if len(chosen) > 1 and rng.random() < NONE_SHARE:
        chosen = chosen[1:]
    rng.shuffle(chosen)
    labels = spread_labels(len(chosen), rng) if spread else list(range(len(chosen)))
    prompt = prompt_of(lists, number, chosen, labels)
    chunk = processor.chunk((*prompt.segments, Text(ANSWER_START)), prompt)
    return chunk, labels[chosen.index(positive)] if positive in chosen else NONE_INDEX


def _loss(
    model: RetrvR1ForConditionalGeneration, processor: Processor, samples: Sequence[tuple[Chunk, int]]
) -> tuple[Tensor, float]:
    """Mean -log p(slot) over all slots, shown or not, and how often the arg-max is right."""
    hidden, _ = hidden_states(model, processor, [chunk for chunk, _ in samples])
    last = torch.tensor([len(chunk) - 1 for chunk, _ in samples])
    logits = model.lm_head(hidden[torch.arange(len(samples)), last]).float()[:, torch.tensor(processor.slot_ids)]
    target = torch.tensor([slot for _, slot in samples])
    return F.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean().item()
