"""Stage `sft`: the language model learns the thought over K compressed candidates, and the direct answer beside it.

Both are trained in one pass: behind the last column of a sequence stands one more token, `<answer>`, that sees the prompt only. Its
prediction is the direct read exactly as `Engine.probe` makes it, for the price of a single token.

Frozen: tower, embedding table (slot rows excepted) and the module's in_proj, so that stored memories stay valid.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Batch, Chunk, Processor, collate
from retrv_r1_retriever.parser import Thought, render
from retrv_r1_retriever.prompt import ADDED_TOKENS, ANSWER_START, ASSISTANT, CHECK_CUE, NONE_INDEX, Prompt
from retrv_r1_retriever.trace import Full, Sampled, Segment
from retrv_r1_training.base import comparison_loss
from retrv_r1_training.checks import check_ranges
from retrv_r1_training.lists import ListConfig, Lists, candidate_list, prompt_of, spread_labels
from retrv_r1_training.loop import Schedule, train
from retrv_r1_training.loss import TokenWeights, token_weights
from retrv_r1_training.memory_training import learns_memory
from retrv_r1_training.ranknet import ranknet, teacher_ranks
from retrv_r1_training.teacher import TeacherStyle, wanted, write_thought


@dataclass(frozen=True, slots=True)
class Example:
    """prompt and turn as chunks; target: slot index of the direct read (K = none); verdicts: by candidate.

    also: other slots that are right too, which the direct read may answer as well
    ranks: of each slot, 1 = best, 0 = takes no part (`ranknet.teacher_ranks`); direct: whether the direct read learns from it
    """

    prompt: Chunk
    turn: Chunk
    target: int
    slots: tuple[str, ...]
    verdicts: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    direct: bool = True
    also: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SftLoss:
    """Weights of the parts of one loss. All but `ranknet` are ours, not the paper's, which has the thought alone.

    answer: of the thought's answer, as a mean of its own: one token among a hundred would lose to the direct read, which ends
        in the same token
    ranknet: of the weighted RankNet loss on the direct read, beside `direct`; FIRST's is 10, 0 = none
    """

    tokens: TokenWeights = field(default_factory=TokenWeights)
    answer: float = 1.0
    direct: float = 0.7
    relation: float = 1.0
    ranknet: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(self, {"0 or more": "answer direct relation ranknet"})


@dataclass(frozen=True, slots=True)
class Totals:
    """What the parts of a loss are divided by: token weights, those after `<answer>`, direct reads, candidates.

    Totals of a whole optimiser step make a sum over micro-batches and processes equal to one large batch.
    """

    tokens: float
    answers: float
    direct: float
    candidates: float

    @classmethod
    def of(cls, examples: Sequence[Example], processor: Processor, loss: SftLoss) -> Totals:
        batch = collate([Chunk.join([e.prompt, e.turn]) for e in examples], processor)
        return cls.of_batch(batch, examples, processor, loss)

    @classmethod
    def of_batch(cls, batch: Batch, examples: Sequence[Example], processor: Processor, loss: SftLoss) -> Totals:
        weight = token_weights(batch, processor, loss.tokens)
        answers = weight * _after_answer(batch, processor)
        return cls(
            weight[:, 1:].sum().item(), answers[:, 1:].sum().item(), float(sum(e.direct for e in examples)),
            float(sum(len(e.verdicts) for e in examples)),
        )  # fmt: skip


def make_example(
    processor: Processor, lists: Lists, number: int, config: ListConfig, style: TeacherStyle | None, rng: random.Random
) -> Example:
    """One training example. style None: the turn ends after the elimination (the cheap first part of the curriculum)."""
    query = lists.pool.queries[number]
    chosen, target = candidate_list(lists, number, config, rng)
    labels = spread_labels(len(chosen), rng) if rng.random() < config.spread else list(range(len(chosen)))
    prompt = prompt_of(lists, number, chosen, labels)
    captions = {at: lists.pool.captions[i] for at, i in zip(labels, chosen, strict=True)}
    answer = None if target is None else labels[target]
    thought = write_thought(captions, wanted(query), answer, rng, style or TeacherStyle())
    turn = _elimination(thought) if style is None else filled(render(thought), prompt)
    return example_of(processor, prompt, thought, turn)


def example_of(
    processor: Processor, prompt: Prompt, thought: Thought, turn: Sequence[Segment], also: tuple[int, ...] = ()
) -> Example:
    """`turn` over `prompt`; the direct read is to answer as `thought` does."""
    head = processor.chunk(prompt.segments, prompt)
    tail = processor.chunk(turn, prompt, head.next_position)
    verdicts = tuple(v.text for v in sorted(thought.verdicts, key=lambda v: v.index))
    slot = len(prompt.candidates) if thought.answer in (None, NONE_INDEX) else thought.answer
    assert slot is not None
    ranks = teacher_ranks(len(prompt.slots), thought.verdicts, (slot, *also))
    return Example(head, tail, slot, prompt.slots, verdicts, ranks, also=also)


def _elimination(thought: Thought) -> tuple[Segment, ...]:
    forced, sampled = render(replace(thought, checks=()))[:2]
    assert isinstance(sampled, Sampled)
    return forced, Sampled(sampled.text.removesuffix("</think>"))


def filled(turn: Sequence[Segment], prompt: Prompt) -> tuple[Segment, ...]:
    """Opened candidates with their contents."""
    contents = [c.document.content for c in prompt.candidates]
    return tuple(Full(s.index, contents[s.index]) if isinstance(s, Full) else s for s in turn)


def forward_with_direct_read(
    model: RetrvR1ForConditionalGeneration, processor: Processor, examples: Sequence[Example]
) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """Hidden states of the sequences (B, L, H) and of the `<answer>` branch (B, H), and the input embeddings (B, L, H)."""
    batch = collate([Chunk.join([e.prompt, e.turn]) for e in examples], processor, model.device)
    features = encode_pictures(model.model, processor, batch.pictures)
    embeds = model.model.embed(batch.input_ids, features, batch.image_mask, batch.compressed)
    opener = torch.tensor([processor.token_id(ANSWER_START)], device=embeds.device)
    branch = model.model.get_input_embeddings()(opener).expand(len(examples), 1, -1)
    prompts = torch.tensor([len(e.prompt) for e in examples], device=embeds.device)
    at = torch.tensor([e.prompt.next_position for e in examples], device=embeds.device)
    length = embeds.shape[1]
    columns = torch.arange(length + 1, device=embeds.device)
    lengths = batch.attention_mask.sum(1)
    mask = (columns[None] <= columns[:, None])[None] & (columns < lengths[:, None])[:, None]
    mask[:, length] = (columns < prompts[:, None]) | (columns == length)
    mask |= torch.eye(
        length + 1, dtype=torch.bool, device=embeds.device
    )  # padding rows see themselves: no empty softmax
    out = model.model.language_model(
        inputs_embeds=torch.cat([embeds, branch], dim=1),
        position_ids=torch.cat([batch.positions, at[None, :, None].expand(3, -1, 1)], dim=2),
        attention_mask={"full_attention": mask[:, None]},
        use_cache=False,
    ).last_hidden_state
    return out[:, :length], out[:, length], embeds, batch


def relation_loss(
    model: RetrvR1ForConditionalGeneration,
    processor: Processor,
    embeds: Tensor,
    batch: Batch,
    examples: Sequence[Example],
) -> tuple[Tensor, float]:
    """What two tokens say of a candidate's relation to the query, without the query beside them: its verdict (and how often right).

    The sum over candidates of -log p(verdict).

    One row per candidate: content token, relation token, the check's cue -> the verdict's first token. Without this the relation
    token learns from the far end of a thought only, and the direct read, which has no thought, finds nothing in it.
    """
    flat = embeds.flatten(0, 1)
    pairs = torch.stack([flat[batch.compressed.content_at], flat[batch.compressed.relation_at]], dim=1)
    cue = model.model.get_input_embeddings()(torch.tensor(processor.tokenise(CHECK_CUE), device=flat.device))
    rows = torch.cat([pairs, cue.expand(len(pairs), -1, -1)], dim=1)
    positions = torch.arange(rows.shape[1], device=flat.device).expand(3, len(rows), -1)
    hidden = model.model.language_model(inputs_embeds=rows, position_ids=positions, use_cache=False).last_hidden_state
    return _verdict_loss(model, processor, hidden[:, -1], examples)


def reading_loss(
    model: RetrvR1ForConditionalGeneration, processor: Processor, hidden: Tensor, examples: Sequence[Example]
) -> tuple[Tensor, float]:
    """The same of candidates in full: what has been read at a candidate's last token says its verdict. hidden (B, L, H)

    Without this a thought over such a list learns its verdicts late, if at all (docs/experiments.md).
    """
    slots, closing = processor.slot_ids, len(processor.tokenise(ASSISTANT))
    rows, columns = [], []
    for row, example in enumerate(examples):
        starts = np.flatnonzero(np.isin(example.prompt.ids, slots))  # labels: no foreign text has one
        columns += [*(starts[1:] - 1), len(example.prompt) - closing - 1]
        rows += [row] * len(starts)
    return _verdict_loss(model, processor, hidden[rows, columns], examples)


def _verdict_loss(
    model: RetrvR1ForConditionalGeneration, processor: Processor, read: Tensor, examples: Sequence[Example]
) -> tuple[Tensor, float]:
    """read (candidates, H): the sum of -log p(first token of each one's verdict), and how often that is the arg-max."""
    words = [processor.tokenise(f" {v}")[0] for e in examples for v in e.verdicts]
    target = torch.tensor(words, device=read.device)
    logits = model.lm_head(read).float()
    return F.cross_entropy(logits, target, reduction="sum"), (logits.argmax(-1) == target).float().mean().item()


def direct_read_loss(
    model: RetrvR1ForConditionalGeneration, processor: Processor, branch: Tensor, examples: Sequence[Example], weights: SftLoss
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weighted sum of -log p(a right slot) over exactly the slots of each prompt and of RankNet, and whether the arg-max is right (B,)."""
    logits = model.lm_head(branch).float()
    losses, hits = [], []
    for row, example in zip(logits, examples, strict=True):
        slots = torch.tensor([processor.token_id(s) for s in example.slots], device=row.device)
        right = [example.target, *example.also]
        loss = -weights.direct * torch.logsumexp(F.log_softmax(row[slots], dim=0)[right], dim=0)
        if weights.ranknet:
            loss = loss + weights.ranknet * ranknet(row[slots], example.ranks)
        losses.append(loss * example.direct)
        hits.append(torch.isin(row[slots].argmax(), torch.tensor(right, device=row.device)))
    return torch.stack(losses).sum(), torch.stack(hits)


def train_sft(
    model: RetrvR1ForConditionalGeneration, processor: Processor, lists: Sequence[Lists], held_out: Lists,
    config: ListConfig, style: TeacherStyle | None, schedule: Schedule, rehearsal: int, direct_weight: float, seed: int,
    log_file: Path, name: str, tokens: TokenWeights = TokenWeights(),
) -> None:  # fmt: skip
    """rehearsal: text-only comparison sequences beside every batch, or the comparison is forgotten."""
    rng = random.Random(seed)
    captions = [item.caption for part in lists for item in part.pool.items]
    weights = SftLoss(tokens, direct=direct_weight)
    freeze_for_sft(model)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        examples = []
        for _ in range(schedule.batch_size):
            part = rng.choice(lists)
            examples.append(make_example(processor, part, rng.randrange(len(part.pool.queries)), config, style, rng))
        loss, metrics, _ = losses(model, processor, examples, weights)
        drill, more = comparison_loss(model, processor, captions, rehearsal, rng)
        return loss + drill, metrics | {"length": float(len(examples[0].turn) + len(examples[0].prompt))} | more

    held = [make_example(processor, held_out, i, ListConfig.as_served(config.top_k), style, random.Random(i))
            for i in range(0, len(held_out.pool.queries), 6)]  # fmt: skip
    strata = [held_out.pool.queries[i].stratum for i in range(0, len(held_out.pool.queries), 6)]

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        parts = [losses(model, processor, held[i : i + 50], weights) for i in range(0, len(held), 50)]
        out = {f"val_{k}": _mean([p[1][k] for p in parts]) for k in parts[0][1]}
        hits = torch.cat([p[2] for p in parts])
        for stratum in ("coarse", "fine"):
            rows = [h.item() for h, s in zip(hits, strata, strict=True) if s == stratum]
            out[f"val_direct_{stratum}"] = float(np.mean(rows))
        return out

    train(
        name,
        schedule,
        model.parameters(),
        loss_fn,
        log_file,
        lambda: mask_embedding_gradient(model, processor),
        evaluate,
    )


def losses(
    model: RetrvR1ForConditionalGeneration, processor: Processor, examples: Sequence[Example], weights: SftLoss,
    totals: Totals | None = None,
) -> tuple[Tensor, dict[str, float], Tensor]:  # fmt: skip
    """The loss of `sft` (the miniature's and TRL's), metrics, and whether each direct read is right (B,).

    totals: what to divide by; None = those of these examples
    """
    hidden, branch, embeds, batch = forward_with_direct_read(model, processor, examples)
    totals = totals or Totals.of_batch(batch, examples, processor, weights)
    weight, after_answer = token_weights(batch, processor, weights.tokens), _after_answer(batch, processor)
    picked = weight[:, 1:] > 0
    logits = model.lm_head(hidden[:, :-1][picked]).float()
    wanted = batch.input_ids[:, 1:][picked]
    by_token = F.cross_entropy(logits, wanted, reduction="none") * weight[:, 1:][picked]
    right = (logits.argmax(-1) == wanted).float()
    of_answer = after_answer[:, 1:][picked]
    loss = by_token.sum() / totals.tokens
    if totals.answers:
        loss = loss + weights.answer * (by_token * of_answer).sum() / totals.answers
    direct, hits = direct_read_loss(model, processor, branch, examples, weights)
    if totals.direct:
        loss = loss + direct / totals.direct
    role, roles = token_weights(batch, processor, TokenWeights())[:, 1:][picked], TokenWeights()
    masks = {"words": role == roles.default, "verdicts": role == roles.verdict, "inspect": role == roles.inspect,
             "marks": role == roles.mark, "conclusion": role == roles.conclusion, "answer": of_answer}  # fmt: skip
    metrics = {k: right[mask].mean().item() for k, mask in masks.items()} | {"direct": hits.float().mean().item()}
    if weights.relation:
        if len(batch.compressed.content_at):
            relation, metrics["relation"] = relation_loss(model, processor, embeds, batch, examples)
        else:
            relation, metrics["relation"] = reading_loss(model, processor, hidden, examples)
        loss = loss + weights.relation * relation / totals.candidates
    return loss, metrics, hits


def _after_answer(batch: Batch, processor: Processor) -> Tensor:
    """(B, L) bool: the sampled token behind `<answer>`."""
    return (F.pad(batch.input_ids[:, :-1], (1, 0)) == processor.token_id(ANSWER_START)) & batch.sampled


def _mean(values: Sequence[float]) -> float:
    """Over the batches that had such tokens at all."""
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def freeze_for_sft(model: RetrvR1ForConditionalGeneration) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(False)
    for parameter in model.model.icm.in_proj.parameters():
        parameter.requires_grad_(learns_memory(model))
    model.get_input_embeddings().weight.no_decay = True


def mask_embedding_gradient(model: RetrvR1ForConditionalGeneration, processor: Processor) -> None:
    """Only the added tokens' rows learn: candidate memory is made from all the others."""
    gradient = model.get_input_embeddings().weight.grad
    if gradient is not None:
        kept = torch.zeros(len(gradient), 1, device=gradient.device)
        kept[[processor.token_id(t) for t in ADDED_TOKENS]] = 1
        gradient.mul_(kept)
