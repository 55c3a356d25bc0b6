"""The reward of one thought, and the one progress variable of a run.

    reward = r_f + 1[correct] * (1 - lambda * N_ins / K)        (arXiv 2510.02745, result-efficiency reward)

N_ins counts distinct opened candidates. The paper does not say what r_f is worth; ours is `format_weight`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from retrv_r1_retriever.session import Outcome
from retrv_r1_retriever.types import StopReason


@dataclass(frozen=True, slots=True)
class Reward:
    """format + result, with what they were made of."""

    format: float
    result: float

    @property
    def total(self) -> float:
        return self.format + self.result


def progress(step: int, max_steps: int) -> float:
    """Share of the run that is done, in [0, 1]: the only clock that rewards may read. From the saved step, so exact after a resume."""
    return min(1.0, step / max_steps)


def penalty_at(penalty: str | float, done: float) -> float:
    """lambda: `progress` is the paper's curriculum i / N_iter, a number is held fixed."""
    return done if penalty == "progress" else float(penalty)


def reward(outcome: Outcome, right: Collection[int], top_k: int, penalty: float, format_weight: float) -> Reward:
    """right: slots of the right answers; any of them counts as much as another."""
    result = 1.0 - penalty * len(outcome.inspected) / top_k if is_correct(outcome, right) else 0.0
    return Reward(format_weight if is_well_formed(outcome) else 0.0, result)


def is_correct(outcome: Outcome, right: Collection[int]) -> bool:
    """The policy's own answer is right. One that a spent budget forced is an arg-max and not its own, and where it counted, the policy
    learned to ask for the same candidate until the budget was spent (docs/experiments.md).
    """
    return outcome.stop_reason is StopReason.ANSWERED and outcome.answer in right


def is_well_formed(outcome: Outcome) -> bool:
    """The thought ended by itself, was refused no inspection, and reads by the parser that serves: verdicts, every check concluded."""
    thought = outcome.thought
    return (
        outcome.stop_reason is StopReason.ANSWERED
        and outcome.answer is not None
        and outcome.refused == 0
        and bool(thought.verdicts)
        and len(thought.checks) == len(outcome.inspected)
        and all(check.match is not None for check in thought.checks)
    )
