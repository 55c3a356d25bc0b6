"""The loop: thinking or not, opening candidates, every way of failing; and in all of them the handle is closed."""

from __future__ import annotations

import asyncio
import math
from itertools import count
from typing import Any

import pytest

from retrv_r1_retriever import driver
from retrv_r1_retriever.driver import Reading, should_think
from retrv_r1_retriever.engines.base import Engine, SlotRead
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.errors import EngineError, ImageError, RerankTimeout
from retrv_r1_retriever.images import ImageData, LocalImages
from retrv_r1_retriever.options import BALANCED, FAST, RerankOptions
from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.prompt import build_prompt
from retrv_r1_retriever.session import Generation
from retrv_r1_retriever.trace import Full, Sampled
from retrv_r1_retriever.types import Candidate, Content, Document, ImageInput, Query, StopReason
from tests.helpers import candidates, png, with_memory

THOUGHT = Thought("red", (Verdict(0, "blue"), Verdict(1, "keep")), (Check(1, "it is a match", True),), 1)
SLOTS = (1.0, 2.0, 0.0, 0.0)  # three candidates and none; margin 1


class Stuck(ScriptedEngine):
    """Never comes back from one step."""

    def __init__(self, at: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.at = at
        self.reached = asyncio.Event()

    async def _step(self, name: str) -> None:
        if name == self.at:
            self.reached.set()
            await asyncio.Event().wait()
        await super()._step(name)


async def read(
    engine: ScriptedEngine,
    options: RerankOptions = BALANCED,
    found: list[Candidate] | None = None,
    **rest: Any,
) -> Reading:
    prompt = build_prompt(Query.of("red shoe"), found or candidates(3))
    return await driver.read(engine, prompt, options, images=rest.pop("images", LocalImages()), **rest)


async def test_a_thought_is_driven_to_its_answer() -> None:
    engine = ScriptedEngine(THOUGHT, slots=SLOTS, keep={0: -3.0, 1: -0.1})
    reading = await read(engine)
    assert reading.outcome is not None
    assert reading.outcome.thought == THOUGHT
    assert reading.outcome.keep_logprobs == ((0, -3.0), (1, -0.1))
    assert reading.direct is not None
    assert reading.trace.margin == pytest.approx(1.0)
    assert reading.trace.stop_reason is StopReason.ANSWERED
    assert engine.leaked == 0


async def test_the_trace_holds_exactly_what_the_engine_saw() -> None:
    engine = ScriptedEngine(THOUGHT, slots=SLOTS)
    reading = await read(engine)
    assert list(reading.trace.segments[:-1]) == engine.opened[0].segments  # </answer> is never sent


async def test_sampled_ids_go_back_as_ids() -> None:
    replies = [Generation("x</think>", 2, "</think>", (7, 8), (-0.1, -0.2)), Generation("<|c2|>", 1, None, (9,))]
    reading = await read(ScriptedEngine(replies, slots=SLOTS))
    assert [s.token_ids for s in reading.trace.segments if isinstance(s, Sampled)] == [(7, 8), (9,)]


async def test_an_opened_candidate_arrives_decoded_and_the_trace_keeps_no_picture() -> None:
    found = [with_memory(Document(f"d{i}", Content(f"t{i}", png())), i + 1, full_tokens=40) for i in range(3)]
    engine = ScriptedEngine(THOUGHT, slots=SLOTS)
    reading = await read(engine, found=found)
    full = next(s for s in engine.opened[0].segments if isinstance(s, Full))
    assert full.content is not None
    assert full.content.text == "t1"
    assert hasattr(full.content.image, "size")
    assert all(s.content is None for s in reading.trace.segments if isinstance(s, Full))
    prompt_tokens = reading.trace.usage.prompt_tokens
    assert reading.trace.usage.uncompressed_tokens == prompt_tokens + 3 * 38
    assert reading.trace.usage.inspected_tokens == 40
    assert reading.stale == ()


async def test_a_picture_that_changed_since_indexing_is_noted() -> None:
    old, new = Document("d", Content(image=png("red"))), Document("d", Content(image=png("blue")))
    changed = Candidate(new, 1.0, 2, with_memory(old, 2).memory)
    reading = await read(ScriptedEngine(THOUGHT, slots=SLOTS), found=[*candidates(1), changed, *candidates(1)])
    assert reading.stale == (1,)
    assert any("candidate 1 ('d'): its picture changed" in note for note in reading.trace.notes)


class BrokenImages:
    def __init__(self, error: Exception) -> None:
        self.error = error

    async def load(self, image: ImageInput) -> ImageData:
        raise self.error


@pytest.mark.parametrize(
    "error", [ImageError("gone"), OSError("disk"), TimeoutError("slow"), ValueError("a user's own")]
)
async def test_an_unreadable_candidate_costs_itself_only(error: Exception) -> None:
    found = [with_memory(Document(f"d{i}", Content(image=png())), i + 1) for i in range(3)]
    reading = await read(ScriptedEngine(THOUGHT, slots=SLOTS), found=found, images=BrokenImages(error))
    assert reading.outcome is not None
    assert (reading.outcome.unreadable, reading.outcome.inspected, reading.outcome.answer) == ((1,), (), 1)
    assert any("candidate 1 ('d1') could not be opened" in note for note in reading.trace.notes)


async def test_fast_reads_the_slots_and_generates_nothing() -> None:
    engine = ScriptedEngine([RuntimeError("must not be asked")], slots=SLOTS)
    reading = await read(engine, FAST)
    assert reading.outcome is None
    assert reading.problem is None
    assert reading.trace.stop_reason is None


DIRECT = SlotRead((-0.1, -2.1, -9.0))


@pytest.mark.parametrize(
    ("options", "calibrated", "direct", "expected", "note"),
    [
        (RerankOptions(think="always"), 0.0, DIRECT, True, None),
        (RerankOptions(think="never"), 9.0, DIRECT, False, None),
        (RerankOptions(think="always", ranking="logits"), None, DIRECT, False, None),
        (RerankOptions(), 2.5, DIRECT, True, None),
        (RerankOptions(), 1.5, DIRECT, False, None),
        (RerankOptions(think_margin=2.5), 0.0, DIRECT, True, None),
        (RerankOptions(think_margin=0.0), 9.0, DIRECT, False, None),
        (RerankOptions(), None, DIRECT, True, "no calibrated margin"),
        (RerankOptions(), 9.0, None, True, "offers no direct read"),
        (RerankOptions(), 0.5, SlotRead((-float("inf"),) * 3), True, None),
    ],
)
def test_when_to_think(
    options: RerankOptions, calibrated: float | None, direct: SlotRead | None, expected: bool, note: str | None
) -> None:
    think, said = should_think(options, calibrated, direct)
    assert think is expected
    assert (note in said) if note and said else (note is said)


async def test_auto_without_a_margin_says_so_in_the_trace() -> None:
    reading = await read(ScriptedEngine(THOUGHT, slots=SLOTS))
    assert any("no calibrated margin" in note for note in reading.trace.notes)


async def test_an_engine_without_a_direct_read_can_think_but_not_be_fast() -> None:
    reading = await read(ScriptedEngine(THOUGHT))
    assert reading.direct is None
    assert reading.outcome is not None
    engine = ScriptedEngine(THOUGHT)
    with pytest.raises(EngineError, match="offers no direct read"):
        await read(engine, FAST)
    assert engine.leaked == 0


@pytest.mark.parametrize("error", [EngineError("down"), RuntimeError("CUDA out of memory"), TimeoutError("socket")])
@pytest.mark.parametrize("step", ["open", "probe"])
async def test_an_engine_that_fails_before_any_reading_is_an_engine_error(step: str, error: Exception) -> None:
    engine = ScriptedEngine(THOUGHT, slots=SLOTS, failing={step: error})
    with pytest.raises(EngineError, match=r"down|CUDA out of memory|socket"):
        await read(engine)
    assert engine.leaked == 0


@pytest.mark.parametrize("error", [EngineError("down"), RuntimeError("CUDA out of memory"), TimeoutError("socket")])
@pytest.mark.parametrize("step", ["append", "generate"])
async def test_an_engine_that_fails_in_the_thought_leaves_the_direct_read(step: str, error: Exception) -> None:
    engine = ScriptedEngine(THOUGHT, slots=SLOTS, failing={step: error})
    reading = await read(engine)
    assert (reading.outcome, reading.direct is None) == (None, False)
    assert reading.problem is not None
    assert "the thought failed" in reading.problem
    assert str(error) in reading.problem
    assert reading.trace.stop_reason is StopReason.ENGINE_ERROR
    assert engine.leaked == 0
    engine = ScriptedEngine(THOUGHT, failing={step: error})
    with pytest.raises(EngineError, match=str(error)):
        await read(engine)
    assert engine.leaked == 0


async def test_an_answer_outside_the_slots_decides_nothing() -> None:
    reading = await read(ScriptedEngine(["x</think>", "the second one"], slots=SLOTS))
    assert reading.outcome is None
    assert reading.problem is not None
    assert "none of the allowed labels" in reading.problem


async def test_a_direct_read_of_the_wrong_length_is_the_engines_fault() -> None:
    with pytest.raises(EngineError, match="expected 4 slots, got 2"):
        await read(ScriptedEngine(THOUGHT, slots=(1.0, 2.0)))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
async def test_a_model_that_computes_no_numbers_decides_nothing(value: float) -> None:
    class Broken(ScriptedEngine):
        async def probe(self, handle: Any, suffix: str) -> SlotRead:
            return SlotRead((value,) * 4)

    with pytest.raises(EngineError, match=r"expected log-probabilities, got none that is finite.*try float32"):
        await read(Broken(THOUGHT))


async def test_answers_of_the_wrong_type_are_the_engines_fault() -> None:
    class Nonsense(ScriptedEngine):
        async def generate(self, handle: Any, params: Any) -> Any:
            return None

    reading = await read(Nonsense(slots=SLOTS))
    assert reading.problem is not None
    assert "thought: expected Generation, got NoneType" in reading.problem

    class Bare(ScriptedEngine):
        async def probe(self, handle: Any, suffix: str) -> Any:
            return (0.0, -1.0, -2.0, -3.0)

    with pytest.raises(EngineError, match="direct read: expected SlotRead or None, got tuple"):
        await read(Bare())


@pytest.mark.parametrize("step", ["append", "generate"])
async def test_running_out_of_time_in_the_thought_leaves_the_direct_read(step: str) -> None:
    engine = Stuck(step, THOUGHT, slots=SLOTS)
    reading = await read(engine, deadline=asyncio.get_running_loop().time() + 0.3)
    assert reading.outcome is None
    assert reading.problem is not None
    assert "timed out while thinking" in reading.problem
    assert reading.trace.stop_reason is None
    assert engine.leaked == 0


@pytest.mark.parametrize(("step", "slots"), [("open", SLOTS), ("probe", SLOTS), ("append", None), ("generate", None)])
async def test_running_out_of_time_before_anything_is_decided_is_an_error(step: str, slots: Any) -> None:
    engine = Stuck(step, THOUGHT, slots=slots)
    with pytest.raises(RerankTimeout, match="timed out"):
        await read(engine, deadline=asyncio.get_running_loop().time() + 0.3)
    assert engine.leaked == 0


@pytest.mark.parametrize("step", ["open", "probe", "append", "generate"])
async def test_cancellation_closes_the_handle(step: str) -> None:
    engine = Stuck(step, THOUGHT, slots=SLOTS)
    task = asyncio.create_task(read(engine))
    await engine.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.leaked == 0
    assert len(engine.closed) == (step != "open")


async def test_a_second_cancellation_does_not_stop_the_close() -> None:
    closed = asyncio.Event()

    class SlowClose(Stuck):
        async def close(self, handle: Any) -> None:
            await asyncio.sleep(0.02)
            closed.set()

    engine = SlowClose("generate", THOUGHT, slots=SLOTS)
    task = asyncio.create_task(read(engine))
    await engine.reached.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(5):
        await closed.wait()


async def test_a_close_that_fails_or_hangs_does_not_cost_the_result(monkeypatch: Any, caplog: Any) -> None:
    engine = ScriptedEngine(THOUGHT, slots=SLOTS, failing={"close": RuntimeError("socket gone")})
    assert (await read(engine)).outcome is not None
    assert "socket gone" in caplog.text

    class Hangs(ScriptedEngine):
        async def close(self, handle: Any) -> None:
            await asyncio.sleep(60)

    monkeypatch.setattr(driver, "CLOSE_GRACE_S", 0.01)
    async with asyncio.timeout(5):
        assert (await read(Hangs(THOUGHT, slots=SLOTS))).outcome is not None


async def test_stages_are_timed_by_the_injected_clock() -> None:
    ticks = count()
    found = [with_memory(Document(f"d{i}", Content(f"t{i}")), i + 1) for i in range(3)]
    reading = await read(ScriptedEngine(THOUGHT, slots=SLOTS), found=found, clock=lambda: float(next(ticks)))
    # one tick between the two readings of a plain stage; thinking holds the two readings of one load
    assert reading.trace.timings == {"open": 1.0, "direct_read": 1.0, "load": 1.0, "think": 3.0}


async def test_options_reach_the_engine() -> None:
    asked = []

    class Spy(ScriptedEngine):
        async def generate(self, handle: Any, params: Any) -> Generation:
            asked.append(params)
            return await super().generate(handle, params)

    options = RerankOptions(temperature=0.5, seed=3, max_new_tokens=99, max_inspections=0)
    reading = await read(Spy(THOUGHT, slots=SLOTS), options)
    assert (asked[0].temperature, asked[0].seed, asked[0].max_new_tokens) == (0.5, 3, 99)
    assert reading.problem is not None  # the script opens a candidate, and none may be opened: its answer does not come


def test_the_scripted_engine_is_an_engine() -> None:
    assert isinstance(ScriptedEngine(), Engine)
