"""The model-free teacher: what it writes is what a session would produce, and it is right."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrv_r1_training.teacher import Caption, TeacherStyle, agrees, check_text, verdict, wanted, write_thought

from retrv_r1_retriever.demo.catalogue import ATTRIBUTES, Card, LabelledQuery
from retrv_r1_retriever.parser import parse, render
from retrv_r1_retriever.prompt import INSPECT_END, KEEP, NONE_INDEX, THINK_END, build_prompt
from retrv_r1_retriever.session import Generation, InspectionSession, SessionLimits
from retrv_r1_retriever.trace import Full, Sampled
from retrv_r1_retriever.types import Candidate, Content, Document, Query, StopReason

CARD = st.builds(
    Card,
    st.tuples(*(st.sampled_from(values[:2]) for values in ATTRIBUTES.values())),
    st.sampled_from(["000", "001", "100"]),
)


@given(st.lists(CARD, min_size=2, max_size=12), st.integers(0, 99), st.booleans())
@settings(max_examples=200)
def test_a_session_replays_every_thought_to_its_answer(cards, seed, coarse_query):
    rng = random.Random(seed)
    target = rng.randrange(len(cards))
    want = Caption.of(cards[target].coarse_text if coarse_query else cards[target].text)
    captions = [Caption.of(c.text) for c in cards]
    known = [i for i, c in enumerate(captions) if agrees(c, want)]
    answer = target if target in known[:1] else None
    style = TeacherStyle(extra=rng.random(), exhaustive=rng.random(), careful=rng.random())
    thought = write_thought(dict(enumerate(captions)), want, answer, rng, style)
    turn = render(thought)
    assert parse(turn) == thought
    prompt = build_prompt(
        Query.of("q"), [Candidate(Document(str(i), Content("x")), None, i + 1) for i in range(len(cards))]
    )
    outcome = replay(prompt, turn)
    assert outcome.segments == (*prompt.segments, *turn)
    assert outcome.stop_reason is StopReason.ANSWERED
    assert outcome.answer == (NONE_INDEX if answer is None else answer)
    assert outcome.refused == 0
    assert len(set(outcome.inspected)) == len(outcome.inspected) <= style.max_inspections


def replay(prompt, turn):
    session = InspectionSession(prompt, SessionLimits(max_new_tokens=10_000))
    step = session.begin()
    sampled = iter(s for s in turn if isinstance(s, Sampled))
    while step.generate is not None:
        text = next(sampled).text
        stop = next((s for s in step.generate.stop if text.endswith(s)), None)
        assert stop in (INSPECT_END, THINK_END, None)
        step = session.receive(Generation(text, 1, stop))
    return session.outcome()


def test_verdict_is_the_first_contradiction():
    want = Caption.of("two red circle plain thin a1 b2 c3")
    assert verdict(Caption.of("two red circle plain thin a9 b9 c9"), want) == KEEP
    assert verdict(Caption.of("two blue square plain thin a1 b2 c3"), want) == "blue"


def test_check_reads_the_code_aloud():
    want = Caption.of("two red circle plain thin a1 b2 c3")
    assert check_text(Caption.of("two red circle plain thin a1 b9 c3"), want) == "a1 same b9 diff c3 same differs"
    assert check_text(want, want).endswith("same match")
    assert check_text(Caption.of("one red circle plain thin a1 b2 c3"), want).endswith("same differs")


@pytest.mark.parametrize(
    ("text", "image", "fine"), [("two red", None, ()), ("two red a1", None, ("a1",)), (None, b"x", ("a1",))]
)
def test_a_text_query_without_a_code_does_not_know_it(text, image, fine):
    query = LabelledQuery(Query(Content(text, image)), "t2i", "coarse", ("1",), "image", "two red a1")
    assert wanted(query) == Caption(("two", "red"), fine)


def test_siblings_are_opened_until_the_match():
    want = Caption.of("two red a1 b1 c1")
    captions = [Caption.of(t) for t in ("two red a2 b1 c1", "one red a1 b1 c1", "two red a1 b1 c1", "two red a1 b1 c9")]
    thought = write_thought(dict(enumerate(captions)), want, 2, random.Random(0), TeacherStyle(0.0, 0.0, 0.0))
    assert [c.index for c in thought.checks] == [0, 2]
    assert Full(2) in render(thought)
