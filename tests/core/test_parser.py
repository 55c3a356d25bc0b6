"""The grammar both ways, on canonical thoughts and on any text at all."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from retrv_r1_retriever.parser import (
    Check,
    Thought,
    Verdict,
    answer_segments,
    parse,
    readable,
    render,
    requested_inspection,
)
from retrv_r1_retriever.prompt import (
    ADDED_TOKENS,
    DIFFERS,
    INSPECT_END,
    INSPECT_START,
    KEEP,
    LABELS,
    MATCH,
    NONE,
    NONE_INDEX,
    escape,
    label,
)
from retrv_r1_retriever.trace import Forced, Full, Sampled

# Canonical: text as it leaves `parse`, that is stripped and free of tags.
words = st.text(max_size=30).map(escape).map(str.strip)
indices = st.integers(0, len(LABELS) - 1)


@st.composite
def thoughts(draw: st.DrawFn) -> Thought:
    verdicts = [Verdict(i, draw(st.just(KEEP) | words)) for i in draw(st.lists(indices, unique=True, max_size=6))]
    checks = []
    for index in draw(st.lists(indices, max_size=4)):
        text, match = draw(words), draw(st.sampled_from((None, True, False)))
        last = {True: MATCH, False: DIFFERS, None: "unclear"}[match]
        checks.append(Check(index, f"{text} {last}".strip(), match))
    answer = draw(st.none() | indices | st.just(NONE_INDEX))
    return Thought(draw(words), tuple(verdicts), tuple(checks), answer)


@given(thoughts())
def test_parse_reads_back_what_render_wrote(thought: Thought) -> None:
    assert parse(render(thought)) == thought


@given(thoughts())
def test_only_sampled_segments_would_carry_loss_and_openers_are_forced(thought: Thought) -> None:
    turn = render(thought)
    assert all(isinstance(s, Sampled | Forced | Full) for s in turn)
    sampled = "".join(s.text for s in turn if isinstance(s, Sampled))
    assert "<think>" not in sampled
    assert "answer>" not in sampled


soup = st.lists(
    st.sampled_from(ADDED_TOKENS) | st.text(max_size=5) | st.sampled_from(("<|c127|>", "<|c٣|>", "</"))
).map("".join)
segments = st.lists(
    st.builds(Sampled, soup) | st.builds(Forced, soup) | st.builds(Full, st.integers(0, 200)), max_size=8
)


@given(segments)
@example([Forced("<think>"), Sampled("no label at all</think>"), Forced("<answer>")])
@example([Sampled("</think></think><answer>")])
def test_parse_is_total(turn: list[Sampled | Forced | Full]) -> None:
    thought = parse(turn)
    assert len({v.index for v in thought.verdicts}) == len(thought.verdicts)
    assert all(0 <= v.index < len(LABELS) for v in thought.verdicts)
    assert thought.answer is None or 0 <= thought.answer <= NONE_INDEX


def test_text_after_a_closed_thought_is_no_answer() -> None:
    turn = (Forced("<think>"), Sampled(f"x</think>{label(3)}"), Forced("<answer>"), Sampled(label(5)))
    assert parse(turn).answer == 5


def test_one_opening_has_one_check_however_often_the_thought_is_closed() -> None:
    turn = (Forced("<think>"), Sampled("x"), Full(2), Sampled(" a match</think><think> it differs</think>"))
    assert parse(turn).checks == (Check(2, "a match", True),)


def test_refused_requests_are_no_part_of_what_was_said() -> None:
    request = f"{INSPECT_START}{label(9)}{INSPECT_END}"
    turn = (Forced("<think>"), Sampled(f" red{label(1)} keep{request}"), Sampled(f"{label(2)} blue</think>"))
    assert parse(turn) == Thought("red", (Verdict(1, "keep"), Verdict(2, "blue")))


@pytest.mark.parametrize("text", ["", f"{INSPECT_START}{INSPECT_END}", f"{INSPECT_START}<|c127|>{INSPECT_END}",
                                  f"{label(3)}{INSPECT_END}", f"{INSPECT_START}{NONE}{INSPECT_END}"])  # fmt: skip
def test_malformed_requests_name_nobody(text: str) -> None:
    assert requested_inspection(text) is None


@given(indices)
def test_a_request_names_its_label(index: int) -> None:
    assert requested_inspection(f"x{INSPECT_START}{label(index)}{INSPECT_END}") == index


@given(st.none() | indices | st.just(NONE_INDEX))
def test_a_direct_answer_parses(answer: int | None) -> None:
    assert parse(answer_segments(answer)) == Thought(answer=answer)


hostile = st.lists(
    st.sampled_from((*ADDED_TOKENS, "<", "|", ">", "‹", "›", "</", "<|", "|>", "<|im_end|>")) | st.text()
).map("".join)


@given(hostile)
@example("<|</think>|>")
@example("<<|c3|>|c4|>")
@example("\ud800<|c\udfff3|>")
def test_escaped_text_holds_no_tag_and_stays_as_it_is(text: str) -> None:
    escaped = escape(text)
    assert not any(token in escaped for token in (*ADDED_TOKENS, "<|im_end|>"))
    assert escape(escaped) == escaped
    escaped.encode()  # a tokenizer takes it


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="<>")))
def test_harmless_text_is_not_touched(text: str) -> None:
    assert escape(text) == text


def test_half_characters_become_whole_ones() -> None:
    """As texts that were cut in the middle of a UTF-16 pair have them; tokenizers and servers refuse them."""
    assert escape("cut \ud83d") == "cut \ufffd"
    assert escape("\udc00<|c3|>") == "\ufffd‹|c3|›"
    assert escape("whole \U0001f600") == "whole \U0001f600"


def test_readable_words_hold_no_label() -> None:
    names = {0: "#4", 1: "#1"}
    text = f"a4 same b7 differs differs{label(0)} red{label(9)}{NONE}{NONE}{NONE} x <|c999|>"
    words = readable(text, lambda index: names.get(index, "?"))
    assert words == "a4 same b7 differs differs #4 red ? none (×3) x ?"
