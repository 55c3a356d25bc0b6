"""The reward, formula by formula."""

from __future__ import annotations

import pytest
from retrv_r1_training.reward import is_well_formed, penalty_at, progress, reward

from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.session import Outcome
from retrv_r1_retriever.types import StopReason

THOUGHT = Thought("red", (Verdict(0, "keep"), Verdict(1, "blue")), (Check(0, "same match", True),), 0)


def outcome(**changes) -> Outcome:
    values = {
        "segments": (), "thought": THOUGHT, "answer": 0, "stop_reason": StopReason.ANSWERED, "inspected": (0,),
        "unreadable": (), "refused": 0, "sampled_tokens": 9, "keep_logprobs": (), "answer_logprobs": None,
    }  # fmt: skip
    return Outcome(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "penalty", "expected"),
    [
        ({}, 0.0, 1.2),
        ({}, 0.5, 0.2 + 1 - 0.5 / 20),
        ({"inspected": (0, 3), "thought": Thought("red", (Verdict(0, "keep"),), (Check(0, "", True), Check(3, "", False)), 0)}, 1.0,
         0.2 + 1 - 2 / 20),
        ({"answer": 1}, 1.0, 0.2),
        ({"answer": 7}, 0.0, 1.2),
        ({"refused": 1}, 0.0, 1.0),
        ({"stop_reason": StopReason.FORCED_BY_BUDGET}, 0.0, 0.0),  # right, but not the policy's own answer
        ({"thought": Thought("red", (), (Check(0, "", True),), 0)}, 0.0, 1.0),
        ({"thought": Thought("red", (Verdict(0, "keep"),), (Check(0, "same"),), 0)}, 0.0, 1.0),
        ({"answer": None, "stop_reason": StopReason.ENGINE_ERROR}, 0.0, 0.0),
    ],
)  # fmt: skip
def test_reward(changes, penalty, expected):
    assert reward(outcome(**changes), (0, 7), 20, penalty, 0.2).total == pytest.approx(expected)


def test_an_unreadable_candidate_costs_no_format():
    assert is_well_formed(outcome(inspected=(0,), unreadable=(4,)))


def test_one_progress_variable():
    assert [progress(s, 4) for s in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert penalty_at("progress", 0.25) == 0.25
    assert penalty_at(0.5, 0.25) == 0.5
