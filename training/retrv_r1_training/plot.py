"""One picture of a run's log: what the rows of RUN/log.jsonl hold, by panel; stages follow one another on the x axis."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from retrv_r1_retriever.errors import InputError, explain

log = logging.getLogger(__name__)

#: Panels, top to bottom, and the keys drawn in each: by our own loop, by transformers (`eval_...`) or by GRPO (`val_...`).
PANELS = {
    "loss": r"loss|(eval_|val_)loss",
    "reward": r"reward",
    "accuracy": r"correct|format|(val_|eval_)?(accuracy|direct|relation|answer|verdicts|words|R@1_all|recall@1|coarse_R@1|fine_R@1)",
    "inspections": r"inspections|refused|val_opened_all",
    "length": r"tokens|length",
    "lambda": r"lambda",
}
UNITS = {"accuracy": "share", "inspections": "per query", "length": "tokens"}
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#555555",
)  # Okabe and Ito: told apart by everybody
WIDTH, HEIGHT = 10.0, 2.1  #: inches: of the picture, of a panel
SMOOTH = 60  #: points; a longer curve is drawn pale, with its running mean over it


@dataclass(frozen=True, slots=True)
class Row:
    """at: steps since the beginning of the log, over all stages"""

    at: int
    stage: str
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    start: int
    end: int


def draw(run: Path, out: Path | None = None) -> Path:
    """Write the picture; returns its path. Raises `InputError` for a run without a log."""
    file = run / "log.jsonl" if run.is_dir() else run
    rows, stages = follow(read(file))
    panels = {title: curves(rows, pattern) for title, pattern in PANELS.items()}
    panels = {title: found for title, found in panels.items() if found}
    if not panels:
        raise InputError(explain(str(file), expected="rows with a loss", got="none", fix="Pass a run of this package."))
    figure = _figure(panels, stages, f"{file.parent.name}: {', '.join(dict.fromkeys(s.name for s in stages))}")
    target = out or file.parent / "plot.png"
    figure.savefig(target, dpi=130)
    log.info("wrote %s", target)
    return target


def read(file: Path) -> list[dict[str, Any]]:
    """Rows with a step. A last line that a kill cut off is left out. Raises `InputError` for what is no log."""
    if not file.is_file():
        raise InputError(explain(str(file), expected="a run's log.jsonl", got="no such file", fix="Fix the path."))
    rows = []
    lines = file.read_bytes().splitlines()  # a kill may cut within a character
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(explain(f"{file}:{number}", expected="JSON", got=error, fix="Remove the line.")) from error
        if isinstance(row, dict) and "step" in row:
            if not isinstance(row["step"], int):
                got = repr(row["step"])
                raise InputError(
                    explain(f"{file}:{number}: step", expected="a whole number", got=got, fix="Remove the line.")
                )
            rows.append(row)
    return rows


def follow(rows: Sequence[dict[str, Any]]) -> tuple[list[Row], list[Stage]]:
    """Rows on one axis. A new stage begins where the name changes, or where the steps begin again (a stage run anew)."""
    out: list[Row] = []
    stages: list[Stage] = []
    start = last = 0
    for row in rows:
        name, step = str(row.get("stage", "")), int(row["step"])
        if not stages or stages[-1].name != name or start + step < last:
            start = last
            stages.append(Stage(name, start, start))
        last = start + step
        stages[-1] = Stage(name, start, last)
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        out.append(Row(last, name, {k: v for k, v in numbers.items() if math.isfinite(v)}))
    return out, stages


def curves(rows: Sequence[Row], pattern: str) -> dict[str, list[tuple[int, float]]]:
    """name -> (at, value), in the order in which the names first occur."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.values.items():
            if re.fullmatch(pattern, name):
                found.setdefault(name, []).append((row.at, value))
    return found


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Running mean over the `width` values up to each."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))]


def _figure(panels: dict[str, dict[str, list[tuple[int, float]]]], stages: Sequence[Stage], title: str) -> Figure:
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(WIDTH, HEIGHT * len(panels) + 0.7), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (name, found) in zip(axes, panels.items(), strict=True):
            _panel(axis, name, found, stages)
        axes[-1].set_xlabel("step" if len(stages) == 1 else "step, all stages")
        axes[-1].set_xlim(0, max(stage.end for stage in stages) or 1)
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        _name_stages(axes[0], stages)
    return figure


def _panel(axis: Axes, name: str, found: dict[str, list[tuple[int, float]]], stages: Sequence[Stage]) -> None:
    plain = [re.sub("^(eval_|val_)", "", key) for key in found]
    for base, (key, points) in sorted(zip(plain, found.items(), strict=True), key=lambda pair: plain.index(pair[0])):
        colour = COLOURS[list(dict.fromkeys(plain)).index(base) % len(COLOURS)]  # training and validation alike
        held_out = base != key or "R@" in key
        for first, part in enumerate(_by_stage(points, stages)):
            label = None if first else f"{base}, held out" if held_out else base
            x, y = zip(*part, strict=True)
            _curve(axis, x, y, colour, label, held_out, smooth=name != "lambda")
    axis.set_ylabel(f"{name}\n({UNITS[name]})" if name in UNITS else name)
    if name in ("accuracy", "lambda"):
        axis.set_ylim(-0.03, 1.03)
    elif name == "loss" and _spans_decades(found):
        axis.set_yscale("log")
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    if len(found) > 1:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8, handlelength=1.4)


def _curve(
    axis: Axes, x: Sequence[int], y: Sequence[float], colour: str, label: str | None, held_out: bool, smooth: bool
) -> None:
    marker = "o" if held_out or len(x) == 1 else ""
    style = "--" if held_out else "-"
    if len(x) <= SMOOTH or not smooth:
        axis.plot(x, y, style, marker=marker, markersize=3, color=colour, linewidth=1.4, label=label)
        return
    axis.plot(x, y, style, color=colour, linewidth=0.6, alpha=0.3)
    axis.plot(x, smoothed(y, max(5, len(y) // 40)), style, color=colour, linewidth=1.6, label=label)


def _by_stage(points: Sequence[tuple[int, float]], stages: Sequence[Stage]) -> Iterator[list[tuple[int, float]]]:
    """Curves end with their stage: losses of two stages are not the same quantity."""
    for stage in stages:
        part = [p for p in points if stage.start < p[0] <= stage.end or (stage.start == 0 and p[0] == 0)]
        if part:
            yield part


def _spans_decades(found: dict[str, list[tuple[int, float]]]) -> bool:
    values = [value for points in found.values() for _, value in points]
    return min(values) > 0 and max(values) > 30 * min(values)


def _name_stages(axis: Axes, stages: Sequence[Stage]) -> None:
    """A line where a stage begins, in every panel, and its name above the first."""
    if len(stages) < 2:
        return
    assert axis.figure is not None
    whole = stages[-1].end or 1
    raised = False
    before: float = -whole
    for stage in stages:
        for other in axis.figure.axes:
            if stage.start:
                other.axvline(stage.start, color="#999999", linewidth=0.8, linestyle=":")
        middle = (stage.start + stage.end) / 2
        raised = not raised and middle - before < 0.1 * whole  # neighbours too close for one line
        height, before = 1.12 if raised else 1.02, middle
        axis.annotate(stage.name, (middle, height), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
