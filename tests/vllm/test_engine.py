"""The engine's contract on the real server: what it leaves as it was, bounds, cancels, and does not pay for twice."""

from __future__ import annotations

import asyncio

import pytest

from retrv_r1_retriever.engines.base import Compressor, Engine
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.engines.vllm import VllmEngine
from retrv_r1_retriever.errors import EngineError, InputError
from retrv_r1_retriever.prompt import INSPECT_END, THINK_END, build_prompt
from retrv_r1_retriever.session import GenerateParams, Generation
from retrv_r1_retriever.trace import Forced, Full
from retrv_r1_retriever.types import Candidate, Content, Document, Query
from tests.tiny import make_prompt, picture

pytestmark = pytest.mark.vllm

QUERIES = [
    Query.of("a card", instruction="find it"),
    Query.of(image=picture(99)),
    Query.of("<prompt_embeds> 2", picture(98)),
]
THINK = GenerateParams((INSPECT_END, THINK_END), 24)
BLOCK = 128  # tokens: the largest unit in which vLLM keeps a prefix


def test_it_is_an_engine_that_compresses(engine: VllmEngine, local: LocalEngine) -> None:
    assert isinstance(engine, Engine)
    assert isinstance(engine, Compressor)
    assert (engine.memory_digest, engine.memory_shape) == (local.memory_digest, local.memory_shape)
    assert engine.max_context == 4096
    assert engine.versions["vllm"] != "unknown"


@pytest.mark.parametrize("query", QUERIES, ids=["text", "image", "reserved"])
async def test_steps_are_the_local_engines_with_or_without_a_probe_between(
    engine: VllmEngine, local: LocalEngine, query: Query
) -> None:
    prompt = make_prompt(local, query, 7)

    async def steps(engine: Engine, probing: bool) -> list[Generation]:
        handle, done = await engine.open(prompt), []
        for segment in (
            Forced("<think>"),
            Full(1, prompt.candidates[1].document.content),
            Full(2, prompt.candidates[2].document.content),
        ):
            await engine.append(handle, [segment])
            if probing:
                await engine.probe(handle, "</think><answer>")
            done.append(await engine.generate(handle, THINK))
        await engine.append(handle, [Forced("</think><answer>")])
        done.append(await engine.generate(handle, GenerateParams((), 1, prompt.slots)))
        await engine.close(handle)
        return done

    wanted = await steps(local, probing=False)
    for got in (await steps(engine, probing=False), await steps(engine, probing=True)):
        assert [(g.text, g.token_ids, g.stop) for g in got] == [(w.text, w.token_ids, w.stop) for w in wanted]
        for g, w in zip(got, wanted, strict=True):
            assert g.logprobs == pytest.approx(w.logprobs, abs=0.02)
            assert [slot for slot, _ in g.tracked] == [slot for slot, _ in w.tracked]
            assert [p for _, p in g.tracked] == pytest.approx([p for _, p in w.tracked], abs=0.02)
        assert got[-1].slot_logprobs == pytest.approx(wanted[-1].slot_logprobs, abs=0.02)


async def test_allowed_tokens_bound_the_answer_and_seeds_repeat(engine: VllmEngine, local: LocalEngine) -> None:
    prompt, seen = make_prompt(local, QUERIES[0], 3), set()
    for seed in range(4):
        texts = []
        for _ in range(2):
            handle = await engine.open(prompt)
            await engine.append(handle, [Forced("<think>")])
            thought = await engine.generate(handle, GenerateParams((), 6, temperature=2.0, seed=seed))
            await engine.append(handle, [Forced("</think><answer>")])
            answer = await engine.generate(handle, GenerateParams((), 1, prompt.slots, temperature=2.0, seed=seed))
            assert answer.text in prompt.slots
            texts.append(thought.text + answer.text)
        assert texts[0] == texts[1], "same seed, same sample"
        seen.add(texts[0])
    assert len(seen) > 1


async def test_a_step_pays_for_what_is_new(engine: VllmEngine, local: LocalEngine) -> None:
    prompt = make_prompt(local, Query.of("a card " * 60), 40)
    handle = await engine.open(prompt)
    assert handle.prompt_tokens > 2 * BLOCK
    await engine.probe(handle, "<answer>")
    await engine.append(handle, [Forced("<think>")])
    for kept in (handle.prompt_tokens, handle.prompt_tokens + THINK.max_new_tokens):
        before = engine.traffic.cached_tokens
        await engine.generate(handle, GenerateParams((), THINK.max_new_tokens))
        assert engine.traffic.cached_tokens - before >= kept // BLOCK * BLOCK


async def test_a_cancelled_call_ends_and_the_engine_goes_on(engine: VllmEngine, local: LocalEngine) -> None:
    prompt = make_prompt(local, QUERIES[0], 3)
    handle = await engine.open(prompt)
    await engine.append(handle, [Forced("<think>")])
    task = asyncio.create_task(engine.generate(handle, GenerateParams((), 1500)))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.close(handle)
    with pytest.raises(EngineError, match="expected an open one, got a closed one"):
        await engine.generate(handle, THINK)
    assert len((await engine.probe(await engine.open(prompt), "<answer>")).logprobs) == 4


async def test_missing_memory_and_overlong_prompts_are_named(engine: VllmEngine, local: LocalEngine) -> None:
    with pytest.raises(InputError, match="candidate 0: expected memory"):
        await engine.open(build_prompt(QUERIES[0], [Candidate(Document("a", Content("x")), None, 1)]))
    with pytest.raises(InputError, match="expected fewer than 4096 tokens"):
        await engine.open(make_prompt(local, Query.of("card " * 5000), 2))
