"""The quality table of the README: the test (or validation) split of the catalogue through the real index and reranker.

    python -m retrv_r1_retriever.demo.figures --split test

Every mode reranks the same candidates, fetched once with their memory. A positive missing from the list counts as a miss.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.config import Config, ModelConfig
from retrv_r1_retriever.demo import run as demo
from retrv_r1_retriever.demo.catalogue import TASKS, LabelledQuery, read_queries
from retrv_r1_retriever.evaluation.comparison import Comparison, compare
from retrv_r1_retriever.images import LocalImages, load_query
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.store import Equals, Filter, VectorFirstStage
from retrv_r1_retriever.types import Candidate, Query, RankedResults

K = 20
_THINK = RerankOptions(top_k=K, think="always", timeout_s=None)
MODES = {
    "logits, think=never": RerankOptions(top_k=K, think="never", ranking="logits", timeout_s=None),
    "hybrid, think=always": _THINK,
    "hybrid, think=auto": _THINK.with_options(think="auto"),  # only where the checkpoint is calibrated
    "hybrid, think=always, max_inspections=0": _THINK.with_options(max_inspections=0),
}
STRATA = ("coarse", "fine", "all")
Table = dict[str, dict[str, Comparison]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A labelled query with its first stage's candidates."""

    labelled: LabelledQuery
    query: Query
    candidates: tuple[Candidate, ...]


async def ask(
    folder: Path, split: str, first_stage: VectorFirstStage, limit: int | None, top_k: int = K
) -> list[Asked]:
    """Candidates of all queries of a split; `limit` per task and stratum."""
    images, asked = LocalImages(folder), []
    for task in TASKS:
        queries = read_queries(folder, split, task)
        for stratum in ("coarse", "fine"):
            for labelled in [q for q in queries if q.stratum == stratum][:limit]:
                query = await load_query(images, labelled.query)
                only = Filter(must=(Equals("modality", labelled.target_modality),))
                asked.append(Asked(labelled, query, tuple(await first_stage(query, top_k=top_k, filter=only))))
    return asked


def measure(
    reranker: RetrvR1Reranker, asked: Sequence[Asked], progress: Callable[[str, int, int], None], batch: int = 100
) -> Table:
    """mode -> stratum -> comparison. Lists as long as they are given."""
    out, top_k = {}, max(len(a.candidates) for a in asked)
    for name, options in MODES.items():
        if options.think == "auto" and reranker.engine.think_margin is None:
            continue
        results: list[RankedResults] = []
        for start in range(0, len(asked), batch):
            part = asked[start : start + batch]
            results += reranker.rerank_batch(
                [a.query for a in part],
                [a.candidates for a in part],
                options=options.with_options(top_k=top_k),
                concurrency=batch,
            )
            progress(name, len(results), len(asked))
        if options is _THINK:
            promoted = [_promote(r) for r in results]
            out["promote, think=always"] = {s: _compare(asked, promoted, s) for s in STRATA}
        out[name] = {stratum: _compare(asked, results, stratum) for stratum in STRATA}
    return out


def _promote(results: RankedResults) -> RankedResults:
    """The same thoughts ranked by `promote`: the answer first, the rest as retrieved."""
    order = sorted(results.results, key=lambda r: (not r.selected, r.candidate.rank))
    return replace(results, results=tuple(order))


def markdown(table: Table, split: str, top_k: int = K) -> str:
    """One row per mode and stratum; the first stage on top."""
    any_mode = next(iter(table.values()))
    lines = [
        f"Split `{split}`, {any_mode['all'].queries} queries ({any_mode['coarse'].queries} coarse, "
        f"{any_mode['fine'].queries} fine), K = {top_k}.",
        "",
        "| order | stratum | R@1 | R@5 | MRR | opened per query | thought about |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stratum in STRATA:
        c = any_mode[stratum]
        s = c.first_stage
        name = f"first stage (R@{top_k} {c.ceiling:.3f})"
        lines.append(f"| {name} | {stratum} | {s.recall_at_1:.3f} | {s.recall_at_5:.3f} | {s.mrr:.3f} | | |")
    for mode, strata in table.items():
        for stratum in STRATA:
            c, s = strata[stratum], strata[stratum].reranked
            cells = f"{s.recall_at_1:.3f} | {s.recall_at_5:.3f} | {s.mrr:.3f} | {c.opened:.2f} | {c.thought:.0%}"
            lines.append(f"| {mode} | {stratum} | {cells} |")
    return "\n".join(lines)


def by_length(tables: Mapping[int, Table]) -> str:
    """R@1 of every mode by K, beside the share of lists that hold the answer."""
    modes = list(next(iter(tables.values())))
    lines = [
        "| K | stratum | in the list | first stage | " + " | ".join(modes) + " |",
        "|" + " --- |" * (4 + len(modes)),
    ]
    for top_k, table in tables.items():
        for stratum in STRATA:
            c = table[modes[0]][stratum]
            cells = [c.ceiling, c.first_stage.recall_at_1, *(table[m][stratum].reranked.recall_at_1 for m in modes)]
            lines.append(f"| {top_k} | {stratum} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def _compare(asked: Sequence[Asked], results: Sequence[RankedResults], stratum: str) -> Comparison:
    pairs = [
        (a.labelled.positives, r) for a, r in zip(asked, results, strict=True) if stratum in (a.labelled.stratum, "all")
    ]
    return compare([p for p, _ in pairs], [r for _, r in pairs])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--split", default="val", choices=("val", "test"), help="choices are made on val; test is read once"
    )
    parser.add_argument("--checkpoint", default="miniature", help="a checkpoint folder; default: the shipped miniature")
    parser.add_argument("--dir", type=Path, default=Path("demo-data"), help="where catalogue and index are kept")
    parser.add_argument("--limit", type=int, help="queries per task and stratum")
    parser.add_argument("--top-k", type=int, nargs="+", default=[K], metavar="K", help="several: one table of R@1 by K")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args(argv)

    def progress(what: str, done: int, total: int) -> None:
        if done == total:
            sys.stderr.write(f"{what}: {done}/{total}\n")

    base = Config(model=ModelConfig(checkpoint=args.checkpoint))
    demo.prepare(args.dir, progress, args.split)
    engine, embedder = settings.open_engine(base), settings.open_embedder(base)
    config = demo.demo_config(args.dir, base, engine.versions["checkpoint"], args.split)
    store = settings.open_store(config, settings.collection_spec(engine, embedder))
    try:
        demo.build_index(config, store, embedder, engine, progress, args.split)
        asked = run(ask(args.dir, args.split, VectorFirstStage(store, embedder), args.limit, max(args.top_k)))
    finally:
        run(store.close())
    reranker = RetrvR1Reranker(engine, images=LocalImages(args.dir))
    tables = {
        k: measure(reranker, [replace(a, candidates=a.candidates[:k]) for a in asked], progress) for k in args.top_k
    }
    text = by_length(tables) if len(tables) > 1 else markdown(tables[args.top_k[0]], args.split, args.top_k[0])
    sys.stdout.write(text + "\n")
    if args.json:
        plain = {k: {m: {s: asdict(c) for s, c in t.items()} for m, t in table.items()} for k, table in tables.items()}
        args.json.write_text(json.dumps(plain, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
