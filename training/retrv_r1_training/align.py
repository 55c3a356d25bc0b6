"""Stage `align`: only the compression module learns, until the frozen LM says of two tokens what it says of the full ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrv_r1_retriever.demo.catalogue import TASKS, LabelledQuery
from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.icm import pad
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import VISION_END, VISION_START, Batch, Chunk, Processor, collate
from retrv_r1_retriever.prompt import CHECK_CUE, Prompt, query_segments
from retrv_r1_retriever.trace import Compressed, Sampled, Segment, Text
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query
from retrv_r1_training.base import DESCRIBE
from retrv_r1_training.data import Item, Pool, content_embeds
from retrv_r1_training.lists import Contrast, contrast
from retrv_r1_training.loop import Schedule, train
from retrv_r1_training.loss import accuracy, weighted_ce
from retrv_r1_training.teacher import Caption

FINE = 0.2  # of the caption's fine words: two tokens are not meant to keep them
BY_WORD = 3.0  # of the agreement word by word, beside the choice among K


def train_align(
    model: RetrvR1ForConditionalGeneration, processor: Processor, pools: Sequence[Pool], ranked: Sequence[np.ndarray],
    schedule: Schedule, per_query: int, contrast_config: Contrast, seed: int, log_file: Path,
) -> None:  # fmt: skip
    """Each step: describe `per_query` candidates of each query from their two tokens, and tell each query's answer among K.

    The last pool is for validation. ranked: first-stage lists, (queries, K) each.

    content   the frozen LM says the caption; its fine words weigh `FINE`
    relation  a linear reading of the relation token, thrown away afterwards, picks the positive (softmax over K) and says of
              each coarse word whether it agrees, so that a thought can name what contradicts. The LM alone never got the token
              started: equality of two things it cannot yet read gives no gradient (docs/experiments.md)
    """
    rng = random.Random(seed)
    model.requires_grad_(False)
    model.model.icm.requires_grad_(True)
    sample = content_embeds(model, processor, [i.content for i in random.Random(0).sample(pools[0].items, 64)], {})
    norm = float(torch.cat(sample).norm(dim=-1).mean())
    model.model.init_icm(norm)  # as long as what the LM reads in full
    words = max(len(caption.coarse) for pool in pools for caption in pool.captions)
    reading = nn.Linear(model.config.text_config.hidden_size, 1 + words)
    cache: dict[int, Tensor] = {}

    def describe(pool: Pool, queries: Sequence[LabelledQuery], rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        picks = [_pick(pool, pool.target(q), q.target_modality, per_query, rng) for q in queries]
        items = [pool.items[i] for part in picks for i in part]
        chunks = [described(processor, item.content, Sampled(f" {item.caption}")) for item in items]
        tokens = two_tokens(model, processor, [q.query for q in queries], items, cache)
        hidden, batch = read_two_tokens(model, processor, chunks, tokens)
        fine_ids = {i for item in items for w in Caption.of(item.caption).fine for i in processor.tokenise(f" {w}")}
        fine = torch.isin(batch.input_ids, torch.tensor(sorted(fine_ids))) & batch.sampled
        coarse = batch.sampled & ~fine
        parts = (("coarse", coarse), ("fine", fine))
        metrics = {name: accuracy(model, hidden, batch.input_ids, at) for name, at in parts}
        return weighted_ce(model, hidden, batch.input_ids, batch.sampled * torch.where(fine, FINE, 1.0)), metrics

    def tell(
        pool: Pool, numbers: Sequence[int], lists: np.ndarray, rng: random.Random
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The loss, whether each query's answer was picked, and how often each word's agreement was right."""
        chosen = [contrast(pool, n, lists[n].tolist(), contrast_config, rng) for n in numbers]
        items = [pool.items[i] for part in chosen for i in part]
        queries = [pool.queries[n].query for n in numbers]
        read = reading(two_tokens(model, processor, queries, items, cache)[1])
        same = torch.cat([agreement([pool.captions[i] for i in part], words) for part in chosen])
        return relation_loss(read, len(numbers), same)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        at = rng.randrange(len(pools) - 1)
        numbers = rng.sample(range(len(pools[at].queries)), schedule.batch_size)
        content, metrics = describe(pools[at], [pools[at].queries[n] for n in numbers], rng)
        loss, right, more = tell(pools[at], numbers, ranked[at], rng)
        return content + loss, metrics | more | {"relation": right.float().mean().item()}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        held_out, rng = pools[-1], random.Random(0)
        numbers = rng.sample(range(len(held_out.queries)), min(200, len(held_out.queries)))
        queries = [held_out.queries[n] for n in numbers]
        scores = describe(held_out, queries[:64], rng)[1]
        _, picked, more = tell(held_out, numbers, ranked[-1], rng)
        scores, right = scores | more, picked.tolist()
        for task in TASKS:
            of_task = [r for r, q in zip(right, queries, strict=True) if q.task == task]
            scores[f"relation_{task}"] = float(np.mean(of_task))
        return {f"val_{k}": v for k, v in scores.items()}

    parameters = [*model.parameters(), *reading.parameters()]
    train("align", schedule, parameters, loss_fn, log_file, evaluate=evaluate)


def relation_loss(read: Tensor, queries: int, same: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The loss, whether each query's answer was picked (queries,) bool, and how often each word's agreement was right.

    read (queries * K, 1 + words): the linear reading of the relation tokens; of each K the positive comes first, and the module
    sees no order. same (queries * K, words): see `agreement`; None = captions are not aligned by word, or there are none
    """
    scores = read[:, 0].view(queries, -1)
    wanted = torch.zeros(queries, dtype=torch.long, device=scores.device)
    loss, right = F.cross_entropy(scores, wanted), scores.argmax(1) == wanted
    if same is None:
        return loss, right, {}
    said, so = read[:, 1:][~same.isnan()], same[~same.isnan()]
    loss = loss + BY_WORD * F.binary_cross_entropy_with_logits(said, so)
    return loss, right, {"agreement": ((said > 0) == (so > 0)).float().mean().item()}


def agreement(candidates: Sequence[Caption], words: int) -> Tensor:
    """(N, words): 1 where a candidate's coarse word is the first candidate's, 0 where it is not, NaN where either has none."""
    out = torch.full((len(candidates), words), float("nan"))
    want = candidates[0].coarse
    for row, candidate in zip(out, candidates, strict=True):
        same = [float(c == w) for c, w in zip(candidate.coarse, want, strict=False)]
        row[: len(same)] = torch.tensor(same)
    return out


def _pick(pool: Pool, target: int, modality: str, count: int, rng: random.Random) -> list[int]:
    members = pool.by_modality[modality]
    return [target if rng.random() < 0.2 else rng.choice(members) for _ in range(count)]


def two_tokens(
    model: RetrvR1ForConditionalGeneration, processor: Processor, queries: Sequence[Query], items: Sequence[Item],
    cache: dict[int, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Content and relation tokens (N, H) of `items`, which hold equally many candidates of each query in turn."""
    inner = model.model
    memories = inner.icm.memories(content_embeds(model, processor, [i.content for i in items], cache))
    memory, mask = pad(memories)
    asked = collate([processor.chunk(query_segments(q), Prompt(q, (), ())) for q in queries], processor, model.device)
    with torch.no_grad():
        features = encode_pictures(inner, processor, asked.pictures)
        query_embeds = inner.embed(asked.input_ids, features, asked.image_mask, None)
    query, query_mask = inner.query_rows(query_embeds, asked.compressed.query_mask)
    row = torch.arange(len(queries), device=model.device).repeat_interleave(len(items) // len(queries))
    return inner.icm(memory, mask, query, query_mask, row)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around a candidate that is to be described; the default is what our own backbones learn from captions.

    lead: before a caption's first word; cue: the visible text that ends an opened candidate comes before `after`
    """

    before: str = ""
    after: str = DESCRIBE.text
    lead: str = " "
    cue: bool = True

    def around(self, shown: Sequence[Segment]) -> list[Segment]:
        tail = (*((CHECK_CUE,) if self.cue else ()), self.after)
        return [*((Text(self.before),) if self.before else ()), *shown, *(Text(text) for text in tail)]


def described(processor: Processor, content: Content, said: Sampled, frame: Frame = Frame()) -> Chunk:
    """One row: a candidate's two tokens where the full ones would stand, "Describe:", and what is said of it. No query, only T_q
    in the relation token.

    One candidate a row and no label tag: the frozen LM has never described one picture among several, and labels mean
    nothing to it yet.
    """
    nothing = Memory(np.zeros((1, 1), np.float16), "", "", 0)  # the rows are made with gradient, in `two_tokens`
    prompt = Prompt(Query(content), (Candidate(Document("", content), None, 1, nothing),), ())
    picture = content.image is not None
    shown: tuple[Segment, ...] = (Text(VISION_START), Compressed(0), Text(VISION_END)) if picture else (Compressed(0),)
    return processor.chunk((*frame.around(shown), said), prompt)


def read_two_tokens(
    model: RetrvR1ForConditionalGeneration, processor: Processor, chunks: Sequence[Chunk], tokens: tuple[Tensor, Tensor]
) -> tuple[Tensor, Batch]:
    """Last hidden states (B, L, H) of `described` rows with these content and relation tokens (B, H) in place."""
    batch = collate(chunks, processor, model.device)
    inner = model.model
    embeds = inner.place(inner.get_input_embeddings()(batch.input_ids), batch.compressed, *tokens)
    hidden = inner.language_model(
        inputs_embeds=embeds, position_ids=batch.positions, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    return hidden, batch
