"""R@1 beside milliseconds per query, mode by mode, for any checkpoints: one table, one JSON, one plot.

    python -m retrv_r1_retriever.bench.quality --checkpoint miniature other=/path/to/checkpoint --out quality

Queries of the demo catalogue, K = 20, one query at a time on one thread. Milliseconds are the median of the rerank call: candidates come
with their memory, so the first stage is not in them, and each checkpoint has the lists of its own embedder. `auto` only where a margin
was calibrated. `--full`: checkpoints that were trained on candidates in full; they are read so in one token, with the pictures'
tower tokens cached.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.bench.__main__ import Row, command, machine, say, table
from retrv_r1_retriever.bench.catalogue import Catalogue, opened
from retrv_r1_retriever.bench.modes import Task
from retrv_r1_retriever.demo.figures import Asked, K, ask
from retrv_r1_retriever.images import load_content
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.prompt import ANSWER_START, build_full_prompt
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.store import VectorFirstStage
from retrv_r1_retriever.types import Candidate

#: Name of a mode -> a call that gives the id it puts first.
Call = Callable[[Asked], Coroutine[Any, Any, str]]
MODES = {
    "logits, think=never": RerankOptions(think="never", ranking="logits", timeout_s=None, on_failure="raise"),
    "hybrid, think=always": RerankOptions(think="always", timeout_s=None, on_failure="raise"),
    "hybrid, think=auto": RerankOptions(think="auto", timeout_s=None, on_failure="raise"),
}
FULL = "in full, one token"


@dataclass(frozen=True, slots=True)
class Named:
    """A checkpoint to measure: "NAME=PATH", or a path that is its own name."""

    name: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Named:
        name, _, path = text.rpartition("=")
        return cls(name or path, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="*", type=Named.parse, default=[Named("miniature", "miniature")])
    parser.add_argument("--full", nargs="*", type=Named.parse, default=[], help="those trained on candidates in full")
    parser.add_argument("--split", default="val", choices=("val", "test"), help="choices are made on val")
    parser.add_argument("--limit", type=int, default=50, help="queries per task and stratum (default: 50)")
    parser.add_argument("--dir", type=Path, default=Path("demo-data"), help="where catalogue and indexes are kept")
    parser.add_argument("--out", type=Path, help="folder for quality.json and quality.png")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for named, full in [*((c, False) for c in args.checkpoint), *((c, True) for c in args.full)]:
        with opened(args.dir, named.path, args.split) as catalogue:
            head: Row = {"checkpoint": named.name, "digest": catalogue.engine.versions["checkpoint"]}
            rows += [head | row for row in measure(catalogue, args.split, args.limit, full)]
    say(table(rows))
    if args.out:
        from retrv_r1_retriever.bench.plot import draw_quality  # matplotlib: only where a picture is asked for

        told = command("retrv_r1_retriever.bench.quality", argv)
        report = {"command": told, "machine": machine(), "split": args.split, "K": K, "rows": rows}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
        draw_quality(report, args.out / "quality.png")
    return 0


def measure(catalogue: Catalogue, split: str, limit: int, full: bool) -> list[Row]:
    asked = run(ask(catalogue.folder, split, VectorFirstStage(catalogue.store, catalogue.embedder), limit))
    found = [a.candidates[0].document.id in a.labelled.positives for a in asked]
    rows: list[Row] = [{"mode": "first stage", **_share(asked, found), "ms": 0.0}]
    for name, call, prepared in _calls(catalogue, asked, full):
        right, seconds = [], []
        for one in [prepared[0], *prepared]:  # the first one twice: it warms up
            started = time.perf_counter()
            first = run(call(one))
            seconds.append(time.perf_counter() - started)
            right.append(first in one.labelled.positives)
        rows.append({"mode": name, **_share(asked, right[1:]), "ms": 1e3 * median(seconds[1:])})
    return rows


def _calls(catalogue: Catalogue, asked: Sequence[Asked], full: bool) -> Iterator[tuple[str, Call, Sequence[Asked]]]:
    engine = catalogue.engine
    if full:
        yield FULL, lambda one: _in_full(catalogue, one), [_encoded(catalogue, one) for one in asked]
        return
    reranker = RetrvR1Reranker(engine, images=catalogue.images)

    async def first(one: Asked, options: RerankOptions) -> str:
        results = await reranker.arerank(one.query, one.candidates, options=options)
        return results.results[0].document.id

    for name, options in MODES.items():
        if options.think != "auto" or engine.think_margin is not None:
            yield name, lambda one, options=options: first(one, options), asked  # type: ignore[misc]


def _encoded(catalogue: Catalogue, one: Asked) -> Asked:
    """With the candidates' pictures after the tower."""

    def decoded(candidate: Candidate) -> Candidate:
        content, _ = run(load_content(catalogue.images, candidate.document.content))
        return replace(candidate, document=replace(candidate.document, content=content))

    task = Task.of(catalogue.engine, one.query, [decoded(c) for c in one.candidates])
    return replace(one, candidates=task.cached)


async def _in_full(catalogue: Catalogue, one: Asked) -> str:
    engine = catalogue.engine
    handle = await engine.open(build_full_prompt(one.query, one.candidates))
    try:
        read = await engine.probe(handle, ANSWER_START)
    finally:
        await engine.close(handle)
    best = max(range(len(one.candidates)), key=lambda i: read.logprobs[i])
    return one.candidates[best].document.id


def _share(asked: Sequence[Asked], right: Sequence[bool]) -> dict[str, Any]:
    """R@1 of each stratum and of all."""
    strata = {
        name: [ok for a, ok in zip(asked, right, strict=True) if a.labelled.stratum == name]
        for name in ("coarse", "fine")
    }
    shares = {f"R@1 {name}": sum(values) / len(values) for name, values in strata.items()}
    return {"queries": str(len(right)), **shares, "R@1": sum(right) / len(right)}


if __name__ == "__main__":
    raise SystemExit(main())
