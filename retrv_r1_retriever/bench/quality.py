"""R@1 beside milliseconds per query, mode by mode, for any checkpoints: one table, one JSON, one plot.

    python -m retrv_r1_retriever.bench.quality --checkpoint miniature --full all-full=FOLDER --pointwise cross-encoder=FOLDER --out quality

Queries of the demo catalogue, K = 20, one query at a time on one thread. Milliseconds are the median of the rerank call: candidates come
with their memory, so the first stage is not in them, and each checkpoint has the lists of its own embedder. `auto` only where a margin
was calibrated.

Peers were trained on candidates in full and read them so, with the pictures' tower tokens cached. `--full`: all K in one prompt, by the
direct read and with a thought. `--pointwise`: K prompts of one candidate, run together; candidates by the lead of their label over none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from retrv_r1_retriever._arguments import whole
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.bench.__main__ import Row, command, machine, say, table
from retrv_r1_retriever.bench.catalogue import Catalogue, opened
from retrv_r1_retriever.demo.figures import Asked, K, ask
from retrv_r1_retriever.driver import read
from retrv_r1_retriever.errors import RetrvR1Error
from retrv_r1_retriever.images import ImageData, load_content
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.prompt import ANSWER_START, build_full_prompt
from retrv_r1_retriever.ranking import none_lead, rank
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.store import VectorFirstStage
from retrv_r1_retriever.types import Candidate

#: Name of a mode -> a call that gives the id it puts first.
Call = Callable[[Asked], Coroutine[Any, Any, str]]
#: Of a kind of checkpoint: name, call, and the queries made ready for it.
CallsOf = Callable[[Catalogue, Sequence[Asked]], Iterator[tuple[str, Call, Sequence[Asked]]]]
_THINK = RerankOptions(think="always", timeout_s=None, on_failure="raise")
_READ = _THINK.with_options(think="never", ranking="logits")
#: As `demo.figures` names them.
MODES = {
    "logits, think=never": _READ,
    "hybrid, think=always": _THINK,
    "hybrid, think=auto": _THINK.with_options(think="auto"),
    "hybrid, think=always, max_inspections=0": _THINK.with_options(max_inspections=0),
}
#: Of a checkpoint trained on all candidates in full.
FULL = {"all in full, think=never": _READ, "all in full, think=always": _THINK}
POINTWISE = "pointwise, K prompts"


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
    parser.add_argument("--checkpoint", nargs="+", action="extend", type=Named.parse, help="default: the miniature")
    parser.add_argument("--full", nargs="+", action="extend", type=Named.parse, help="trained on lists in full")
    parser.add_argument("--pointwise", nargs="+", action="extend", type=Named.parse, help="trained on one at a time")
    parser.add_argument("--split", default="val", choices=("val", "test"), help="choices are made on val")
    parser.add_argument("--limit", type=whole(1), default=50, help="queries per task and stratum (default: 50)")
    parser.add_argument("--dir", type=Path, default=Path("demo-data"), help="where catalogue and indexes are kept")
    parser.add_argument("--out", type=Path, help="folder for quality.json and quality.png")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[Row] = []
    kinds: list[tuple[list[Named] | None, CallsOf]] = [
        (args.checkpoint or [Named("miniature", "miniature")], _compressed),
        (args.full, _in_full),
        (args.pointwise, _pointwise),
    ]
    try:
        for named, calls in [(named, calls) for given, calls in kinds for named in given or ()]:
            with opened(args.dir, named.path, args.split) as catalogue:
                head: Row = {"checkpoint": named.name, "digest": catalogue.engine.versions["checkpoint"]}
                rows += [head | row for row in measure(catalogue, args.split, args.limit, calls)]
    except RetrvR1Error as error:
        sys.stderr.write(f"{error}\n")
        return 1
    say(table(rows))
    if args.out:
        from retrv_r1_retriever.bench.plot import draw_quality  # matplotlib: only where a picture is asked for

        told = command("python -m retrv_r1_retriever.bench.quality", argv)
        report = {"command": told, "machine": machine(), "split": args.split, "K": K, "rows": rows}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
        draw_quality(report, args.out / "quality.png")
    return 0


def measure(catalogue: Catalogue, split: str, limit: int, calls: CallsOf) -> list[Row]:
    asked = run(ask(catalogue.folder, split, VectorFirstStage(catalogue.store, catalogue.embedder), limit))
    found = [a.candidates[0].document.id in a.labelled.positives for a in asked]
    listed = [any(c.document.id in a.labelled.positives for c in a.candidates) for a in asked]
    head: Row = {"queries": str(len(asked)), "in list": sum(listed) / len(listed)}
    rows: list[Row] = [{"mode": "first stage", **head, **_share(asked, found), "ms": 0.0}]
    for name, call, prepared in calls(catalogue, asked):
        right, seconds = [], []
        for one in [prepared[0], *prepared]:  # the first one twice: it warms up
            started = time.perf_counter()
            first = run(call(one))
            seconds.append(time.perf_counter() - started)
            right.append(first in one.labelled.positives)
        rows.append({"mode": name, **head, **_share(asked, right[1:]), "ms": 1e3 * median(seconds[1:])})
    return rows


def _compressed(catalogue: Catalogue, asked: Sequence[Asked]) -> Iterator[tuple[str, Call, Sequence[Asked]]]:
    reranker = RetrvR1Reranker(catalogue.engine, images=catalogue.images)

    async def first(one: Asked, options: RerankOptions) -> str:
        results = await reranker.arerank(one.query, one.candidates, options=options)
        return results.results[0].document.id

    for name, options in MODES.items():
        if options.think != "auto" or catalogue.engine.think_margin is not None:
            yield name, partial(first, options=options), asked


def _in_full(catalogue: Catalogue, asked: Sequence[Asked]) -> Iterator[tuple[str, Call, Sequence[Asked]]]:
    ready = [_encoded(catalogue, one) for one in asked]

    async def first(one: Asked, options: RerankOptions) -> str:
        prompt = build_full_prompt(one.query, one.candidates)
        reading = await read(catalogue.engine, prompt, options, images=_AsGiven())
        order = rank(one.candidates, reading.direct, reading.outcome, options.ranking)
        return one.candidates[order.indices[0]].document.id

    for name, options in FULL.items():
        yield name, partial(first, options=options), ready


def _pointwise(catalogue: Catalogue, asked: Sequence[Asked]) -> Iterator[tuple[str, Call, Sequence[Asked]]]:
    engine = catalogue.engine

    async def lead(one: Asked, candidate: Candidate) -> float:
        handle = await engine.open(build_full_prompt(one.query, [candidate]))
        try:
            return -none_lead((await engine.probe(handle, ANSWER_START)).logprobs)
        finally:
            await engine.close(handle)

    async def first(one: Asked) -> str:
        leads = await asyncio.gather(*(lead(one, candidate) for candidate in one.candidates))
        return one.candidates[max(range(len(leads)), key=leads.__getitem__)].document.id

    yield POINTWISE, first, [_encoded(catalogue, one) for one in asked]


def _encoded(catalogue: Catalogue, one: Asked) -> Asked:
    """With the candidates' pictures after the tower, and without the memory that nobody reads."""

    def ready(candidate: Candidate) -> Candidate:
        content, _ = run(load_content(catalogue.images, candidate.document.content))
        if content.image is not None:
            content = replace(content, image=catalogue.engine.encode_picture(content.image))  # type: ignore[arg-type]
        return replace(candidate, document=replace(candidate.document, content=content), memory=None)

    return replace(one, candidates=tuple(map(ready, one.candidates)))


class _AsGiven:
    """Pictures that are encoded already, for a thought that opens a candidate once more."""

    async def load(self, image: Any) -> ImageData:
        return ImageData(image, "")


def _share(asked: Sequence[Asked], right: Sequence[bool]) -> dict[str, Any]:
    """R@1 of each stratum and of all."""
    strata = {
        name: [ok for a, ok in zip(asked, right, strict=True) if a.labelled.stratum == name]
        for name in ("coarse", "fine")
    }
    shares = {f"R@1 {name}": sum(values) / len(values) for name, values in strata.items()}
    return {**shares, "R@1": sum(right) / len(right)}


if __name__ == "__main__":
    raise SystemExit(main())
