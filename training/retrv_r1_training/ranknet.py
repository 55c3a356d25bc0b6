"""Weighted RankNet on the direct read (FIRST, arXiv 2406.15657)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retrv_r1_retriever.parser import Verdict
from retrv_r1_retriever.prompt import KEEP

FACTOR = 10.0  #: of weighted RankNet beside the language-model loss, as published


def teacher_ranks(slots: int, verdicts: Sequence[Verdict], answers: Sequence[int]) -> tuple[int, ...]:
    """Rank of each of `slots` slots, 1 = best, equal ranks for ties, 0 = takes no part.

    The right answers, then the candidates that were kept, then those eliminated (grades are ours; FIRST has a teacher's full order).
    """
    grades = {v.index: 1 if v.text == KEEP else 0 for v in verdicts} | dict.fromkeys(answers, 2)
    better = {g: sum(other > g for other in grades.values()) for g in grades.values()}
    return tuple(1 + better[grades[slot]] if slot in grades else 0 for slot in range(slots))


def ranknet(scores: Tensor, ranks: Sequence[int]) -> Tensor:
    """Mean over pairs (i better than j) of log(1 + exp(s_j - s_i)) / (rank_i + rank_j). scores (n,); rank 0 takes no part."""
    rank = torch.tensor(ranks, device=scores.device)
    better, worse = ((rank[:, None] < rank[None, :]) & (rank > 0)[:, None]).nonzero(as_tuple=True)
    if not len(better):
        return scores.sum() * 0.0
    return (F.softplus(scores[worse] - scores[better]) / (rank[better] + rank[worse])).mean()
