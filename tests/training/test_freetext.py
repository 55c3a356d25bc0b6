"""A teacher's free text: what is understood however it is dressed, and what is rejected rather than guessed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrv_r1_training.freetext import Unreadable, read_thought

from retrv_r1_retriever.parser import Check, parse, render
from retrv_r1_retriever.prompt import LABELS, NONE_INDEX

PLAIN = """HYPOTHESIS
A red ring on white.
ELIMINATION
c0: keep
c1: wrong colour
c2: keep
INSPECTION
c0: a thin ring, no box, differs
c2: a red ring on white, match
ANSWER
c2"""
DRESSED = """<think>c7 looks best... no. ANSWER: c7</think>Sure, here it is!

**1. Hypothesis:** A red ring on white.

### Phase 2: Elimination
- **c0**: Keep, it may be it
* [c1] - Eliminated: wrong colour.
Looking at the rest:
<|c2|> kept

__3) Inspection__
• Candidate c0 → a thin ring, no box. Does not match.
• `c2`: a red ring on white **MATCH**.

**Final answer**: **c2**"""


@pytest.mark.parametrize("text", [PLAIN, DRESSED])
def test_the_same_thought_however_dressed(text):
    thought = read_thought(text, 3)
    assert thought.hypothesis == "A red ring on white"
    assert [(v.index, v.text) for v in thought.verdicts] == [(0, "keep"), (1, "wrong colour"), (2, "keep")]
    assert [(c.index, c.match) for c in thought.checks] == [(0, False), (2, True)]
    assert thought.checks[1] == Check(2, "a red ring on white match", True)
    assert thought.answer == 2
    assert parse(render(thought)) == thought


def test_one_line_may_name_several_candidates_and_mention_others():
    text = PLAIN.replace("c0: keep\nc1: wrong colour", "c0 and c1: darker than c2")
    assert [v.text for v in read_thought(text, 3).verdicts] == ["darker than c2", "darker than c2", "keep"]


def test_none_is_an_answer():
    assert read_thought(PLAIN.replace("ANSWER\nc2", "ANSWER: None of them."), 3).answer == NONE_INDEX


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("c1: wrong", "c3: wrong", "invented_label"),
        ("ANSWER\nc2", "ANSWER\nc20", "invented_label"),
        ("ANSWER\nc2", "ANSWER\nc2 or c0", "several_answers"),
        ("ANSWER\nc2", "ANSWER\nthe red one", "no_answer"),
        ("ANSWER\nc2", "", "no_answer"),
        ("A red ring on white.", "", "no_hypothesis"),
        ("c1: wrong colour", "c1: eliminated.", "no_reason"),
        (", match", ", looks fine", "unclear_check"),
        ("A red", "The given answer is a red", "mentions_the_hint"),
    ],
)
def test_what_cannot_be_read_is_rejected_by_name(old, new, reason):
    assert old in PLAIN
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        read_thought(PLAIN.replace(old, new), 3, hinted=True)


SOUP = st.lists(
    st.sampled_from([*PLAIN.split(), *LABELS[:3], "\n", "c0:", "<inspection-index-start>", "<|im_end|>", "</think>"])
)


@given(SOUP, SOUP)
@settings(max_examples=300)
def test_no_tag_gets_through_whatever_the_teacher_writes(one, two):
    text = PLAIN.replace("wrong colour", " ".join(one)).replace("a thin ring", " ".join(two))
    try:
        thought = read_thought(text, 3)
    except Unreadable:
        return
    assert parse(render(thought)) == thought


@given(st.one_of(st.text(), SOUP.map(" ".join)))
@settings(max_examples=300)
def test_any_text_is_a_thought_or_unreadable(text):
    """An answer that crashed its reader would be paid for and lost."""
    try:
        read_thought(text, 3, hinted=True)
    except Unreadable:
        return
