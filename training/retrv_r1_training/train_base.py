"""`retrv-r1-train base`: a small backbone and its tokenizer from scratch, on the captions of any M-BEIR folder.

It learns to say a picture's caption and to repeat a text. Where a released backbone fits, start `embedder` and `align` from that instead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from retrv_r1_retriever.evaluation.mbeir import iterate
from retrv_r1_retriever.model.checkpoint import Checkpoint, Manifest, load_checkpoint, save_checkpoint
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_retriever.prompt import CHECK_CUE
from retrv_r1_retriever.types import Content
from retrv_r1_training.adapters import load_trained
from retrv_r1_training.backbone import build_model, build_processor, build_tokenizer
from retrv_r1_training.base import DESCRIBE, FRAME, caption_chunk, caption_loss
from retrv_r1_training.draws import Captioned, Opened, Source
from retrv_r1_training.loss import accuracy
from retrv_r1_training.processes import device, is_first
from retrv_r1_training.run_folder import finish
from retrv_r1_training.stage_recipe import BaseRecipe
from retrv_r1_training.stage_run import Figures, Work, train
from retrv_r1_training.trl_sft import SftModel
from retrv_r1_training.unreadable import Chosen

log = logging.getLogger(__name__)
BASE = "retrv-r1-base"


def train_base(recipe: BaseRecipe, run: Path) -> Path:
    """Train or resume in folder `run`; returns the checkpoint, whose compression module is fresh."""
    torch.manual_seed(recipe.seed)
    files = Opened(recipe.data)
    count = recipe.optim.steps * recipe.optim.batch_size
    draws = Captioned(files.train).draws(count, recipe.seed, recipe.data.max_bad_share)
    start = _start(recipe, run / "start", files.train)
    measure = None
    if files.validated:
        held_out = Captioned(files.validation).draws(files.validated, 0).readable(recipe.data.max_bad_share)
        measure = Measure(start.processor, held_out, recipe.optim.per_device)
    model = trainable(SftModel.of(start.model))
    state = train(recipe, run, Work(start.processor, model, draws, Objective(start.processor), measure))
    out = run / "checkpoint"
    if is_first():
        finish(out, lambda aside: export(recipe, run / "start", state, aside))
    return out


def trainable(model: SftModel) -> SftModel:
    """Tower and language model; the compression module is for `align`."""
    model.requires_grad_(True)
    model.model.icm.requires_grad_(False)
    return model


def _start(recipe: BaseRecipe, folder: Path, sources: Sequence[Source]) -> Checkpoint:
    """Random weights and a tokenizer of the data's words, made once: a resumed run must read with the same ones."""
    if not folder.is_dir() and is_first():
        tokenizer = build_tokenizer(texts(sources), recipe.vocab)
        model = build_model(tokenizer, recipe.backbone, recipe.icm, recipe.seed)
        processor = build_processor(tokenizer, recipe.backbone, recipe.max_text_tokens)
        aside = folder.with_suffix(".part")
        save_checkpoint(aside, model, processor, Manifest(BASE, icm=asdict(recipe.icm)), dtype=torch.float32)
        aside.rename(folder)  # at once whole: the other processes wait for it
        log.info(
            "%s: %d tokens, %.1f M parameters", folder, len(tokenizer), sum(p.numel() for p in model.parameters()) / 1e6
        )
    while not folder.is_dir():  # if the first process fails, the launcher ends this one
        time.sleep(0.5)
    return load_checkpoint(folder, device=device(), dtype=recipe.run.dtype)


def texts(sources: Sequence[Source]) -> Iterator[str]:
    """Every caption, text, query and instruction, as they will be tokenised."""
    yield from sorted(FRAME)
    yield from (CHECK_CUE, DESCRIBE.text)
    yield from Captioned(sources).texts()
    for source in sources:
        prompts = source.data.instructions.prompts.values()
        yield from (f"Query: {words}" for paraphrases in prompts for words in paraphrases)
        for judged in iterate(source.data.queries):
            query = judged.query
            yield from ([f"Query: {query.instruction}"] if query.instruction else [])
            yield from ([f" {query.content.text}"] if query.content.text else [])


def export(recipe: BaseRecipe, start: Path, state: dict[str, Tensor], out: Path) -> Manifest:
    made = load_checkpoint(start, device="cpu", dtype="float32")
    load_trained(trainable(SftModel.of(made.model)), state)
    return save_checkpoint(out, made.model, made.processor, made.manifest, dtype=getattr(torch, recipe.run.dtype))


@dataclass(frozen=True)
class Objective:
    processor: Processor

    def __call__(self, net: SftModel, pictures: Sequence[tuple[Content, str]]) -> tuple[Tensor, Figures]:
        loss, hidden, batch = caption_loss(net, self.processor, [caption_chunk(self.processor, *p) for p in pictures])
        if (
            dist.is_initialized()
        ):  # a batch of texts leaves the tower without gradients, and the other processes would wait for them
            loss = loss + 0.0 * sum(p.sum() for p in net.model.visual.parameters())
        return loss, {"words": accuracy(net, hidden, batch.input_ids, batch.sampled)}


@dataclass(frozen=True)
class Measure:
    """Loss and share of right tokens on held-out captions, read `at_once` at a time."""

    processor: Processor
    held_out: Chosen[tuple[Content, str]]
    at_once: int

    def __call__(self, net: SftModel) -> Figures:
        rows = []
        for start in range(0, len(self.held_out), self.at_once):
            numbers = range(start, min(start + self.at_once, len(self.held_out)))
            loss, figures = Objective(self.processor)(net, [self.held_out[n] for n in numbers])
            rows.append((len(numbers), loss.item(), figures["words"]))
        count = sum(n for n, _, _ in rows)
        return {"loss": sum(n * v for n, v, _ in rows) / count, "words": sum(n * v for n, _, v in rows) / count}
