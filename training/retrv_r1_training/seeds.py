"""Several seeds of one recipe, as a table: mean and spread (standard deviation over seeds)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from retrv_r1_training.quality import Quality

STRATA = ("coarse", "fine", "all")
FIRST_STAGE = "first stage"


def by_seed(found: Mapping[str, Sequence[Mapping[str, Quality]]]) -> str:
    """stage -> one measurement per seed, in the same order of seeds; Markdown."""
    first = next(iter(found.values()))
    names = [str(len(first)), *(f"{q['all'].queries:,}" for q in first[:1])]
    lines = [
        f"{names[0]} seeds, {names[1]} validation queries each; mean ± standard deviation over seeds.",
        "",
        "| weights after | stratum | R@1, hybrid | R@1, direct read | opened per query |",
        "| --- | --- | --- | --- | --- |",
    ]
    for stratum in STRATA:
        lines.append(f"| {FIRST_STAGE} | {stratum} | {spread([q[stratum].first_stage for q in first])} | | |")
    for stage, seeds in found.items():
        for stratum in STRATA:
            cells = [spread([getattr(q[stratum], name) for q in seeds]) for name in ("hybrid", "direct", "opened")]
            lines.append(f"| {stage} | {stratum} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """`.812 ± .010`; without the spread of a single one."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.3f}"
