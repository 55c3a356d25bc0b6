"""The margin of `think="auto"`: how sure the direct read must be for a thought to be skipped. Chosen on validation data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.model.checkpoint import read_manifest
from retrv_r1_retriever.ranking import rank
from retrv_r1_training.rollout import RolloutRunner, Sampling, Task


@dataclass(frozen=True, slots=True)
class Measured:
    """One query: nats between the direct read's two best slots, and whether each way put the positive first."""

    stratum: str
    margin: float
    direct: bool
    thought: bool


@dataclass(frozen=True, slots=True)
class Calibration:
    """skipped: share of queries without a thought, by stratum; R@1 of `auto`, of always thinking and of never"""

    margin: float
    skipped: dict[str, float]
    recall_auto: float
    recall_always: float
    recall_never: float
    queries: int


def measurements(runner: RolloutRunner, tasks: Sequence[Task], sampling: Sampling) -> list[Measured]:
    """One greedy pass with a thought each: the direct read comes with it."""
    out = []
    for task, reading in zip(tasks, runner.read(tasks, [0] * len(tasks), sampling), strict=True):
        if reading.direct is None or reading.outcome is None:
            got = reading.problem or "no direct read"
            raise InputError(
                explain(f"query {task.id!r}", expected="a direct read and a thought", got=got, fix="See there.")
            )
        candidates = task.prompt.candidates
        alone = rank(candidates, reading.direct, None, "logits").indices[0]
        thought = rank(candidates, reading.direct, reading.outcome).indices[0]
        out.append(Measured(task.stratum, reading.direct.margin, alone == task.target, thought == task.target))
    return out


def calibrate(measured: Sequence[Measured], max_cost: float) -> Calibration:
    """The smallest margin, so the fewest thoughts, whose R@1 is at most `max_cost` below always thinking."""
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
    return Calibration(best, shares, auto, always, float(direct.mean()), len(measured))


def write_margin(folder: Path, margin: float) -> None:
    """Into `retrv/manifest.json`; no digest changes, since no weight does."""
    manifest = replace(read_manifest(folder), think_margin=margin)
    (folder / "retrv" / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
