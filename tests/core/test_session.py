"""The state machine: what every engine, replay and rollout relies on."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from retrv_r1_retriever.engines.scripted import soup
from retrv_r1_retriever.parser import Check, Thought, Verdict, parse, render
from retrv_r1_retriever.prompt import INSPECT_END, INSPECT_START, NONE, NONE_INDEX, THINK_END, build_prompt, label
from retrv_r1_retriever.session import ANSWER_RESERVE, Generation, InspectionSession, Outcome, SessionLimits, Step
from retrv_r1_retriever.trace import Forced, Full, Sampled, Segment
from retrv_r1_retriever.types import Query, StopReason
from tests.helpers import candidates

K = 5
OPEN = "{}" + INSPECT_START + "{}" + INSPECT_END


def session(count: int = K, *, full: int = 10, prompt_tokens: int = 100, **limits: int | None) -> InspectionSession:
    prompt = build_prompt(Query.of("red shoe"), candidates(count))
    settings = SessionLimits(**limits)  # type: ignore[arg-type]
    return InspectionSession(prompt, settings, prompt_tokens=prompt_tokens, full_tokens=(full,) * count)


def said(text: str, tokens: int = 1, ids: tuple[int, ...] | None = None, **rest: object) -> Generation:
    stop = next((tag for tag in (INSPECT_END, THINK_END) if text.endswith(tag)), None)
    return Generation(text, tokens, stop, ids, **rest)  # type: ignore[arg-type]


def request(index: int, text: str = "") -> Generation:
    return said(OPEN.format(text, label(index)))


def run(machine: InspectionSession, *generations: Generation) -> tuple[list[Step], Outcome]:
    steps = [machine.begin()]
    for generation in generations:
        steps.append(machine.receive(generation))
    assert steps[-1].generate is None
    return steps, machine.outcome()


def drive(machine: InspectionSession, rng: random.Random) -> tuple[list[Segment], list[list[Segment]], int]:
    """As a driver does it, against an engine that writes soup: what the engine saw, its prompt at every step, and the steps."""
    step, seen, prompts, steps = machine.begin(), list[Segment](), list[list[Segment]](), 0
    while step.generate is not None:
        steps += 1
        full = next((s for s in step.append if isinstance(s, Full)), None)
        if full is not None and rng.random() < 0.2:
            step = machine.unreadable(full.index)
            continue
        seen += step.append
        prompts.append(list(seen))
        ids = rng.choice((None, (1, 2)))
        text = rng.choice(step.generate.allowed) if step.generate.allowed else soup(rng)
        generation = said(text, rng.choice((0, 1, 30)), ids)
        seen.append(Sampled(generation.text, generation.token_ids, generation.logprobs))
        step = machine.receive(generation)
    return seen, prompts, steps


limits = st.fixed_dictionaries(
    {
        "max_inspections": st.integers(0, 6),
        "max_new_tokens": st.integers(1, 80),
        "max_context": st.none() | st.integers(100, 300),
    }
)


@given(limits, st.integers(0, 2**32))
@example({"max_inspections": 4, "max_new_tokens": 1, "max_context": None}, 0)
def test_any_engine_is_brought_to_an_end_within_bounds(bounds: dict[str, int | None], seed: int) -> None:
    machine = session(**bounds)
    seen, prompts, steps = drive(machine, random.Random(seed))
    outcome = machine.outcome()
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(prompts))
    assert list(outcome.segments[len(outcome.segments) - len(seen) - 1 : -1]) == seen  # ids and all, then </answer>
    assert outcome.segments[-1] == Forced("</answer>")
    opened = [s.index for s in outcome.segments if isinstance(s, Full)]
    assert opened == list(outcome.inspected)
    assert len(set(opened)) == len(opened) <= (bounds["max_inspections"] or 0)
    assert all(0 <= i < K for i in (*opened, *outcome.unreadable))
    assert outcome.answer == NONE_INDEX or outcome.answer in range(K)
    assert outcome.thought.answer == outcome.answer
    assert steps <= 2 * (bounds["max_new_tokens"] or 0) + 2
    if bounds["max_context"] is not None:
        cost = 100 + 10 * len(opened)  # what the session knows before the model writes
        assert not opened or cost + ANSWER_RESERVE < bounds["max_context"]


@given(limits, st.integers(0, 2**32))
def test_only_sampled_segments_hold_what_the_model_wrote(bounds: dict[str, int | None], seed: int) -> None:
    machine = session(**bounds)
    seen, _, _ = drive(machine, random.Random(seed))
    wrote = [s for s in seen if isinstance(s, Sampled)]
    turn = machine.outcome().segments[-len(seen) - 1 :]
    assert [s for s in turn if isinstance(s, Sampled)] == wrote
    assert all(isinstance(s, Forced | Full) for s in turn if not isinstance(s, Sampled))


def test_a_teacher_writes_exactly_what_a_session_produces() -> None:
    thought = Thought(
        "red shoe",
        (Verdict(0, "wrong colour"), Verdict(3, "keep")),
        (Check(3, "it differs", False), Check(1, "this is a match", True)),
        1,
    )
    turn = render(thought)
    texts = [said(s.text) for s in turn if isinstance(s, Sampled)]
    _, outcome = run(session(), *texts)
    assert outcome.segments[-len(turn) :] == turn
    assert outcome.thought == parse(turn) == thought


def test_refused_inspections_cost_a_count_and_nothing_else() -> None:
    malformed = said(f"{INSPECT_START}{NONE}{INSPECT_END}")
    steps, outcome = run(
        session(), request(3), request(3), request(77), malformed, said("x" + THINK_END), said(label(3))
    )
    assert [s.append for s in steps[2:5]] == [(), (), ()]
    assert (outcome.refused, outcome.inspected, outcome.answer) == (3, (3,), 3)
    assert outcome.stop_reason is StopReason.ANSWERED


def test_a_loop_of_refused_inspections_ends_the_thought() -> None:
    _, outcome = run(session(max_inspections=2), request(3), request(3), request(3), request(3), said(label(3)))
    assert (outcome.refused, outcome.inspected, outcome.answer) == (3, (3,), 3)
    assert outcome.stop_reason is StopReason.FORCED_BY_BUDGET


def test_spent_inspections_force_the_answer() -> None:
    steps, outcome = run(session(max_inspections=1, temperature=1), request(3), request(2), said(NONE))
    assert steps[2].append == (Forced("</think><answer>"),)
    assert steps[2].generate is not None
    assert steps[2].generate.allowed == (*map(label, range(K)), NONE)
    assert (steps[2].generate.temperature, steps[2].generate.max_new_tokens) == (0.0, 1)
    assert (outcome.stop_reason, outcome.answer) == (StopReason.FORCED_BY_BUDGET, NONE_INDEX)


def test_spent_tokens_force_the_answer_before_anything_is_opened() -> None:
    asked = said(OPEN.format("long ", label(2)), tokens=10)
    _, outcome = run(session(max_new_tokens=10), asked, said(label(0)))
    assert (outcome.inspected, outcome.stop_reason) == ((), StopReason.FORCED_BY_BUDGET)


def test_an_engine_that_reports_no_tokens_still_runs_out_of_them() -> None:
    machine = session(max_new_tokens=5)
    step = machine.begin()
    for _ in range(5):
        assert step.generate is not None
        assert not step.generate.allowed
        step = machine.receive(said(INSPECT_END, tokens=0))
    assert step.generate is not None
    assert step.generate.allowed


def test_the_context_budget_is_checked_before_a_candidate_is_opened() -> None:
    fits = 100 + 1 + 10 + ANSWER_RESERVE + 1
    _, outcome = run(session(max_context=fits), request(2), said("x"), said(label(0)))
    assert outcome.inspected == (2,)
    _, outcome = run(session(max_context=fits - 1), request(2), said(label(0)))
    assert (outcome.inspected, outcome.stop_reason) == ((), StopReason.CONTEXT_OVERFLOW)


def test_an_unreadable_candidate_stays_closed_and_cannot_be_asked_for_again() -> None:
    machine = session(max_inspections=1)
    machine.begin()
    machine.receive(request(2))
    assert machine.unreadable(2).append == ()
    assert machine.receive(request(2)).append == ()
    assert machine.receive(request(1)).append == (Full(1),)
    machine.receive(said(THINK_END))
    machine.receive(said(label(1)))
    outcome = machine.outcome()
    assert (outcome.unreadable, outcome.inspected, outcome.refused) == ((2,), (1,), 1)


def test_only_what_was_just_opened_can_be_unreadable() -> None:
    machine = session()
    machine.begin()
    with pytest.raises(RuntimeError, match="candidate 2 was not just opened"):
        machine.unreadable(2)


def test_verdicts_are_taken_from_the_elimination_only_and_first_counts() -> None:
    first = said(OPEN.format("", label(2)), tracked=((0, -0.1), (0, -5.0), (77, -1.0), (-1, -1.0)))
    check = said(THINK_END, tracked=((1, -9.0),))
    _, outcome = run(session(), first, check, said(label(2)))
    assert outcome.keep_logprobs == ((0, -0.1),)


def test_the_answer_is_the_sessions_not_what_the_thought_pretends() -> None:
    _, outcome = run(session(), said(f"<answer>{label(4)}</answer>{THINK_END}"), said(label(1)))
    assert outcome.answer == outcome.thought.answer == 1


@pytest.mark.parametrize("text", ["", "<|c77|>", "candidate 1", "<|c1|><|c2|>"])
def test_an_answer_outside_the_slots_is_no_answer(text: str) -> None:
    assert run(session(), said(THINK_END), said(text))[1].answer is None


def test_sessions_are_single_use() -> None:
    machine = session()
    with pytest.raises(RuntimeError, match="session is new, not thinking"):
        machine.receive(said("x"))
    machine.begin()
    with pytest.raises(RuntimeError, match="session is thinking, not new"):
        machine.begin()
    with pytest.raises(RuntimeError, match="session is thinking, not done"):
        machine.outcome()
    machine.fail()
    assert machine.outcome().stop_reason is StopReason.ENGINE_ERROR
    with pytest.raises(RuntimeError, match="single-use"):
        machine.begin()


def test_counts_must_fit_the_candidates() -> None:
    prompt = build_prompt(Query.of("q"), candidates(3))
    with pytest.raises(ValueError, match="expected 3 counts, got 2"):
        InspectionSession(prompt, SessionLimits(), full_tokens=(1, 2))
