"""The real server against the local engine, on the same weights and queries: the same thoughts, openings and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from retrv_r1_retriever.driver import Reading, read
from retrv_r1_retriever.engines.base import Compressor, Engine
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.engines.vllm import VllmEngine
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.prompt import Prompt, build_prompt
from retrv_r1_retriever.trace import Sampled
from retrv_r1_retriever.types import Candidate, Memory
from tests.vllm.cards import candidates, tasks

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OPTIONS = RerankOptions(think="always", max_new_tokens=200)
#: Nats. Rows travel in the checkpoint's own float16, the local engine keeps them in float32; the largest seen was XXX.
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def prompts(local: LocalEngine) -> list[Prompt]:
    return [build_prompt(query, with_memory(candidates(documents), local)) for query, documents in tasks()]


def with_memory(found: Sequence[Candidate], compressor: Compressor) -> list[Candidate]:
    from dataclasses import replace

    made = compressor.compress([c.document.content for c in found])
    return [
        replace(c, memory=Memory(m.rows, compressor.memory_digest, "", m.full_tokens))
        for c, m in zip(found, made, strict=True)
    ]


async def readings(engine: Engine, prompts: Sequence[Prompt], together: int) -> list[Reading]:
    room = asyncio.Semaphore(together)

    async def one(prompt: Prompt) -> Reading:
        async with room:
            return await read(engine, prompt, OPTIONS, images=LocalImages())

    return await asyncio.gather(*map(one, prompts))


def sampled(reading: Reading) -> list[Sampled]:
    return [s for s in reading.trace.segments if isinstance(s, Sampled)]


async def test_same_thoughts_and_answers_one_by_one_and_together(
    engine: VllmEngine, local: LocalEngine, prompts: list[Prompt]
) -> None:
    wanted = await readings(local, prompts, together=8)
    alone = await readings(engine, prompts, together=1)
    together = await readings(engine, prompts, together=8)
    worst = 0.0
    for want, *got in zip(wanted, alone, together, strict=True):
        for one in got:
            assert one.outcome and want.outcome
            print([s.text for s in sampled(one)], want.outcome.answer, one.outcome.answer)
            assert [s.token_ids for s in sampled(one)] == [s.token_ids for s in sampled(want)]
            assert (one.outcome.answer, one.outcome.inspected) == (want.outcome.answer, want.outcome.inspected)
            pairs = [
                *zip(one.direct.logprobs, want.direct.logprobs, strict=True),
                *((a, b) for s, t in zip(sampled(one), sampled(want), strict=True) for a, b in zip(s.logprobs, t.logprobs, strict=True)),
                *((a[1], b[1]) for a, b in zip(one.outcome.keep_logprobs, want.outcome.keep_logprobs, strict=True)),
            ]
            worst = max(worst, max(abs(a - b) for a, b in pairs))
    print("WORST", worst, engine.traffic)
    assert worst < TOLERANCE
    assert sum(len(r.outcome.inspected) for r in wanted if r.outcome) > len(prompts) // 2, "inspections were part of it"
