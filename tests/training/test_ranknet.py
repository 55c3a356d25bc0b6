"""Weighted RankNet: pair weight 1/(rank_i + rank_j), ties and unranked slots take no part."""

from __future__ import annotations

import math

import pytest
import torch
from retrv_r1_training.ranknet import FACTOR, ranknet, teacher_ranks

from retrv_r1_retriever.parser import Verdict
from retrv_r1_retriever.prompt import KEEP


def test_ranks_are_answer_kept_eliminated():
    verdicts = [Verdict(0, "red"), Verdict(2, KEEP), Verdict(3, KEEP), Verdict(5, "blue")]
    assert teacher_ranks(7, verdicts, [3]) == (3, 0, 2, 1, 0, 3, 0), "slots 1, 4 are not shown; 6 is none"
    assert teacher_ranks(7, verdicts, [6]) == (4, 0, 2, 2, 0, 4, 1), "none is the answer"
    assert teacher_ranks(7, verdicts, [3, 0]) == (1, 0, 3, 1, 0, 4, 0), "two right answers, one of them eliminated"


def test_loss_is_the_mean_over_pairs_of_different_rank():
    scores, ranks = [0.3, -1.0, 2.0, 0.5, 9.0], (1, 2, 2, 4, 0)
    pairs = [(i, j) for i in range(4) for j in range(4) if ranks[i] < ranks[j]]
    want = sum(math.log1p(math.exp(scores[j] - scores[i])) / (ranks[i] + ranks[j]) for i, j in pairs) / len(pairs)
    assert ranknet(torch.tensor(scores), ranks).item() == pytest.approx(want, rel=1e-6)


def test_gradient_lifts_the_better_and_nothing_else():
    scores = torch.zeros(4, requires_grad=True)
    ranknet(scores, (1, 2, 2, 0)).backward()
    assert scores.grad[0] < 0
    assert (scores.grad[1:3] > 0).all()
    assert scores.grad[3] == 0


def test_without_a_pair_there_is_no_loss():
    scores = torch.ones(3, requires_grad=True)
    loss = ranknet(scores, (1, 1, 0))
    loss.backward()
    assert loss.item() == 0
    assert FACTOR == 10, "as published for FIRST"
