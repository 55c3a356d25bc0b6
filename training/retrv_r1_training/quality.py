"""What weights are worth on lists as served: one greedy pass over each, direct read and thought, by stratum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from retrv_r1_retriever.ranking import rank
from retrv_r1_retriever.types import StopReason
from retrv_r1_training.rollout import RolloutRunner, Sampling, Task


@dataclass(frozen=True, slots=True)
class Quality:
    """Shares of queries and means over them. A positive that is not in the list is a miss.

    first_stage, direct, hybrid: R@1 of the list as it came, of the direct read (`logits`), of the thought's order; hybrid_5: its R@5
    opened: candidates; refused: inspections; answered: thoughts that ended by themselves; tokens: sampled
    """

    queries: int
    first_stage: float
    direct: float
    hybrid: float
    hybrid_5: float
    opened: float
    refused: float
    answered: float
    tokens: float


def quality(runner: RolloutRunner, tasks: Sequence[Task], sampling: Sampling) -> dict[str, Quality]:
    """By stratum, and over all of them as `all`."""
    rows = []
    for task, reading in runner.readings(tasks, [0] * len(tasks), sampling):
        thought = reading.outcome
        if thought is None:
            raise RuntimeError(f"query {task.id!r}: expected a thought, got {reading.problem}")
        row: list[float] = [0 in task.right]
        for outcome, depths in ((None, (1,)), (thought, (1, 5))):
            order = rank(task.prompt.candidates, reading.direct, outcome).indices
            row += [bool(set(order[:depth]) & set(task.right)) for depth in depths]
        answered = thought.stop_reason is StopReason.ANSWERED
        rows.append((task.stratum, [*row, len(thought.inspected), thought.refused, answered, thought.sampled_tokens]))
    return by_stratum(rows)


def by_stratum(rows: Sequence[tuple[str, Sequence[float]]]) -> dict[str, Quality]:
    """Means of the values of `Quality`, in its order, a row per query."""
    parts: dict[str, list[Sequence[float]]] = {"all": [values for _, values in rows]}
    for stratum, values in rows:
        parts.setdefault(stratum, []).append(values)
    return {name: Quality(len(part), *np.mean(part, axis=0).tolist()) for name, part in sorted(parts.items())}


def plain(found: dict[str, Quality]) -> dict[str, dict[str, float]]:
    """For JSON."""
    return {stratum: {k: round(v, 4) for k, v in asdict(q).items()} for stratum, q in found.items()}
