"""Whatever the model said: a full permutation, a score that sorts the same way, and no dependence on the input's order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from retrv_r1_retriever.engines.base import SlotRead
from retrv_r1_retriever.options import Ranking
from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.prompt import NONE_INDEX
from retrv_r1_retriever.ranking import Order, rank, score, to_results
from retrv_r1_retriever.session import Outcome
from retrv_r1_retriever.types import Candidate, StopReason
from tests.helpers import candidates

any_number = st.floats() | st.sampled_from((-1.0, -2.0))


def outcome(
    answer: int | None,
    *,
    keep: dict[int, float] | None = None,
    verdicts: dict[int, str] | None = None,
    checks: dict[int, bool | None] | None = None,
) -> Outcome:
    thought = Thought(
        verdicts=tuple(Verdict(i, text) for i, text in (verdicts or {}).items()),
        checks=tuple(Check(i, "", match) for i, match in (checks or {}).items()),
        answer=answer,
    )
    opened = tuple(checks or {})
    return Outcome(
        (), thought, answer, StopReason.ANSWERED, opened, (), 0, 0, tuple((keep or {}).items()), answer_logprobs=None
    )


@st.composite
def inputs(
    draw: st.DrawFn, numbers: st.SearchStrategy[float] = any_number
) -> tuple[list[Candidate], SlotRead | None, Outcome | None]:
    count = draw(st.integers(1, 12))
    index = st.integers(0, count - 1)
    direct = draw(st.none() | st.lists(numbers, min_size=count + 1, max_size=count + 1).map(tuple).map(SlotRead))
    wild = st.integers(0, 126)  # a broken thought may talk about labels that are not in the prompt
    said = draw(
        st.none()
        | st.builds(
            outcome,
            index | st.just(NONE_INDEX),
            keep=st.dictionaries(index, numbers),
            verdicts=st.dictionaries(wild, st.sampled_from(("keep", "too red"))),
            checks=st.dictionaries(index, st.sampled_from((True, False, None))),
        )
    )
    assume(direct is not None or said is not None)
    return candidates(count), direct, said


modes = st.sampled_from(("hybrid", "logits", "promote"))


@given(inputs(), modes)
def test_always_a_permutation_with_a_strictly_falling_score(
    given_inputs: tuple[list[Candidate], SlotRead | None, Outcome | None], mode: Ranking
) -> None:
    found, direct, said = given_inputs
    assume(mode != "logits" or direct is not None)
    order = rank(found, direct, said, mode)
    results = to_results(found, order)
    assert sorted(order.indices) == list(range(len(found)))
    assert [r.rank for r in results] == list(range(1, len(found) + 1))
    assert results[0].score == 1.0
    scores = [r.score for r in results if r.score is not None]
    assert all(0 < b < a <= 1 for a, b in pairwise(scores))
    assert sum(r.selected for r in results) == (order.answer is not None)
    assert not (order.none_chosen and order.answer is not None)
    if order.answer is not None:
        assert results[0].selected


@given(inputs(), modes, st.randoms())
def test_permuting_the_candidates_permutes_nothing_in_the_result(
    given_inputs: tuple[list[Candidate], SlotRead | None, Outcome | None], mode: Ranking, random: Random
) -> None:
    found, direct, said = given_inputs
    assume(mode != "logits" or direct is not None)
    places = list(range(len(found)))
    random.shuffle(places)
    new = {old: place for place, old in enumerate(places)}
    moved = [found[old] for old in places]
    moved_direct = direct and SlotRead((*(direct.logprobs[old] for old in places), direct.logprobs[-1]))
    assert _ids(moved, rank(moved, moved_direct, said and _moved(said, new), mode)) == _ids(
        found, rank(found, direct, said, mode)
    )


@given(st.integers(1, 127), st.integers(1, 127), st.randoms())
def test_later_sorts_and_cutoffs_by_score_keep_our_order(count: int, cut: int, random: Random) -> None:
    found = candidates(count)
    judged = found[: random.randint(1, count)]
    direct = SlotRead(tuple(random.gauss(0, 1) for _ in range(len(judged) + 1)))
    results = to_results(judged, rank(judged, direct, None), found[len(judged) :])
    shuffled = random.sample(results, count)
    assert sorted(shuffled, key=lambda r: r.score or 0, reverse=True) == list(results)
    cut = min(cut, count)
    assert [r for r in results if (r.score or 0) >= score(cut, count)] == list(results[:cut])


def test_hybrid_groups() -> None:
    found = candidates(8)
    direct = SlotRead(tuple(math.log(p) for p in (0.02, 0.02, 0.02, 0.02, 0.3, 0.02, 0.02, 0.02, 0.56)))
    said = outcome(
        2,
        keep={0: -0.5, 1: -3.0, 2: -1.0, 3: -0.1, 5: -0.2, 6: -0.05},
        checks={2: True, 3: False, 5: None, 6: True},
    )
    order = rank(found, direct, said, "hybrid")
    # answer; opened-and-matching and unopened by value, unlisted 4 (p .3) before listed 1 (p .05) before unlisted 7; rejected
    assert order.indices == (2, 6, 0, 4, 1, 7, 3, 5)


def test_without_a_direct_read_unlisted_ones_stand_at_chance_level_in_first_stage_order() -> None:
    said = outcome(0, keep={1: math.log(0.5), 2: math.log(0.01)})
    assert rank(candidates(5), None, said).indices == (0, 1, 3, 4, 2)


def test_verdicts_without_probabilities_count_as_certain() -> None:
    said = outcome(3, verdicts={0: "wrong colour", 1: "keep"})
    direct = SlotRead((-0.1, -9.0, -3.0, -4.0, -5.0))
    assert rank(candidates(4), direct, said).indices == (3, 1, 2, 0)


def test_none_selects_nothing_and_orders_by_the_rest() -> None:
    order = rank(candidates(3), None, outcome(NONE_INDEX, keep={0: -5.0, 1: -1.0, 2: -2.0}))
    assert (order.indices, order.answer, order.none_chosen) == ((1, 2, 0), None, True)


@pytest.mark.parametrize(
    ("none_margin", "expected"),
    [(None, ((1, 2, 0), None, True)), (0.5, ((1, 2, 0), None, True)), (0.6, ((1, 2, 0), 1, False))],
)
def test_none_needs_its_calibrated_lead_in_the_direct_read(
    none_margin: float | None, expected: tuple[object, ...]
) -> None:
    order = rank(candidates(3), SlotRead((-3.0, -1.0, -2.0, -0.5)), None, none_margin=none_margin)
    assert (order.indices, order.answer, order.none_chosen) == expected


@pytest.mark.parametrize(
    ("said", "lead", "none_margin", "expected"),
    [
        (NONE_INDEX, 2.0, 3.0, ((2, 1, 0), 2, False)),  # none is not sure enough: the best slot behind the thought
        (NONE_INDEX, 2.0, 1.0, ((1, 0, 2), None, True)),
        (2, -1.0, -2.0, ((2, 1, 0), None, True)),  # sure enough of none: the answer stays first, but is not chosen
        (2, -1.0, -0.5, ((2, 1, 0), 2, False)),
    ],
)
def test_behind_a_thought_its_own_answer_is_what_none_must_lead(
    said: int, lead: float, none_margin: float, expected: tuple[object, ...]
) -> None:
    thought = replace(outcome(said, keep={0: -2.0, 1: -1.0, 2: -9.0}), answer_logprobs=(-9.0, -8.0, -3.0, -3.0 + lead))
    misleading = SlotRead((0.0, -9.0, -9.0, -9.0))
    order = rank(candidates(3), misleading, thought, none_margin=none_margin)
    assert (order.indices, order.answer, order.none_chosen) == expected


def test_without_probabilities_behind_the_answer_the_model_is_believed() -> None:
    assert rank(candidates(3), None, outcome(NONE_INDEX), none_margin=9.0).none_chosen


def test_logits_is_the_direct_read_and_ignores_the_thought() -> None:
    direct = SlotRead((-3.0, -1.0, -2.0, -9.0))
    assert rank(candidates(3), direct, outcome(0), "logits").indices == (1, 2, 0)
    assert rank(candidates(3), SlotRead((-3.0, -1.0, -2.0, -0.5)), None, "logits").none_chosen


def test_promote_moves_one() -> None:
    assert rank(candidates(4), None, outcome(2, keep={3: 0.0}), "promote").indices == (2, 0, 1, 3)


def test_ties_break_by_first_stage_rank() -> None:
    found = [replace(c, rank=4 - i) for i, c in enumerate(candidates(4))]
    assert rank(found, SlotRead((-1.0,) * 5), None).indices == (3, 2, 1, 0)


@example([math.nan, math.nan, math.nan])
@given(st.lists(st.sampled_from((math.nan, math.inf, -math.inf)), min_size=3, max_size=3))
def test_broken_numbers_still_give_an_order(logprobs: list[float]) -> None:
    assert sorted(rank(candidates(2), SlotRead(tuple(logprobs)), None).indices) == [0, 1]


def test_a_number_that_is_none_counts_as_impossible() -> None:
    assert rank(candidates(4), SlotRead((math.nan, -2.0, math.nan, -1.0, -9.0)), None).indices == (3, 1, 0, 2)
    assert rank(candidates(3), None, outcome(2, keep={0: math.nan, 1: -50.0})).indices == (2, 1, 0)


def test_raw_signals_are_kept() -> None:
    said = outcome(0, keep={0: -0.5}, verdicts={0: "keep"}, checks={0: True})
    signals = rank(candidates(1), SlotRead((-0.1, -2.0)), said).signals[0]
    assert (signals.keep_logprob, signals.slot_logprob, signals.verdict) == (-0.5, -0.1, "keep")
    assert (signals.opened, signals.match) == (True, True)


def test_nothing_to_rank_by_is_an_error() -> None:
    with pytest.raises(ValueError, match="neither a direct read nor a usable thought"):
        rank(candidates(2), None, None)
    with pytest.raises(ValueError, match="ranking='logits'"):
        rank(candidates(2), None, outcome(0), "logits")
    with pytest.raises(ValueError, match="expected 3 slots, got 2"):
        rank(candidates(2), SlotRead((0.0, 0.0)), None)


def _ids(found: Sequence[Candidate], order: Order) -> list[str]:
    return [r.document.id for r in to_results(found, order)]


def _moved(said: Outcome, new: dict[int, int]) -> Outcome:
    thought = replace(
        said.thought,
        verdicts=tuple(Verdict(new.get(v.index, v.index), v.text) for v in said.thought.verdicts),
        checks=tuple(Check(new[c.index], c.text, c.match) for c in said.thought.checks),
    )
    answer = said.answer if said.answer in (None, NONE_INDEX) else new[said.answer]
    return replace(
        said,
        thought=thought,
        answer=answer,
        inspected=tuple(new[i] for i in said.inspected),
        keep_logprobs=tuple((new[i], p) for i, p in said.keep_logprobs),
    )
