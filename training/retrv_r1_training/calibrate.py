"""Two thresholds, chosen on validation data: how sure the direct read must be for a thought to be skipped (`think="auto"`), and by how
much `<|none|>` must lead the best candidate to be the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.model.checkpoint import read_manifest
from retrv_r1_retriever.prompt import NONE_INDEX
from retrv_r1_retriever.ranking import none_lead, rank
from retrv_r1_training.rollout import RolloutRunner, Sampling, Task
from retrv_r1_training.stage_checkpoint import write_manifest


@dataclass(frozen=True, slots=True)
class Measured:
    """One query: nats between the direct read's two best slots, and whether each way put a positive first.

    answerable: the list has a positive; direct_none, thought_none: nats by which none leads the best candidate, each way
    """

    stratum: str
    margin: float
    direct: bool
    thought: bool
    answerable: bool = True
    direct_none: float = 0.0
    thought_none: float = 0.0


@dataclass(frozen=True, slots=True)
class NoneThreshold:
    """margin: nats; false: share of answerable lists that are called none; found: share of unanswerable ones that are

    plain_false, plain_found: the same without a threshold (any lead of none will do)
    """

    margin: float
    false: float
    found: float
    plain_false: float
    plain_found: float
    unanswerable: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """skipped: share of queries without a thought, by stratum; R@1 of `auto`, of always thinking and of never

    none: None = no validation list lacks its positive, or all do
    """

    margin: float
    skipped: dict[str, float]
    recall_auto: float
    recall_always: float
    recall_never: float
    queries: int
    none: NoneThreshold | None = None


def measurements(runner: RolloutRunner, tasks: Sequence[Task], sampling: Sampling) -> list[Measured]:
    """One greedy pass with a thought each: the direct read comes with it."""
    out = []
    for task, reading in runner.readings(tasks, [0] * len(tasks), sampling):
        answer = reading.outcome.answer_logprobs if reading.outcome else None
        if reading.direct is None or reading.outcome is None or answer is None:
            got = reading.problem or "no probabilities"
            raise InputError(
                explain(f"query {task.id!r}", expected="a direct read and a thought", got=got, fix="See there.")
            )
        candidates = task.prompt.candidates
        alone = rank(candidates, reading.direct, None, "logits").indices[0]
        thought = rank(candidates, reading.direct, reading.outcome).indices[0]
        leads = none_lead(reading.direct.logprobs), none_lead(answer)
        answerable = task.right != (NONE_INDEX,)
        out.append(
            Measured(
                task.stratum, reading.direct.margin, alone in task.right, thought in task.right, answerable, *leads
            )
        )
    return out


def calibrate(measured: Sequence[Measured], max_cost: float, max_false_none: float = 0.02) -> Calibration:
    """The smallest margin, so the fewest thoughts, whose R@1 is at most `max_cost` below always thinking; and for `auto` with this
    margin the smallest lead of none at which at most `max_false_none` of the answerable lists are called none.
    """
    if not measured:
        raise InputError(
            explain("calibrate", expected="validation queries", got="none", fix="Name a split with queries.")
        )
    margins = np.array([m.margin for m in measured])
    direct, thought = (np.array([getattr(m, name) for m in measured]) for name in ("direct", "thought"))
    always = float(thought.mean())
    best = 2.0 * float(margins.max()) + 1.0  # above all: always think
    for margin in (0.0, *np.unique(margins)):
        if np.where(margins >= margin, direct, thought).mean() >= always - max_cost - 1e-9:
            best = float(margin)
            break
    skipped = margins >= best
    strata = np.array([m.stratum for m in measured])
    shares = {s: float(skipped[strata == s].mean()) for s in sorted(set(strata.tolist()))}
    auto = float(np.where(skipped, direct, thought).mean())
    shares["all"] = float(skipped.mean())
    leads = np.where(skipped, [m.direct_none for m in measured], [m.thought_none for m in measured])
    none = none_threshold(leads, np.array([m.answerable for m in measured]), max_false_none)
    return Calibration(best, shares, auto, always, float(direct.mean()), len(measured), none)


def none_threshold(leads: np.ndarray, answerable: np.ndarray, max_false: float) -> NoneThreshold | None:
    """leads (n,): nats by which none leads; answerable (n,) bool."""
    if answerable.all() or not answerable.any():
        return None
    finite = leads[np.isfinite(leads)]
    top = float(finite.max()) if len(finite) else 0.0
    for margin in (*np.unique(finite), top + 1.0):  # the last: above all, never none
        if (leads[answerable] >= margin).mean() <= max_false + 1e-9:
            break
    return NoneThreshold(
        float(margin), float((leads[answerable] >= margin).mean()), float((leads[~answerable] >= margin).mean()),
        float((leads[answerable] > 0).mean()), float((leads[~answerable] > 0).mean()), int((~answerable).sum()),
    )  # fmt: skip


def write_thresholds(folder: Path, found: Calibration) -> None:
    """Into `retrv/manifest.json`; no digest changes, since no weight does."""
    none = found.none.margin if found.none else None
    write_manifest(folder, replace(read_manifest(folder), think_margin=found.margin, none_margin=none))


def table(found: Calibration) -> str:
    """For people."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found.skipped.items())
    lines = [
        f"{found.queries} validation queries",
        f"think   margin {found.margin:.3g} nats: auto skips the thought for {shares}",
        f"        R@1 auto {found.recall_auto:.3f}, always {found.recall_always:.3f}, never {found.recall_never:.3f}",
    ]
    if found.none is None:
        return "\n".join([*lines, "none    not calibrated: needs validation lists with and lists without a positive"])
    none = found.none
    return "\n".join([
        *lines,
        f"none    lead {none.margin:.3g} nats: {none.found:.0%} of {none.unanswerable} unanswerable lists found, "
        f"{none.false:.1%} of the others called none",
        f"        without a threshold: {none.plain_found:.0%} found, {none.plain_false:.1%} called none",
    ])  # fmt: skip
