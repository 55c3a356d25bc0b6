"""The demo, without any printing: catalogue on disk, index, queries of three kinds, and which of them to show.

The queries shown are picked: per kind the first one of a fixed list that the first stage gets wrong and an inspection puts right,
and the first one of the list whatever comes out. `Scan.comparison` is over the whole list, so that nobody takes the picked
ones for the average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.config import Config, ImagesConfig, StoreConfig
from retrv_r1_retriever.demo.catalogue import TASKS, LabelledQuery, pool_path, read_queries, write_catalogue
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.embedders import Embedder
from retrv_r1_retriever.engines.base import Compressor, Engine
from retrv_r1_retriever.evaluation.comparison import Comparison, compare
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.indexing import Indexer, IndexReport
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.qdrant import QdrantStore
from retrv_r1_retriever.readers import read_mbeir
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.store import Equals, Filter, Store
from retrv_r1_retriever.types import RankedResults

SPLIT = "test"
KINDS = {"t2i": "text → image", "i2t": "image → text", "cir": "image + text → image"}
PER_STRATUM = 10  # queries scanned per task and stratum
BATCH = 20  # queries that share each forward pass
OPTIONS = RerankOptions(top_k=20, think="always", ranking="hybrid", timeout_s=None)

#: (what, done, total)
ProgressFn = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Shown:
    """rescued: picked because an inspection put it right; otherwise it is simply the first of its kind"""

    kind: str
    query: LabelledQuery
    results: RankedResults
    rescued: bool


@dataclass(frozen=True, slots=True)
class Scan:
    """comparison: over all scanned queries; strata: the same for each stratum alone"""

    comparison: Comparison
    strata: dict[str, Comparison]
    shown: tuple[Shown, ...]


def prepare(folder: Path, progress: ProgressFn, split: str = SPLIT) -> None:
    """Write one pool of the catalogue; a second call finds it there."""
    write_catalogue(folder, (split,), progress)


def demo_config(folder: Path, base: Config, checkpoint_digest: str, split: str = SPLIT) -> Config:
    """One index per checkpoint: vectors of two embedders cannot be told apart by looking at them."""
    return replace(
        base,
        store=StoreConfig(path=f"index-{split}-{checkpoint_digest[:8]}"),
        images=ImagesConfig(root="."),
        folder=folder.resolve(),
    )


def build_index(
    config: Config,
    store: EdgeStore | QdrantStore,
    embedder: Embedder,
    compressor: Compressor,
    progress: ProgressFn,
    split: str = SPLIT,
) -> IndexReport:
    pool = pool_path(config.folder, split)
    with pool.open("rb") as file:
        total = sum(1 for _ in file)

    def show(report: IndexReport) -> None:
        progress("indexing", report.indexed + report.skipped + len(report.failed), total)

    images = settings.open_images(config)
    report = Indexer(store, embedder, compressor, images, batch_size=64, progress=show).index(read_mbeir(pool))
    run(store.index_fields("modality"))
    return report


def scan(
    folder: Path, store: Store, embedder: Embedder, engine: Engine, progress: ProgressFn, per_stratum: int = PER_STRATUM
) -> Scan:
    """Run the fixed list: the first queries of every task and stratum."""
    retriever = RetrvR1Retriever(
        store=store, embedder=embedder, engine=engine, images=LocalImages(folder), options=OPTIONS
    )
    queries = [q for task in TASKS for q in _first_of_each_stratum(read_queries(folder, SPLIT, task), per_stratum)]
    results: list[RankedResults] = []
    shown: list[Shown] = []
    for task in TASKS:
        batch = [q for q in queries if q.task == task]
        only = Filter(must=(Equals("modality", batch[0].target_modality),))
        for start in range(0, len(batch), BATCH):
            part = [q.query for q in batch[start : start + BATCH]]
            results += retriever.retrieve_batch(part, filter=only, concurrency=BATCH)
            progress("searching", len(results), len(queries))

        def decided(query: LabelledQuery, only: Filter = only) -> bool:
            """The same call without an inspection goes wrong."""
            without = retriever.retrieve(query.query, filter=only, options=OPTIONS.with_options(max_inspections=0))
            return without.results[0].document.id not in query.positives

        shown += _pick(task, list(zip(batch, results[-len(batch) :], strict=True)), decided)
    pairs = list(zip(queries, results, strict=True))
    return Scan(
        _compare(pairs),
        {name: _compare([p for p in pairs if p[0].stratum == name]) for name in ("coarse", "fine")},
        tuple(shown),
    )


def rescued_by_inspection(query: LabelledQuery, results: RankedResults) -> bool:
    """Wrong before, right after, and the right one was opened and found to match."""
    top = results.results[0]
    right = top.document.id in query.positives and top.candidate.rank > 1
    return right and top.signals.opened and top.signals.match is True


def close(store: Store) -> None:
    run(store.close())


def _first_of_each_stratum(queries: Sequence[LabelledQuery], count: int) -> list[LabelledQuery]:
    return [q for name in ("coarse", "fine") for q in [q for q in queries if q.stratum == name][:count]]


def _compare(pairs: Sequence[tuple[LabelledQuery, RankedResults]]) -> Comparison:
    return compare([query.positives for query, _ in pairs], [results for _, results in pairs])


def _pick(
    task: str, pairs: Sequence[tuple[LabelledQuery, RankedResults]], decided: Callable[[LabelledQuery], bool]
) -> list[Shown]:
    """The first query that an inspection rescued, and the first of all. decided: whether it goes wrong without one."""
    rescued = next((pair for pair in pairs if rescued_by_inspection(*pair) and decided(pair[0])), None)
    shown = [Shown(KINDS[task], *rescued, True)] if rescued else []
    first = next(pair for pair in pairs if pair is not rescued)
    return [*shown, Shown(KINDS[task], *first, False)]
