"""Where the time of one query goes, stage by stage, beside the floor of each on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from retrv_r1_retriever.bench.floors import Ceiling, Counts, Work, best_of
from retrv_r1_retriever.bench.modes import Task
from retrv_r1_retriever.model.checkpoint import Checkpoint
from retrv_r1_retriever.model.modeling import CACHE
from retrv_r1_retriever.model.processing import Chunk, collate
from retrv_r1_retriever.parser import Thought, Verdict, parse, render
from retrv_r1_retriever.prompt import Prompt, build_full_prompt, build_prompt
from retrv_r1_retriever.trace import Segment, Text


@dataclass(frozen=True, slots=True)
class Stage:
    """seconds: measured; work: by formula, None where it is not the model's; floor: seconds in which no code can do it here."""

    name: str
    seconds: float
    work: Work | None = None
    floor: float | None = None


@torch.inference_mode()
def stages(checkpoint: Checkpoint, task: Task, ceiling: Ceiling, rounds: int) -> list[Stage]:
    """The parts of U, C and F. `tower`, `memory`: all K candidates, at index time or (C) at query time."""
    model, processor = checkpoint.model, checkpoint.processor
    device, inner = model.device, model.model
    counts = Counts(model.config, model.dtype.itemsize)
    pictures = [c.document.content.image for c in task.plain if c.document.content.image is not None]
    prompt, full = build_prompt(task.query, task.stored), build_full_prompt(task.query, task.cached)
    out: list[Stage] = []

    def measure(name: str, call: Callable[[], object], work: Work | None = None) -> None:
        out.append(Stage(name, best_of(rounds, call, device), work, ceiling.floor(work) if work else None))

    if pictures:
        measure("decode and resize, K pictures", lambda: processor.pixels(pictures))  # type: ignore[arg-type]
        pixels, grids = (x.to(device) for x in processor.pixels(pictures))  # type: ignore[arg-type]
        pixels = pixels.to(model.dtype)
        patches = len(pixels) // len(pictures)
        measure("tower, K pictures", lambda: inner.encode_images(pixels, grids), counts.tower(patches, len(pictures)))
    embeds = _content_embeds(checkpoint, task)
    tokens = sum(map(len, embeds)) // len(embeds)
    measure("memory, K candidates", lambda: inner.icm.memories(embeds), counts.memory(tokens, len(embeds)))
    measure("prompt: segments to ids", lambda: _chunk(checkpoint, build_prompt(task.query, task.stored)))
    batch = collate([_chunk(checkpoint, prompt)], processor, device)
    read = batch.compressed
    table = inner.get_input_embeddings()(batch.input_ids)
    query, mask = inner.query_rows(table, read.query_mask)
    rows = read.memory.to(model.dtype)
    measure(
        "two tokens each, K candidates", lambda: inner.icm(rows, read.memory_mask, query, mask, read.row),
        counts.compression(len(task.stored), rows.shape[1], query.shape[1]),
    )  # fmt: skip
    for name, shown in (("read, compressed", prompt), ("read, in full", full)):
        length = len(_chunk(checkpoint, shown))
        measure(name, _pass(checkpoint, length), counts.prefill(length))
    length = len(_chunk(checkpoint, prompt))
    measure("one decoded token", _step(checkpoint, length), counts.decode(1, length))
    thought = render(Thought("red ring", tuple(Verdict(i, "keep") for i in range(len(task.stored))), (), 0))
    measure("parse a thought", lambda: parse(thought))
    return out


def _content_embeds(checkpoint: Checkpoint, task: Task) -> list[torch.Tensor]:
    table = checkpoint.model.get_input_embeddings()
    chunks = [checkpoint.processor.content_chunk(c.document.content) for c in task.plain]
    return [table(torch.as_tensor(c.ids, device=checkpoint.model.device)) for c in chunks]


def _chunk(checkpoint: Checkpoint, prompt: Prompt, more: Sequence[Segment] = ()) -> Chunk:
    return checkpoint.processor.chunk((*prompt.segments, *more, Text("<answer>")), prompt)


def _inputs(checkpoint: Checkpoint, tokens: int, start: int) -> dict[str, torch.Tensor]:
    model = checkpoint.model
    positions = torch.arange(start, start + tokens, device=model.device).expand(3, 1, -1)
    embeds = torch.randn(1, tokens, model.config.text_config.hidden_size, device=model.device, dtype=model.dtype)
    return {"inputs_embeds": embeds, "position_ids": positions}


def _pass(checkpoint: Checkpoint, tokens: int) -> Callable[[], object]:
    model, inputs = checkpoint.model, _inputs(checkpoint, tokens, 0)

    def call() -> object:
        hidden = model.model.language_model(**inputs, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, -1])

    return call


def _step(checkpoint: Checkpoint, before: int) -> Callable[[], object]:
    """One token behind `before` cached ones."""
    model = checkpoint.model
    past = DynamicCache(config=model.config.text_config)
    model.model.language_model(**_inputs(checkpoint, before, 0), use_cache=True, **{CACHE: past})
    inputs = _inputs(checkpoint, 1, before)

    def call() -> object:
        out = model.model.language_model(**inputs, use_cache=True, **{CACHE: past}).last_hidden_state
        past.crop(-1)
        return model.lm_head(out[:, -1])

    return call
