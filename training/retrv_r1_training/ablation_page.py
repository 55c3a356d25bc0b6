"""The ablation's table (README.md) and plot (ablation.png), from the JSON files that are there."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from retrv_r1_training.ablation import Result, Row, Study
from retrv_r1_training.plot import COLOURS
from retrv_r1_training.seeds import STRATA, spread

log = logging.getLogger(__name__)


def write(study: Study) -> None:
    found = {name: runs for name, runs in study.results().items() if runs}
    if not found:
        log.info("ablation: nothing is finished yet")
        return
    rows = {row.name: row for row in study.ablation.rows}
    text = markdown(rows, found)
    (study.out / "README.md").write_text(text, encoding="utf-8")
    figure(rows, found).savefig(study.out / "ablation.png", dpi=130)
    log.info("%s\nwritten to %s", text, study.out)


def markdown(rows: dict[str, Row], found: dict[str, list[Result]]) -> str:
    base = {run.seed: run.quality["all"] for run in next(iter(found.values()))}
    queries = next(iter(base.values())).queries
    first_stage = ", ".join(f"{q.first_stage:.3f} (seed {seed})" for seed, q in base.items())
    lines = [
        "# The method without one part at a time",
        "",
        f"Written by `retrv-r1-train ablation`. The miniature on its own cards: validation pool, {queries} queries, lists of 20, R@1 "
        f"of the first stage {first_stage}. The schedule is shorter than the shipped checkpoint's (`recipes/ablation.yaml`): "
        "compare rows with one another, not with other pages. R@1 of `hybrid`, think always, by stratum; Δ: its points against `full`, "
        "over all and the seeds that both have (each); direct: R@1 of the direct read; opened: candidates per query; with several seeds "
        "mean ± standard deviation. Paper Δ: points of R@5 on CIRR / OVEN (3B, arXiv 2510.02745).",
        "",
        "| | seeds | coarse | fine | all | Δ | direct | opened | paper Δ |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    full = found.get(next(iter(rows)))
    for name, runs in found.items():
        r1 = [spread([run.quality[s].hybrid for run in runs]) for s in STRATA]
        rest = [spread([getattr(run.quality["all"], what) for run in runs]) for what in ("direct", "opened")]
        cells = [
            name,
            ", ".join(str(run.seed) for run in runs),
            *r1,
            _delta(runs, full),
            *rest,
            _paper(rows[name], next(iter(rows.values()))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- **{name}**: {rows[name].note}" for name in found if rows[name].note]
    missing = [name for name in rows if name not in found]
    if missing:
        notes.append(f"- Not finished: {', '.join(missing)}.")
    return "\n".join([*lines, "", "![ablation](ablation.png)", "", *notes]) + "\n"


def differences(runs: Sequence[Result], full: Sequence[Result]) -> list[float]:
    """Points of R@1 against `full`, for each seed that both have."""
    base = {run.seed: run.quality["all"].hybrid for run in full}
    return [100 * (run.quality["all"].hybrid - base[run.seed]) for run in runs if run.seed in base]


def _delta(runs: Sequence[Result], full: Sequence[Result] | None) -> str:
    if full is None or runs[0].row == full[0].row:
        return ""
    by_seed = differences(runs, full)
    mean = f"{np.mean(by_seed):+.1f}" if by_seed else "?"
    return mean if len(by_seed) < 2 else f"{mean} ({', '.join(f'{d:+.1f}' for d in by_seed)})"


def _paper(row: Row, full: Row) -> str:
    if not row.paper or row == full:
        return ""
    pairs = zip(row.paper, full.paper, strict=True)
    return " / ".join("?" if a is None or b is None else f"{a - b:+.1f}" for a, b in pairs)


def figure(rows: dict[str, Row], found: dict[str, list[Result]]) -> Figure:
    """R@1 by stratum, a bar each; whiskers: smallest and largest seed."""
    names = list(found)
    out = Figure(figsize=(9, 0.42 * len(names) + 1.3), layout="constrained")
    axis, opened = out.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    places = np.arange(len(names))
    for n, stratum in enumerate(STRATA):
        values = [[run.quality[stratum].hybrid for run in found[name]] for name in names]
        _bars(axis, places + 0.26 * (n - 1), values, COLOURS[n], stratum)
    first = float(np.mean([run.quality["all"].first_stage for run in found[names[0]]]))
    axis.axvline(first, color="#555555", linewidth=0.8, linestyle=":")
    axis.text(first, 1.01, "first stage", transform=axis.get_xaxis_transform(), fontsize=7, ha="center")
    axis.set_xlim(0, 1)
    axis.set_xlabel("R@1, hybrid")
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)
    _bars(opened, places, [[r.quality["all"].opened for r in found[name]] for name in names], COLOURS[6], "")
    opened.set_xlabel("opened per query")
    for one in (axis, opened):
        one.spines[["top", "right"]].set_visible(False)
    return out


def _bars(axis: object, at: np.ndarray, values: Sequence[Sequence[float]], colour: str, label: str) -> None:
    means = [float(np.mean(v)) for v in values]
    spans = np.array([[m - min(v), max(v) - m] for m, v in zip(means, values, strict=True)]).T
    height = 0.24 if label else 0.5
    axis.barh(at, means, height=height, color=colour, label=label, xerr=spans, error_kw={"linewidth": 0.8})  # type: ignore[attr-defined]
