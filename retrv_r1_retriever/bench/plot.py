"""One picture of a bench report: milliseconds by mode, and the stages beside their floors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import missing_extra

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
except ImportError as error:
    raise missing_extra("matplotlib", "bench") from error

BLUE, GREY = "#2f6fb0", "#b9bec6"
COLOURS = (BLUE, "#c2571a", "#3f8f4f", "#7a52a3", "#8a6d1f", "#555")


def draw(report: dict[str, Any], file: Path) -> None:
    """PNG, one row of two charts per shape; of several tasks or K the first is drawn."""
    shapes = report["shapes"]
    figure = Figure(figsize=(12, 4.2 * len(shapes)), layout="constrained")
    axes = figure.subplots(len(shapes), 2, squeeze=False)
    for (left, right), shape in zip(axes, shapes, strict=True):
        first = shape["modes"][0]
        where = f"{shape['shape']}, {first['task']}, K = {first['K']}"
        rows = [r for r in shape["modes"] if (r["task"], r["K"]) == (first["task"], first["K"])]
        _bars(left, [r["mode"] for r in rows], [r["ms"] for r in rows], BLUE)
        left.set_title(f"One query, no thought ({where})", loc="left", fontsize=10)
        found = [s for s in shape["stages"] if (s["task"], s["K"]) == (first["task"], first["K"])]
        _stages(right, found)
        right.set_title("Stages and their floors on this machine", loc="left", fontsize=10)
    machine = report["machine"]
    figure.suptitle(
        f"{machine['processor']}, {machine['threads']} thread(s), torch {machine['torch']}; best of {report['rounds']}",
        fontsize=9, color="#555",
    )  # fmt: skip
    figure.savefig(file, dpi=110)


def _bars(axes: Axes, names: list[str], values: list[float], colour: str) -> None:
    bars = axes.barh(range(len(names)), values, color=colour, height=0.62)
    axes.bar_label(bars, labels=[f" {v:,.1f} ms" for v in values], fontsize=8)
    _tidy(axes, names, max(values))


def _stages(axes: Axes, stages: list[dict[str, Any]]) -> None:
    values = [1e3 * s["seconds"] for s in stages]
    bars = axes.barh(range(len(stages)), values, color=GREY, height=0.62)
    floors = [1e3 * (s["floor"] or 0) for s in stages]
    axes.barh(range(len(stages)), floors, color=BLUE, height=0.34, label="floor")
    axes.bar_label(bars, labels=[f" {v:,.2f} ms" for v in values], fontsize=8)
    axes.set_xscale("log")
    axes.legend(loc="upper right", fontsize=8, frameon=False)
    _tidy(axes, [s["name"] for s in stages], max(values) * 6)


def _tidy(axes: Axes, names: list[str], widest: float) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=widest * 1.18)
    axes.set_xlabel("milliseconds", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_quality(report: dict[str, Any], file: Path) -> None:
    """PNG: R@1 against milliseconds, a numbered point per mode, a colour per checkpoint; first stages are dashed, as they are not timed."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["checkpoint"] for row in report["rows"]))
    colour = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    _first_stages(axes, report["rows"], colour)
    for number, row in enumerate((row for row in report["rows"] if row["ms"]), 1):
        at, told = (row["ms"], row["R@1"]), f"{row['R@1']:.3f}, {row['ms']:,.0f} ms"
        label = f"{number}  {row['checkpoint']}: {row['mode']}\n     {told}"
        axes.plot(*at, "o", color=colour[row["checkpoint"]], markersize=15, alpha=0.9, label=label)
        axes.annotate(str(number), at, color="white", fontsize=8, weight="bold", ha="center", va="center_baseline")
    axes.set_xscale("log", subs=[])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.margins(x=0.1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("milliseconds per query, median (first stage not included)", fontsize=8)
    axes.set_ylabel("R@1", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, markerscale=0.5, labelspacing=0.7)
    machine = report["machine"]
    axes.set_title(
        f"Demo catalogue, {report['split']}, {report['rows'][0]['queries']} queries, K = {report['K']}; "
        f"{machine['processor']}, {machine['threads']} thread(s), torch {machine['torch']}",
        loc="left", fontsize=8, color="#555",
    )  # fmt: skip
    figure.savefig(file, dpi=110)


def _first_stages(axes: Axes, rows: list[dict[str, Any]], colour: dict[str, str]) -> None:
    """One line per recall: checkpoints of one embedder share their lists, and lines over one another hide."""
    found: dict[float, list[str]] = {}
    for row in rows:
        if not row["ms"]:
            found.setdefault(row["R@1"], []).append(row["checkpoint"])
    for recall, names in found.items():
        label = f"first stage of {', '.join(names)}: {recall:.3f}"
        axes.axhline(recall, color=colour[names[0]], linestyle="--", linewidth=1, label=label)
