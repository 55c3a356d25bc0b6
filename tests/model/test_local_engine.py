"""The local engine against the plain forward pass of the same model: nothing differs, nothing is computed twice."""

from __future__ import annotations

import asyncio
import copy
import gc
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from retrv_r1_retriever.engines.base import Compressor, Engine
from retrv_r1_retriever.engines.local import LocalEngine, batcher
from retrv_r1_retriever.engines.local.kv import KvPool, StepCache
from retrv_r1_retriever.errors import EngineError, InputError
from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.processing import collate
from retrv_r1_retriever.options import FAST
from retrv_r1_retriever.prompt import ANSWER_START, INSPECT_END, NONE, THINK_END, THINK_START, build_prompt
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.session import GenerateParams
from retrv_r1_retriever.trace import Forced, Full, Sampled
from retrv_r1_retriever.types import Candidate, Content, Document, Query
from tests.tiny import make_prompt, picture

QUERIES = [Query.of("which card", instruction="find it"), Query.of(image=picture(99)), Query.of("red two", picture(98))]
THINK = GenerateParams((INSPECT_END, THINK_END), 12)


@pytest.fixture
def engine(checkpoint) -> LocalEngine:
    return LocalEngine(checkpoint)


def plain_logits(checkpoint, prompt, segments) -> torch.Tensor:
    """Logits after the last token of prompt + segments, in one uncached pass."""
    chunk = checkpoint.processor.chunk((*prompt.segments, *segments), prompt)
    batch = collate([chunk], checkpoint.processor)
    model = checkpoint.model.model
    with torch.inference_mode():
        features = encode_pictures(model, checkpoint.processor, batch.pictures)
        out = model(
            batch.input_ids, batch.attention_mask, batch.positions,
            image_features=features, image_mask=batch.image_mask, compressed=batch.compressed,
        )  # fmt: skip
        return checkpoint.model.lm_head(out.last_hidden_state[0, -1]).float()


def plain_greedy(checkpoint, prompt, segments, params) -> list[int]:
    stops = {checkpoint.processor.token_id(s) for s in params.stop}
    ids: list[int] = []
    while len(ids) < params.max_new_tokens:
        logits = plain_logits(checkpoint, prompt, (*segments, Sampled("", tuple(ids))))
        ids.append(int(logits.argmax()))
        if ids[-1] in stops:
            break
    return ids


def test_is_engine_and_compressor(engine):
    assert isinstance(engine, Engine)
    assert isinstance(engine, Compressor)


@pytest.mark.parametrize("query", QUERIES, ids=["text", "image", "both"])
async def test_steps_equal_one_plain_pass(engine, checkpoint, query):
    prompt = make_prompt(engine, query, 5)
    handle = await engine.open(prompt)
    opener, opened = Forced("<think>"), Full(2, prompt.candidates[2].document.content)
    await engine.append(handle, [opener])
    first = await engine.generate(handle, THINK)
    assert list(first.token_ids) == plain_greedy(checkpoint, prompt, [opener], THINK)
    await engine.append(handle, [opened])
    second = await engine.generate(handle, THINK)
    turn = [opener, Sampled("", first.token_ids), opened]
    assert list(second.token_ids) == plain_greedy(checkpoint, prompt, turn, THINK)
    await engine.close(handle)


async def test_probe_leaves_no_trace_and_reads_the_slots(engine, checkpoint):
    prompt = make_prompt(engine, QUERIES[0], 4)
    handle = await engine.open(prompt)
    before = await engine.probe(handle, "<answer>")
    slots = [checkpoint.processor.token_id(s) for s in prompt.slots]
    want = torch.log_softmax(plain_logits(checkpoint, prompt, [Forced("<answer>")])[slots], -1)
    assert torch.allclose(torch.tensor(before.logprobs), want, atol=1e-4)
    await engine.append(handle, [Forced("<think>")])
    generated = await engine.generate(handle, THINK)
    assert list(generated.token_ids) == plain_greedy(checkpoint, prompt, [Forced("<think>")], THINK)
    again = await engine.open(prompt)
    assert (await engine.probe(again, "<answer>")).logprobs == pytest.approx(before.logprobs, abs=1e-5)


async def test_nothing_is_read_twice(engine):
    prompt = make_prompt(engine, QUERIES[2], 4)
    handle = await engine.open(prompt)
    await engine.probe(handle, "<answer>")
    await engine.append(handle, [Forced("<think>")])
    one = await engine.generate(handle, THINK)
    await engine.append(handle, [Full(1, prompt.candidates[1].document.content)])
    two = await engine.generate(handle, THINK)
    full = prompt.candidates[1].memory.full_tokens
    # the probe's suffix, the opener, the opened candidate; the very last sampled token is never read
    assert engine.forward_tokens == handle.prompt_tokens + 1 + 1 + one.tokens + full + two.tokens - 1
    assert engine.encoded_pictures == 2, "the query's picture and the opened candidate's, no other"


async def test_batched_equals_single(engine):
    prompts = [make_prompt(engine, q, n) for q, n in zip(QUERIES, (3, 6, 4), strict=True)]

    async def run(prompt):
        handle = await engine.open(prompt)
        await engine.append(handle, [Forced("<think>")])
        out = await engine.generate(handle, THINK)
        read = await engine.probe(handle, "<answer>")
        await engine.close(handle)
        return out, read

    single = [await run(p) for p in prompts]
    together = await asyncio.gather(*(run(p) for p in prompts * 3))
    for i, (out, read) in enumerate(together):
        assert out.token_ids == single[i % 3][0].token_ids
        assert out.logprobs == pytest.approx(single[i % 3][0].logprobs, abs=1e-4)
        assert read.logprobs == pytest.approx(single[i % 3][1].logprobs, abs=1e-4)


async def test_allowed_tokens_bound_the_answer_and_seeds_repeat(engine):
    prompt = make_prompt(engine, QUERIES[0], 3)
    seen = set()
    for seed in range(12):
        texts = []
        for _ in range(2):
            handle = await engine.open(prompt)
            await engine.append(handle, [Forced("<answer>")])
            out = await engine.generate(handle, GenerateParams((), 1, prompt.slots, temperature=5.0, seed=seed))
            assert out.text in prompt.slots
            assert len(out.slot_logprobs) == 4
            texts.append(out.text)
        assert texts[0] == texts[1], "same seed, same sample"
        seen.add(texts[0])
    assert len(seen) > 1
    assert NONE in prompt.slots


async def test_cancellation_leaves_the_engine_usable(engine):
    prompt = make_prompt(engine, QUERIES[0], 3)
    handle = await engine.open(prompt)
    await engine.append(handle, [Forced("<think>")])
    task = asyncio.create_task(engine.generate(handle, GenerateParams((THINK_END,), 3000)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.close(handle)
    fresh = await engine.open(prompt)
    assert len((await engine.probe(fresh, "<answer>")).logprobs) == 4
    with pytest.raises(EngineError, match="closed"):
        await engine.generate(handle, THINK)


async def test_long_text_is_tokenised_in_a_thread_and_short_text_at_once(engine, monkeypatch):
    where = []
    inner = engine._processor.chunk

    def spy(*arguments):
        where.append(threading.current_thread() is threading.main_thread())
        return inner(*arguments)

    monkeypatch.setattr(engine._processor, "chunk", spy)
    prompt = make_prompt(engine, Query.of("which"), 2)
    handle = await engine.open(prompt)
    await engine.append(handle, (Full(0, Content("a few words")),))
    await engine.append(handle, (Full(0, Content("word " * 3_000)),))
    with pytest.raises(InputError, match="expected fewer than"):
        await engine.open(make_prompt(engine, Query.of("which " * 3_000), 2))
    assert where == [True, True, False, False]


async def test_missing_memory_and_overlong_prompt_are_named(engine):
    candidate = Candidate(Document("a", Content("x")), None, 1)
    with pytest.raises(InputError, match="candidate 0: expected memory"):
        await engine.open(build_prompt(QUERIES[0], [candidate]))
    with pytest.raises(InputError, match="expected fewer than"):
        await engine.open(make_prompt(engine, Query.of("red " * 5000), 2))


async def test_documents_that_cannot_be_read_cost_themselves_only(engine):
    """A text cut in the middle of a character can be read; a banner 300 times as wide as high cannot."""
    contents = [Content("red"), Content("cut \ud83d"), Content("banner", Image.new("RGB", (600, 2))), Content("two")]
    documents = [Document(str(i), content) for i, content in enumerate(contents)]
    results = await RetrvR1Reranker(engine, options=FAST).arerank("red \ud800", documents)
    assert (results.status, results.unranked) == ("partial", ("2",))
    assert "1 of 4 candidates have no usable memory" in results.reason
    assert "'2' could not be recomputed: picture: expected sides of at most 200 to 1" in " ".join(results.trace.notes)


async def test_a_failing_prompt_takes_no_other_with_it(engine, monkeypatch):
    read = engine._batcher._read

    def failing(work):
        if any(handle.prompt.query.content.text == "poison" for handle, _ in work):
            raise RuntimeError("CUDA error")
        return read(work)

    async def run(text):
        handle = await engine.open(make_prompt(engine, Query.of(text), 3))
        await engine.append(handle, [Forced("<think>")])
        try:
            return await engine.generate(handle, THINK)
        finally:
            await engine.close(handle)

    alone = await run("red")
    monkeypatch.setattr(engine._batcher, "_read", failing)
    texts = ["red", "poison", "red", "red"]
    together = await asyncio.gather(*map(run, texts), return_exceptions=True)
    assert isinstance(together[1], EngineError)
    assert str(together[1]) == "local engine: RuntimeError: CUDA error"
    assert [together[i].token_ids for i in (0, 2, 3)] == [alone.token_ids] * 3
    assert (await run("red")).token_ids == alone.token_ids


async def test_generating_with_nothing_to_read_is_an_error_and_no_endless_wait(engine):
    handle = await engine.open(make_prompt(engine, Query.of("red two"), 3))
    await engine.probe(handle, ANSWER_START)
    with pytest.raises(EngineError, match=r"expected something to read, got nothing\. Append a segment first"):
        await asyncio.wait_for(engine.generate(handle, GenerateParams((), 3)), 10)
    await engine.append(handle, [Forced(THINK_START)])
    assert (await engine.generate(handle, GenerateParams((), 3))).tokens == 3
    await engine.close(handle)


async def test_closing_a_handle_in_use_ends_the_call(engine):
    handle = await engine.open(make_prompt(engine, QUERIES[0], 3))
    await engine.append(handle, [Forced("<think>")])
    task = asyncio.create_task(engine.generate(handle, GenerateParams((), 3000)))
    await asyncio.sleep(0.05)
    await engine.close(handle)
    with pytest.raises(EngineError, match="closed while it was in use"):
        await asyncio.wait_for(task, 10)


async def test_closing_the_engine_ends_its_calls_and_frees_it(checkpoint):
    engine = LocalEngine(checkpoint)
    handle = await engine.open(make_prompt(engine, QUERIES[0], 3))
    await engine.append(handle, [Forced("<think>")])
    task = asyncio.create_task(engine.generate(handle, GenerateParams((), 3000)))
    await asyncio.sleep(0.05)
    await engine.aclose()
    for call in (task, engine.probe(handle, "<answer>")):
        with pytest.raises(EngineError, match="local engine: expected an open one, got a closed one"):
            await asyncio.wait_for(call, 10)
    await engine.aclose()
    known = weakref.ref(engine._batcher)
    del engine, handle, task, call
    gc.collect()
    assert known() is None


AT_EXIT = """
import threading, time, torch
from retrv_r1_retriever import Content, Document, RerankOptions, RetrvR1Reranker
from retrv_r1_retriever.config import Config, open_engine

engine, started = open_engine(Config()), threading.Event()
read, large = engine._batcher._read, torch.ones(500, 500)

def slow(work):
    started.set()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        large @ large
    return read(work)

engine._batcher._read = slow
reranker = RetrvR1Reranker(engine, options=RerankOptions(timeout_s=None))
threading.Thread(target=reranker.rerank, args=("a card", [Document("a", Content("red"))]), daemon=True).start()
started.wait()
"""


def test_a_process_ends_in_the_middle_of_a_pass():
    """A daemon thread inside torch that finds the interpreter gone would abort the process, with exit code -6."""
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


async def test_cancelled_calls_leave_no_rows_behind(engine):
    async def run(count):
        handle = await engine.open(make_prompt(engine, QUERIES[0], 2))
        try:
            await engine.append(handle, [Forced("<think>")])
            await engine.generate(handle, GenerateParams((), count))
        finally:
            await engine.close(handle)

    for wait in (0.0, 0.01, 0.03):
        tasks = [asyncio.create_task(run(3000)) for _ in range(12)]
        await asyncio.sleep(wait)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await run(1)
    await run(1)  # rows are freed before a pass: the last one's own row is all that may still be taken
    pool = engine._batcher._pool
    assert len(pool._free) >= pool._rows - 1


def test_one_engine_serves_many_event_loops(engine):
    def serve(results):
        async def run():
            handle = await engine.open(make_prompt(engine, QUERIES[0], 3))
            return await engine.probe(handle, "<answer>")

        results.append(asyncio.run(run()).logprobs)

    results: list[tuple[float, ...]] = []
    threads = [threading.Thread(target=serve, args=(results,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 3
    assert results[1] == pytest.approx(results[0], abs=1e-4)


def test_only_rows_without_a_past_are_read_without_a_mask():
    """What a mask would say is then what causal attention does by itself; behind a past it is not."""
    config = SimpleNamespace(num_key_value_heads=1, hidden_size=4, num_attention_heads=1, num_hidden_layers=2)
    pool = KvPool(config, torch.device("cpu"), torch.float32, rows=2, capacity=8)
    assert StepCache(pool, [0, 1], [0, 0], [3, 2]).mask(3) is None
    mask = StepCache(pool, [0, 1], [0, 2], [3, 1]).mask(3)
    assert mask[0, 0].tolist() == torch.ones(3, 3).tril().bool().tolist()
    assert mask[1, 0, 0].tolist() == [True, True, True]


def test_attention_that_needs_a_mask_is_refused(checkpoint):
    model = copy.copy(checkpoint.model)
    model.config = copy.deepcopy(model.config)
    model.config._attn_implementation = "eager"
    with pytest.raises(EngineError, match="attention: expected sdpa, got eager"):
        LocalEngine(replace(checkpoint, model=model))


def test_a_pool_that_ran_out_of_memory_can_be_used_again(monkeypatch):
    config = SimpleNamespace(num_key_value_heads=1, hidden_size=4, num_attention_heads=1, num_hidden_layers=2)
    pool = KvPool(config, torch.device("cpu"), torch.float32, rows=2, capacity=4)
    taken = [pool.take(), pool.take()]
    zeros, calls = pool._zeros, iter([False, True])

    def failing(rows, capacity):
        if next(calls, False):
            raise torch.OutOfMemoryError("out of memory")
        return zeros(rows, capacity)

    monkeypatch.setattr(pool, "_zeros", failing)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        pool.take()
    pool.reserve(9)
    taken += [pool.take(), pool.take()]
    assert sorted(taken) == [0, 1, 2, 3]
    assert {tuple(layer.shape) for layer in pool.layers} == {(4, 1, 9, 4)}


async def test_a_pass_is_counted_before_anybody_is_told(engine, monkeypatch):
    """Whoever subtracts what the engine counted before a call from what it counted after it gets that call's own time."""
    told = []
    finish = batcher._finish
    monkeypatch.setattr(batcher, "_finish", lambda job, result: (told.append(counted(engine)), finish(job, result)))
    handle = await engine.open(make_prompt(engine, QUERIES[0], 4))
    for _ in range(3):
        steps, passes = counted(engine)
        await engine.probe(handle, ANSWER_START)
        assert told[-1][0] - steps >= told[-1][1] - passes > 0
    await engine.close(handle)


def counted(engine: LocalEngine) -> tuple[float, float]:
    return engine.step_seconds, engine.forward_seconds
