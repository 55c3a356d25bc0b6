"""A first stage's lists for a data set, as a TREC run: what lists to train on and to measure with are made of."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from retrv_r1_retriever import _sync
from retrv_r1_retriever import config as settings
from retrv_r1_retriever._arguments import at_least_one
from retrv_r1_retriever.errors import ImageError, InputError
from retrv_r1_retriever.evaluation.mbeir import Dataset, Limits, RunFile
from retrv_r1_retriever.evaluation.offsets import MAX_BAD_SHARE, Skipped
from retrv_r1_retriever.images import ImageSource, LocalImages, load_query
from retrv_r1_retriever.store import FirstStage, VectorFirstStage
from retrv_r1_training.waiting import counted

TAG = "first-stage"


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("first-stage", help="search every query, write a TREC run")
    parser.set_defaults(main=main)
    parser.add_argument("data", type=Path, help="folder of M-BEIR files")
    parser.add_argument("--queries", required=True, metavar="FILE", help="below DATA")
    parser.add_argument("--pool", required=True, metavar="FILE", help="below DATA; the index must hold its ids")
    parser.add_argument("--config", type=Path, default=Path(settings.FILE_NAME), help="names index and checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the TREC run to write")
    parser.add_argument("--top-k", type=at_least_one, default=100, metavar="K")
    parser.add_argument("--batch", type=at_least_one, default=16, help="queries searched at a time")
    parser.add_argument("--max-bad-share", type=float, default=MAX_BAD_SHARE, metavar="SHARE")
    parser.add_argument("--seed", type=int, default=0, help="draws the paraphrase of each query's instruction")


def main(args: argparse.Namespace) -> int:
    config = settings.read_config(args.config)
    data = Dataset.open(args.data, args.queries, args.pool, limits=Limits(max_bad_share=args.max_bad_share))
    store = settings.open_store(config)
    try:
        search = VectorFirstStage(store, settings.open_embedder(config), with_memory=False)
        run = _sync.run(write_run(data, search, LocalImages(args.data), args.out, args.top_k, args.batch, args.seed))
    finally:
        _sync.run(store.close())
    run.check(args.queries, args.max_bad_share)
    sys.stdout.write(f"wrote {args.out}: {run.total - run.count:,} queries, {run.count:,} skipped\n")
    for example in run.examples:
        sys.stdout.write(f"  skipped {example}\n")
    at = [k for k in (1, 5, args.top_k) if k <= args.top_k]
    found, answerable = recall(data, RunFile(args.out), at, args.seed)
    shown = ", ".join(f"R@{k} {share:.3f}" for k, share in found.items())
    sys.stdout.write(f"{shown} of {answerable:,} queries with a positive in the pool\n")
    return 0


def recall(data: Dataset, run: RunFile, at: Sequence[int], seed: int) -> tuple[dict[int, float], int]:
    """k -> share of the queries with any positive among the first k of their list; and how many have one in the pool at all."""
    places = []
    for number in range(len(data)):
        judged = data.query(number, random.Random(f"{seed} {number}"))
        if any(did in data.pool for did in judged.grades):
            ranked = run.ranked(judged.id)
            places.append(next((n for n, did in enumerate(ranked) if did in judged.grades), len(ranked) + max(at)))
    return {k: sum(place < k for place in places) / max(1, len(places)) for k in sorted(set(at))}, len(places)


async def write_run(
    data: Dataset, search: FirstStage, images: ImageSource, out: Path, top_k: int, batch: int = 16, seed: int = 0
) -> Skipped:
    """Queries whose picture cannot be read, or that the first stage refuses, are skipped. `out` appears at the end."""
    count = 0
    examples: list[str] = []
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            starts = range(0, len(data), batch)
            for start in counted(starts, f"searches of {batch}", len(starts)):
                numbers = range(start, min(start + batch, len(data)))
                for problem in await asyncio.gather(*(_search(data, n, search, images, top_k, seed) for n in numbers)):
                    if isinstance(problem, str):
                        count, examples = count + 1, [*examples, problem][:5]
                    else:
                        _write(file, *problem)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return Skipped(count, len(data), tuple(examples))


async def _search(
    data: Dataset, number: int, search: FirstStage, images: ImageSource, top_k: int, seed: int
) -> tuple[str, Sequence[tuple[str, float]]] | str:
    """Query id and scored candidate ids; or why there are none."""
    judged = data.query(number, random.Random(f"{seed} {number}"))
    try:
        found = await search(await load_query(images, judged.query), top_k=top_k)
    except (ImageError, InputError) as error:
        return f"{data.queries.lines.path.name}, query {judged.id}: {error}"
    scored = [(c.document.id, -c.rank if c.retrieval_score is None else c.retrieval_score) for c in found]
    return judged.id, scored


def _write(file: IO[str], qid: str, scored: Sequence[tuple[str, float]]) -> None:
    file.writelines(f"{qid} Q0 {did} {rank} {score:.6g} {TAG}\n" for rank, (did, score) in enumerate(scored, 1))
