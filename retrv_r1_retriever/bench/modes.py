"""Ways to rerank the same K candidates with the same weights, each ending in the direct read of K + 1 slots.

U    every candidate in full, its picture through the tower at query time
U'   every candidate in full, tower tokens cached: what is left of the difference is the language model's alone
X    a pointwise cross-encoder of the same backbone: K prompts of one candidate in full, run together; the query's picture goes through
     the tower once
X'   the same with tower tokens cached
C    two tokens per candidate, compressed at query time: tower and projection run for all K
F    two tokens per candidate, memory made at index time
F+5  F, then its best five opened in full behind it, and a second read

With a thought behind the read, F is what the issue of speed calls P. `auto` is F, and a thought only where its read is unsure.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL.Image import Image
from torch import nn

from retrv_r1_retriever.bench.floors import wait_for
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.prompt import ANSWER_START, THINK_START, Prompt, build_full_prompt, build_prompt
from retrv_r1_retriever.session import GenerateParams
from retrv_r1_retriever.trace import Forced, Full
from retrv_r1_retriever.types import Candidate, Content, Memory, Query

OPENED = 5


@dataclass(frozen=True, slots=True)
class Count:
    """prompt: tokens of all prompts read; patches: of pictures that went through the tower."""

    prompt: int
    patches: int


Mode = Callable[[], Awaitable[int]]


@dataclass(frozen=True, slots=True)
class Task:
    """One query over K candidates. plain: decoded, no memory; stored: with memory; cached: pictures after the tower."""

    query: Query
    plain: tuple[Candidate, ...]
    stored: tuple[Candidate, ...]
    cached: tuple[Candidate, ...]

    @classmethod
    def of(cls, engine: LocalEngine, query: Query, candidates: Sequence[Candidate]) -> Task:
        return cls(
            query,
            tuple(candidates),
            _with_memory(engine, candidates),
            tuple(_after_tower(engine, c) for c in candidates),
        )


def modes(engine: LocalEngine, task: Task) -> dict[str, Mode]:
    """Name -> a call that returns the prompt tokens it read."""
    query = task.query
    return {
        "U": lambda: direct_read(engine, build_full_prompt(query, task.plain)),
        "U'": lambda: direct_read(engine, build_full_prompt(query, task.cached)),
        "X": lambda: _pointwise(engine, query, task.plain),
        "X'": lambda: _pointwise(engine, query, task.cached),
        "C": lambda: direct_read(engine, build_prompt(query, _with_memory(engine, task.plain))),
        "F": lambda: direct_read(engine, build_prompt(query, task.stored)),
        f"F+{OPENED}": lambda: _opened(engine, build_prompt(query, task.stored)),
    }


async def direct_read(engine: LocalEngine, prompt: Prompt) -> int:
    """Prompt tokens read."""
    handle = await engine.open(prompt)
    try:
        await engine.probe(handle, ANSWER_START)
        return handle.prompt_tokens
    finally:
        await engine.close(handle)


async def thought(engine: LocalEngine, prompt: Prompt, steps: int, below: float = math.inf) -> int:
    """A direct read, then exactly `steps` sampled tokens unless the model ends its turn earlier; returns those.

    below: none are sampled where the two best slots are this many nats apart or more
    """
    handle = await engine.open(prompt)
    try:
        if (await engine.probe(handle, ANSWER_START)).margin >= below:
            return 0
        await engine.append(handle, [Forced(THINK_START)])
        return (await engine.generate(handle, GenerateParams((), steps))).tokens
    finally:
        await engine.close(handle)


@dataclass(frozen=True, slots=True)
class Auto:
    """threshold: nats; share: of the queries that a thought was spent on; seconds: per query, the best of the rounds"""

    threshold: float
    share: float
    seconds: float


async def auto(
    engine: LocalEngine, prompts: Sequence[Prompt], steps: int, threshold: float, rounds: int, device: torch.device
) -> Auto:
    """All prompts one after another, each with a thought only if its read is less sure than the threshold."""
    sampled: list[int] = []

    async def through() -> int:
        sampled[:] = [await thought(engine, prompt, steps, threshold) for prompt in prompts]
        return sum(sampled)

    seconds = (await interleaved({"auto": through}, rounds, device))["auto"]
    return Auto(threshold, sum(tokens > 0 for tokens in sampled) / len(sampled), seconds / len(prompts))


async def margin_below(engine: LocalEngine, prompts: Sequence[Prompt], share: float) -> float:
    """The threshold under which this share of the prompts' direct reads lies: halfway to the next one."""
    margins = []
    for prompt in prompts:
        handle = await engine.open(prompt)
        margins.append((await engine.probe(handle, ANSWER_START)).margin)
        await engine.close(handle)
    margins.sort()
    count = round(share * len(margins))
    return (margins[count - 1] + margins[count]) / 2 if 0 < count < len(margins) else math.inf if count else -math.inf


async def interleaved(calls: dict[str, Mode], rounds: int, device: torch.device) -> dict[str, float]:
    """Best seconds of each over `rounds` passes through all of them in turn, after one to warm up."""
    best = dict.fromkeys(calls, float("inf"))
    for attempt in range(rounds + 1):
        for name, call in calls.items():
            seconds = await _timed(call, device)
            if attempt:
                best[name] = min(best[name], seconds)
    return best


async def throughput(engine: LocalEngine, prompt: Prompt, concurrency: int, rounds: int, device: torch.device) -> float:
    """Direct reads per second with `concurrency` queries in flight, the best of `rounds`."""

    async def together() -> int:
        return sum(await asyncio.gather(*(direct_read(engine, prompt) for _ in range(concurrency))))

    return concurrency / min([await _timed(together, device) for _ in range(rounds + 1)][1:])


async def counted(calls: dict[str, Mode], tower: nn.Module) -> dict[str, Count]:
    """What each call reads, counted where it happens."""
    patches: list[int] = []
    hook = tower.register_forward_pre_hook(lambda module, args: patches.append(len(args[0])))
    out = {}
    try:
        for name, call in calls.items():
            patches.clear()
            out[name] = Count(await call(), sum(patches))
    finally:
        hook.remove()
    return out


async def _timed(call: Mode, device: torch.device) -> float:
    wait_for(device)
    started = time.perf_counter()
    await call()
    wait_for(device)
    return time.perf_counter() - started


async def _pointwise(engine: LocalEngine, query: Query, candidates: Sequence[Candidate]) -> int:
    query = replace(query, content=_encoded(engine, query.content))
    prompts = [build_full_prompt(query, [candidate]) for candidate in candidates]
    return sum(await asyncio.gather(*(direct_read(engine, prompt) for prompt in prompts)))


async def _opened(engine: LocalEngine, prompt: Prompt) -> int:
    handle = await engine.open(prompt)
    try:
        read = await engine.probe(handle, ANSWER_START)
        order = sorted(range(len(prompt.candidates)), key=lambda i: -read.logprobs[i])[:OPENED]
        await engine.append(handle, [Full(i, prompt.candidates[i].document.content) for i in sorted(order)])
        tokens = handle.prompt_tokens + sum(map(len, handle.pending))
        await engine.probe(handle, ANSWER_START)
        return tokens
    finally:
        await engine.close(handle)


def _with_memory(engine: LocalEngine, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    made = engine.compress([c.document.content for c in candidates])
    return tuple(
        replace(c, memory=Memory(m.rows, engine.memory_digest, "", m.full_tokens))
        for c, m in zip(candidates, made, strict=True)
    )


def _after_tower(engine: LocalEngine, candidate: Candidate) -> Candidate:
    return replace(
        candidate, document=replace(candidate.document, content=_encoded(engine, candidate.document.content))
    )


def _encoded(engine: LocalEngine, content: Content) -> Content:
    if not isinstance(content.image, Image):
        return content
    return Content(content.text, engine.encode_picture(content.image))  # type: ignore[arg-type]
