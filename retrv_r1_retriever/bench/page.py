"""`docs/benchmarks.md` from what the benches wrote: each table with the command behind it, and what it does not show.

    python -m retrv_r1_retriever.bench.page docs/bench --out docs/benchmarks.md

What has no file in the folder is said to be not measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrv_r1_retriever.bench.__main__ import Row, stage_row, table

HEAD = """# Benchmarks

Made by `python -m retrv_r1_retriever.bench.page docs/bench --out docs/benchmarks.md` from the JSON files in `docs/bench`. Times are of one
machine and say little about another; ratios within a table say more. The *miniature* is the shipped model of a few million parameters;
other shapes have random weights and say nothing about quality. On a GPU: not measured.
"""
OUTSIDE_MS = 5.0  #: the goal for a whole call at K = 50
MODES = """\
U: every candidate in full, its picture through the tower at query time; U': the same with tower tokens cached; X: K prompts of one
candidate, run together (a pointwise cross-encoder of the same backbone; the query's picture through the tower once); X': the same with
tower tokens cached; C: two tokens each, compressed at query time; F: two tokens each, memory made at index time; F+5: F, then its best
five opened in full. The same weights in all of them, one query at a time, interleaved, the shortest of the rounds. Stages are timed each by
itself after the modes, their floor is that of their FLOPs or of their bytes at the measured ceilings, whichever is higher. Not shown:
quality (U and X were not trained), batches, other processors."""


@dataclass(frozen=True, slots=True)
class Section:
    """file: below the folder; tables: of its JSON; lacks: what the numbers do not show"""

    title: str
    file: str
    command: str
    lacks: str
    tables: Callable[[dict[str, Any]], list[str]]
    picture: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the benches wrote to")
    parser.add_argument("--out", type=Path, required=True, help="the page")
    args = parser.parse_args(argv)
    args.out.write_text(page(args.folder, args.out.parent), "utf-8")
    return 0


def page(folder: Path, beside: Path) -> str:
    parts = [HEAD]
    if (note := folder / "note.txt").exists():
        parts.append(f"> {note.read_text('utf-8').strip()}\n")
    for section in SECTIONS:
        parts.append(f"## {section.title}\n")
        file = folder / section.file
        if not file.exists():
            parts.append(f"Not measured. `{section.command}`\n")
            continue
        report = json.loads(file.read_text("utf-8"))
        parts += [f"`{report['command']}`\n", section.lacks + "\n", _versions(report), *section.tables(report)]
        if section.picture and (picture := folder / section.picture).exists():
            parts.append(f"![{section.title}]({picture.resolve().relative_to(beside.resolve()).as_posix()})\n")
    return "\n".join(parts)


def _versions(report: dict[str, Any]) -> str:
    told = dict(report.get("machine", {})) | {k: report[k] for k in ("rounds", "qdrant-edge-py") if k in report}
    return ", ".join(f"{name} {value}" for name, value in told.items()) + ".\n"


def _modes(report: dict[str, Any]) -> list[str]:
    out = []
    for shape in report["shapes"]:
        ceiling = shape["ceiling"]
        rates = f"{ceiling['flops'] / 1e9:,.0f} GFLOP/s in a large matmul, {ceiling['bytes'] / 1e9:,.1f} GB/s read"
        out += [f"Measured ceilings in the same process: {rates}.\n", table(shape["modes"]), *_goals(shape["modes"])]
        if shape.get("auto"):
            out += ["F, and a thought only where its two best slots are close:\n", table(shape["auto"])]
        if len(shape["stages"]) > 1:
            out.append(table([stage_row(stage) for stage in shape["stages"]]))
    return out


def _goals(rows: Sequence[Row]) -> list[str]:
    """What the shape must reach, where its modes were measured; by how much it missed."""
    ms = {str(row["mode"]): float(row["ms"]) for row in rows if row["task"] == "image + text"}
    lines = []
    for mode, goal in (("C", 2.5), ("F", 8.0)):
        if {"U", mode} <= set(ms):
            ratio = ms["U"] / ms[mode]
            verdict = "met" if ratio >= goal else f"missed by {goal - ratio:.1f}"
            lines.append(f"U/{mode} without thought: {ratio:.1f}, goal {goal} ({verdict}).\n")
    if {"U'", "F"} <= set(ms):
        ratio = ms["U'"] / ms["F"]
        lines.append(f"With the same caches, U'/F: {ratio:.1f}.\n")
    return lines


def _outside(report: dict[str, Any]) -> list[str]:
    goals = []
    for mode in dict.fromkeys(row["mode"] for row in report["calls"]):
        rows = [row for row in report["calls"] if row["mode"] == mode]
        everything = max(row["outside the model ms"] for row in rows)
        named = max(row["fetch ms"] + row["prompt ms"] + row["rest ms"] for row in rows)
        goals.append(
            f"{mode}: everything outside the model takes at most {everything:.1f} ms, {_verdict(everything)}; fetch, prompt "
            f"and rest together at most {named:.1f}, {_verdict(named)}.\n"
        )
    return [
        table(report["calls"]),
        *goals,
        "One search for K with memory, among 2,000 points:\n",
        table(report["fetch"]),
    ]


def _verdict(ms: float) -> str:
    return f"goal {OUTSIDE_MS} ({'met' if ms <= OUTSIDE_MS else f'missed by {ms - OUTSIDE_MS:.1f}'})"


def _first_stage(report: dict[str, Any]) -> list[str]:
    return [f"{report['points']:,} points, {report['queries']} queries.\n", table([_plain(r) for r in report["rows"]])]


def _plain(row: dict[str, Any]) -> Row:
    words = {"setting": row["setting"], "filter": row["filter"] or "none"}
    words |= {"search": row["search"], "recall@50": f"{row['recall@50']:.4f}"}
    return words | {k: v for k, v in row.items() if k not in (*words, "indexed")}


def _quality(report: dict[str, Any]) -> list[str]:
    return [table(report["rows"])]


_SEARCHED = (
    "Synthetic clustered vectors of 256 dimensions (the module says how they are made, and why uniform ones would be a bad model), one "
    "search thread, `filter` leaves that share of the points. RAM: pages of the searching process beyond those before it opened the "
    "index. `EdgeStore` searches by `scan` until `optimize()`, then by `HNSW`, and behind a filter always exactly, for the graph alone "
    "can miss nearly everything that a filter leaves; a payload index is what `index_fields` makes. It does not quantize. Not shown: "
    "memory of the candidates, real embeddings, cold disks."
)
_BENCH, _FIRST = "python -m retrv_r1_retriever.bench", "python -m retrv_r1_retriever.bench.first_stage"
SECTIONS = (
    Section(
        "The ratio-preserving shape", "ratio/bench.json", f"{_BENCH} --shape ratio --steps 0 --out docs/bench/ratio", MODES, _modes,
        "ratio/bench.png",
    ),
    Section(
        "The miniature", "miniature/bench.json", f"{_BENCH} --shape miniature --top-k 20 50 --out docs/bench/miniature", MODES, _modes,
        "miniature/bench.png",
    ),
    Section(
        "Time outside the model", "outside.json", f"{_BENCH}.outside --out docs/bench/outside.json",
        "Whole `retrieve` calls of the miniature, less its forward passes and the embedding of the query; medians, also of the parts. "
        "Fetch: search and memory. Prompt: memory checked, prompt built and made ids. Batching and sampling: around each pass, and a "
        "thought has one for every token. Pictures: of the query and of opened candidates, from file to pixels. Rest: parsing, ranking, "
        "the result, and waking one thread from another. Not shown: pictures that have to be fetched, a Qdrant server.", _outside,
    ),
    *(
        Section(
            f"First stage, {points:,} points", f"first-stage-{points}.json",
            f"{_FIRST} --points {points} --out docs/bench/first-stage-{points}.json", _SEARCHED, _first_stage,
        )
        for points in (10_000, 100_000, 1_000_000)
    ),
    Section(
        "Quality beside latency", "quality/quality.json", f"{_BENCH}.quality --out docs/bench/quality",
        "The demo catalogue, lists of 20, validation queries (choices were made on them; the README has test figures). *miniature* is the "
        "shipped model. *compressed*, *all-full* and *pointwise* are rows of [the ablation](experiments.md), which has to be run first "
        "(`retrv-r1-train ablation --rows full \"all full\" pointwise --seeds 2`, hours): 2,050 steps after one backbone's `align`; 2,400 "
        "more with every candidate in full; 1,500 with one candidate at a time. These three share an embedder and so their lists, the "
        "miniature has its own (*in list*: the answer is among the 20). Not shown: other data, other sizes, other seeds.",
        _quality, "quality/quality.png",
    ),
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(main())
