"""The real server against the local engine, on the same weights and queries: the same thoughts, openings and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from retrv_r1_retriever.driver import Reading, read
from retrv_r1_retriever.engines.base import Engine
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.engines.vllm import VllmEngine
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.prompt import Prompt, build_prompt
from retrv_r1_retriever.trace import Sampled
from retrv_r1_retriever.types import Document, Memory, Query
from tests.vllm.cards import candidates, tasks

pytestmark = pytest.mark.vllm

OPTIONS = RerankOptions(think="always", max_new_tokens=120)
#: Nats. Compressed tokens travel in the checkpoint's float16 and stay float32 in the local engine; the largest seen was 0.003.
TOLERANCE = 0.02


def prompt_of(query: Query, documents: tuple[Document, ...], local: LocalEngine) -> Prompt:
    found = candidates(documents)
    made = local.compress([c.document.content for c in found])
    memories = [Memory(m.rows, local.memory_digest, "", m.full_tokens) for m in made]
    return build_prompt(query, [replace(c, memory=m) for c, m in zip(found, memories, strict=True)])


async def readings(engine: Engine, prompts: Sequence[Prompt], together: int) -> list[Reading]:
    room = asyncio.Semaphore(together)

    async def one(prompt: Prompt) -> Reading:
        async with room:
            return await read(engine, prompt, OPTIONS, images=LocalImages())

    return await asyncio.gather(*map(one, prompts))


def sampled(reading: Reading) -> list[Sampled]:
    return [s for s in reading.trace.segments if isinstance(s, Sampled)]


def logprobs(reading: Reading) -> Iterator[float]:
    """Of the direct read, of everything sampled, and of every verdict, in order."""
    assert reading.direct is not None
    assert reading.outcome is not None
    yield from reading.direct.logprobs
    for segment in sampled(reading):
        yield from segment.logprobs or ()
    for _, keep in reading.outcome.keep_logprobs:
        yield keep


async def test_the_same_thoughts_and_answers_alone_and_together(engine: VllmEngine, local: LocalEngine) -> None:
    prompts = [prompt_of(query, documents, local) for query, documents in tasks()]
    wanted = await readings(local, prompts, together=8)
    got = await readings(engine, prompts, together=8)
    alone = await readings(engine, prompts[::3], together=1)
    differences = []
    for want, one in [*zip(wanted, got, strict=True), *zip(wanted[::3], alone, strict=True)]:
        assert [s.token_ids for s in sampled(one)] == [s.token_ids for s in sampled(want)]
        assert one.outcome is not None
        assert want.outcome is not None
        assert (one.outcome.answer, one.outcome.inspected) == (want.outcome.answer, want.outcome.inspected)
        differences += [abs(a - b) for a, b in zip(logprobs(one), logprobs(want), strict=True)]
    print(
        f"{len(prompts)} queries, {len(differences):,} log-probabilities, largest difference {max(differences):.4f} nats"
    )
    assert max(differences) < TOLERANCE
    assert sum(len(one.outcome.inspected) for one in wanted if one.outcome) >= 10, "inspections were part of it"
