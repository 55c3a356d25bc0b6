"""What a whole call spends outside the model: the store, the prompt, the parsing, the result.

    python -m retrv_r1_retriever.bench.outside --out outside.json

One thread; the median of several rounds over one query of each task of the demo catalogue, through the embedded index with the
memory of each candidate, as `retrieve` does it. Only forward passes do not count as outside. What does is told apart: fetch (search and
memory), prompt (memory checked, prompt built and made ids), batching and sampling (before and after each pass), pictures (the query's own
and those of opened candidates, from file to pixels), and the rest (parsing, ranking, the result, and waking one thread from another). The
query's vector is remembered: embedding it is the model's time, like the passes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from retrv_r1_retriever._arguments import whole
from retrv_r1_retriever.bench.__main__ import Row, command, fetch_seconds, machine, say, table
from retrv_r1_retriever.bench.catalogue import Catalogue, Remembering, opened
from retrv_r1_retriever.demo.catalogue import TASKS, LabelledQuery, read_queries
from retrv_r1_retriever.images import ImageData, ImageSource
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.store import Equals, Filter
from retrv_r1_retriever.types import MAX_CANDIDATES, ImageInput, RankedResults

OPTIONS = {
    "logits, think=never": RerankOptions(think="never", ranking="logits", timeout_s=None),
    "hybrid, think=always": RerankOptions(think="always", timeout_s=None),
}
#: Rows and columns of a candidate's memory: the miniature's, and the default of a real size.
SHAPES = ((16, 48), (64, 128))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="miniature")
    parser.add_argument("--dir", type=Path, default=Path("demo-data"), help="where catalogue and index are kept")
    parser.add_argument("--top-k", type=whole(1, MAX_CANDIDATES), nargs="+", default=[50])
    parser.add_argument("--rounds", type=whole(1), default=30)
    parser.add_argument(
        "--profile", action="store_true", help="also print where one mode's time on the event loop goes"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    told = {
        "command": command("python -m retrv_r1_retriever.bench.outside", argv),
        "machine": machine(),
        "rounds": args.rounds,
    }
    report: dict[str, Any] = told | {"calls": [], "fetch": []}
    with opened(args.dir, args.checkpoint, "val") as catalogue:
        for k in args.top_k:
            for task in TASKS:
                asked = next(q for q in read_queries(args.dir, "val", task) if q.stratum == "fine")
                report["calls"] += calls(catalogue, asked, k, args.rounds)
                if args.profile:
                    profile(catalogue, asked, k)
    for k in args.top_k:
        for rows, width in SHAPES:
            seconds = fetch_seconds(k, rows, width, args.rounds)
            report["fetch"].append({"K": str(k), "rows": f"{rows} x {width}", "ms": 1e3 * seconds})
    say(table(report["calls"]))
    say("Search for K with memory, among 2,000 points:\n")
    say(table(report["fetch"]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def calls(catalogue: Catalogue, asked: LabelledQuery, top_k: int, rounds: int) -> list[Row]:
    images = Timed(catalogue.images)
    retriever, engine = _retriever(catalogue, images), catalogue.engine
    only = Filter(must=(Equals("modality", asked.target_modality),))
    out: list[Row] = []
    for name, options in OPTIONS.items():
        rows = []
        for _ in range(rounds + 1):
            images.seconds.clear()
            forward, step, started = engine.forward_seconds, engine.step_seconds, time.perf_counter()
            results = retriever.retrieve(asked.query, filter=only, options=replace(options, top_k=top_k))
            total = time.perf_counter() - started
            assert len(results.results) == top_k, results.reason
            forward, step = engine.forward_seconds - forward, engine.step_seconds - step
            rows.append(_parts(results, images.seconds, total, forward, step))
        medians = {part: 1e3 * median(row[part] for row in rows[1:]) for part in rows[0]}
        out.append({"task": asked.task, "K": str(top_k), "mode": name, **medians})
    return out


def _parts(
    results: RankedResults, pictures: Sequence[float], total: float, forward: float, step: float
) -> dict[str, float]:
    """Of one call, in seconds. pictures: how long each took, the query's first; step: forward passes with what is around them"""
    assert results.trace is not None
    timings = results.trace.timings
    of_query = pictures[0] if results.query.content.image is not None else 0.0
    parts = {
        "fetch ms": timings["first_stage"] - of_query,
        "prompt ms": timings["memory"] + timings["open"],
        "batching and sampling ms": step - forward,
        "pictures ms": sum(pictures),
    }
    outside = total - forward
    return {"outside the model ms": outside, **parts, "rest ms": outside - sum(parts.values()), "whole call ms": total}


def profile(catalogue: Catalogue, asked: LabelledQuery, top_k: int) -> None:
    """The event loop's own work for ten direct reads; the threads it waits for are not in it."""
    import asyncio

    retriever, watch = _retriever(catalogue, catalogue.images), cProfile.Profile()
    only = Filter(must=(Equals("modality", asked.target_modality),))
    options = replace(OPTIONS["logits, think=never"], top_k=top_k)

    async def ten() -> None:
        for _ in range(10):
            await retriever.aretrieve(asked.query, filter=only, options=options)

    watch.enable()
    asyncio.run(ten())
    watch.disable()
    pstats.Stats(watch, stream=sys.stdout).sort_stats("tottime").print_stats(25)


class Timed:
    """An image source that notes how long its callers waited for each picture."""

    def __init__(self, images: ImageSource) -> None:
        self._images, self.seconds = images, list[float]()

    async def load(self, image: ImageInput) -> ImageData:
        started = time.perf_counter()
        try:
            return await self._images.load(image)
        finally:
            self.seconds.append(time.perf_counter() - started)


def _retriever(catalogue: Catalogue, images: ImageSource) -> RetrvR1Retriever:
    return RetrvR1Retriever(
        store=catalogue.store,
        embedder=Remembering(catalogue.embedder),
        engine=catalogue.engine,
        images=images,
    )


if __name__ == "__main__":
    raise SystemExit(main())
