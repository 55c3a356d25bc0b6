"""The M-BEIR benchmark: its sixteen tasks as they are on disk, and the way from a data folder to scored queries.

Everything that takes time is kept below `out` and goes on where a kill left it: an index per pool (`index/`), first-stage lists and
rerankings one query a line (`lists/`). Scores are always computed from these files.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from retrv_r1_retriever.embedders import Embedder, embed
from retrv_r1_retriever.engines.base import Compressor, Engine
from retrv_r1_retriever.errors import ImageError, InputError, explain
from retrv_r1_retriever.evaluation.first_stage import RunFirstStage
from retrv_r1_retriever.evaluation.journal import Journal, digest_of, fingerprint
from retrv_r1_retriever.evaluation.mbeir import INSTRUCTIONS, Dataset, Limits
from retrv_r1_retriever.evaluation.mbeir import TASKS as SHAPES
from retrv_r1_retriever.evaluation.measure import ProgressFn, label
from retrv_r1_retriever.evaluation.modes import check_modes
from retrv_r1_retriever.evaluation.records import Record, record_of
from retrv_r1_retriever.images import ImageSource, load_query
from retrv_r1_retriever.indexing import Indexer
from retrv_r1_retriever.observe import Observers
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.readers import read_mbeir
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.types import MAX_CANDIDATES, Query, RankedResults, Status, StopReason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import numpy as np

    from retrv_r1_retriever.edge import EdgeStore

PoolKind = Literal["local", "global"]
DEPTH = MAX_CANDIDATES  # first-stage lists are as long as any reranking may ask for


@dataclass(frozen=True, slots=True)
class Task:
    """dataset, number: as in file names; title: the column's head in papers' tables"""

    dataset: str
    number: int
    title: str

    @property
    def name(self) -> str:
        return f"{self.dataset}_task{self.number}"

    @property
    def cuts(self) -> tuple[int, int, int]:
        """Recall is reported at these; fashion sets have many near-equal candidates."""
        return (10, 20, 50) if self.dataset in ("fashion200k", "fashioniq") else (1, 5, 10)

    @property
    def headline(self) -> int:
        """The k of the table and of the average."""
        return 10 if self.dataset in ("fashion200k", "fashioniq") else 5

    @property
    def sought(self) -> str:
        """The modality of its candidates."""
        return next(candidate for (_, candidate), number in SHAPES.items() if number == self.number)

    @property
    def queries(self) -> str:
        return f"query/test/mbeir_{self.name}_test.jsonl"

    @property
    def qrels(self) -> str:
        return f"qrels/test/mbeir_{self.name}_test_qrels.txt"

    def pool(self, kind: PoolKind) -> str:
        """MSCOCO's pools differ between validation and test, and say so in their names."""
        if kind == "global":
            return "cand_pool/global/mbeir_union_test_cand_pool.jsonl"
        split = "_test" if self.dataset == "mscoco" else ""
        return f"cand_pool/local/mbeir_{self.name}{split}_cand_pool.jsonl"


#: In the column order of the papers.
TASKS = (
    Task("visualnews", 0, "VN t→i"), Task("mscoco", 0, "COCO t→i"), Task("fashion200k", 0, "F200K t→i"),
    Task("webqa", 1, "WebQA t→t"), Task("edis", 2, "EDIS t→it"), Task("webqa", 2, "WebQA t→it"),
    Task("visualnews", 3, "VN i→t"), Task("mscoco", 3, "COCO i→t"), Task("fashion200k", 3, "F200K i→t"),
    Task("nights", 4, "NIGHTS i→i"), Task("oven", 6, "OVEN it→t"), Task("infoseek", 6, "InfoSeek it→t"),
    Task("fashioniq", 7, "FIQ it→i"), Task("cirr", 7, "CIRR it→i"), Task("oven", 8, "OVEN it→it"),
    Task("infoseek", 8, "InfoSeek it→it"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setup:
    """What is evaluated. same_dataset: positives of other data sets than the query's do not count (OVEN and InfoSeek share some)

    seed: draws each query's instruction; max_bad_share: of rows that may be skipped in a file, 0 = any bad row is an error
    """

    root: Path
    out: Path
    modes: tuple[RerankOptions, ...]
    tasks: tuple[Task, ...] = TASKS
    pool: PoolKind = "local"
    same_dataset: bool = False
    seed: int = 0
    concurrency: int = 8
    max_bad_share: float = 0.0

    def __post_init__(self) -> None:
        self.limits()
        check_modes(self.modes)

    def limits(self) -> Limits:
        """Raises `OptionsError`."""
        return Limits(self.out / "lines", self.max_bad_share)

    def files(self, task: Task) -> tuple[str, ...]:
        return (task.queries, task.qrels, task.pool(self.pool), INSTRUCTIONS.as_posix())

    def absent(self) -> dict[str, list[str]]:
        """Task -> its files that are not there."""
        found = {t.name: [f for f in self.files(t) if not (self.root / f).is_file()] for t in self.tasks}
        return {name: files for name, files in found.items() if files}

    def data(self, task: Task) -> Dataset:
        limits = self.limits()
        data = Dataset.open(self.root, task.queries, task.pool(self.pool), qrels=task.qrels, limits=limits)
        data.instructions.skipped.check(INSTRUCTIONS.as_posix(), self.max_bad_share)
        return replace(data, same_dataset=self.same_dataset, sought=task.sought)


@dataclass(frozen=True, slots=True)
class Parts:
    """The system under test. embedder_digest: names the embedder in caches; engine: None = first stage alone"""

    embedder: Embedder
    embedder_digest: str
    spec: CollectionSpec
    images: ImageSource
    engine: Engine | None = None
    observers: Observers = ()

    @property
    def compressor(self) -> Compressor | None:
        return self.engine if isinstance(self.engine, Compressor) else None


@dataclass(frozen=True)
class TaskRun:
    """One task's lists on disk. pool: whose they are; rerankings: mode -> journal; skipped: what could not be read, with reasons"""

    task: Task
    data: Dataset
    pool: PoolKind
    first_stage: Journal
    rerankings: Mapping[str, Journal]
    skipped: list[str] = field(default_factory=list)

    def records(self, mode: str) -> Iterator[Record]:
        """In the order in which they were done; `rest` is the first stage's list from K on."""
        for row in self.rerankings[mode].rows():
            record = Record.from_json(row["record"])
            known = record.query in self.first_stage
            rest = self.first_stage.get(record.query)["ranked"][len(record.before) :] if known else ()
            yield replace(record, rest=tuple(id for id, _ in rest))


async def run_benchmark(setup: Setup, parts: Parts, progress: ProgressFn) -> list[TaskRun]:
    """Every task whose files are there, in the order of `setup.tasks`."""
    absent = setup.absent()
    present = [task for task in setup.tasks if task.name not in absent]
    runs = {task.name: _open(task, setup, parts) for task in present}
    meter = _Meter(progress, list(runs.values()))
    for pool, members in groupby(sorted(present, key=lambda t: t.pool(setup.pool)), key=lambda t: t.pool(setup.pool)):
        async with _indexed(setup, parts, pool, progress) as (store, failed):
            for task in members:
                one = runs[task.name]
                if failed:
                    one = runs[task.name] = meter.instead(one, _open(task, setup, parts, failed))
                await _search(one, setup, parts, store, meter)
                for options in setup.modes if parts.engine else ():
                    await _rerank(one, setup, parts, store, options, meter)
    return [runs[task.name] for task in present]


def _open(task: Task, setup: Setup, parts: Parts, failed: Mapping[str, str] = MappingProxyType({})) -> TaskRun:
    """failed: candidates that the index lacks; lists over it are never taken for those of the whole pool"""
    data = setup.data(task)
    if not len(data):
        raise InputError(explain(task.queries, expected="at least one query", got="none", fix="Restore the file."))
    # not the qrels: judgements decide scores, not lists (see `Dataset.sought`)
    made_of = [task.queries, task.pool(setup.pool), INSTRUCTIONS.as_posix()]
    files = {name: fingerprint(setup.root / name) for name in made_of}
    searched = {"files": files, "embedder": parts.embedder_digest, "depth": DEPTH, "seed": setup.seed,
                "left_out": digest_of(sorted(failed)) if failed else None}  # fmt: skip
    lists, name = setup.out / "lists", f"{task.name}.{setup.pool}"
    rerankings = {}
    if parts.engine is not None:
        for options in setup.modes:
            settings = {"first_stage": searched, "options": asdict(options), "versions": dict(parts.engine.versions),
                        "kept": "rows with all candidates read"}  # earlier versions kept others too  # fmt: skip
            file = f"{name}.{label(options).replace(' ', '.').replace('/', '.').replace('=', '')}"
            rerankings[label(options)] = Journal(lists, file, settings, _check_record)
    skipped = [f"candidate {id}: {reason}" for id, reason in failed.items()]
    return TaskRun(
        task, data, setup.pool, Journal(lists, f"{name}.first-stage", searched, _check_list), rerankings, skipped
    )


def _check_list(row: Mapping[str, Any]) -> None:
    whole = isinstance(row["number"], int)
    if not whole or not all(isinstance(id, str) and math.isfinite(score) for id, score in row["ranked"]):
        raise ValueError("no list of ids with finite scores")


def _check_record(row: Mapping[str, Any]) -> None:
    record = Record.from_json(row["record"])
    if record.query != row["query"] or sorted(record.after) != sorted(record.before):
        raise ValueError("a record of another query, or of other candidates after than before")


class _Meter:
    """Progress over all tasks, of what is still to do: what was cached took no time and must not promise any."""

    def __init__(self, progress: ProgressFn, runs: Sequence[TaskRun]) -> None:
        self._progress = progress
        self._done = {"first stage": 0, "reranking": 0}
        self._total = {what: sum(_left(run)[what] for run in runs) for what in self._done}

    def instead(self, old: TaskRun, new: TaskRun) -> TaskRun:
        """The new one, which is counted in place of the old one."""
        self._total = {what: total + _left(new)[what] - _left(old)[what] for what, total in self._total.items()}
        return new

    def __call__(self, what: str, count: int) -> None:
        self._done[what] += count
        self._progress(what, self._done[what], self._total[what])


def _left(run: TaskRun) -> dict[str, int]:
    """Queries that are still to be done."""
    rerankings = sum(len(run.data) - len(journal) for journal in run.rerankings.values())
    return {"first stage": len(run.data) - len(run.first_stage), "reranking": rerankings}


# -- index -------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _indexed(
    setup: Setup, parts: Parts, pool: str, progress: ProgressFn
) -> AsyncIterator[tuple[EdgeStore, dict[str, str]]]:
    """The pool's store, complete but for what could not be read: that is tried again each time, and listed with reasons."""
    from retrv_r1_retriever.edge import EdgeStore

    path = setup.root / pool
    digest = digest_of([fingerprint(path), parts.embedder_digest, parts.spec.to_json()])
    folder = setup.out / "index" / f"{Path(pool).stem}.{digest}"
    store = EdgeStore(folder, spec=parts.spec)
    try:
        failed: dict[str, str] = {}
        if not await _whole(store, folder / "complete", parts):
            total = len(setup.data(next(t for t in setup.tasks if t.pool(setup.pool) == pool)).pool)

            def show(report: Any) -> None:
                progress(f"index {Path(pool).stem}", report.indexed + report.skipped + len(report.failed), total)

            indexer = Indexer(store, parts.embedder, parts.compressor, parts.images, batch_size=256, progress=show)
            report = await indexer.aindex(read_mbeir(path))
            failed = {failure.id: failure.reason for failure in report.failed}
            if not failed:
                (folder / "complete").write_text(f"{report.indexed + report.skipped}\n")
        yield store, failed
    finally:
        await store.close()


async def _whole(store: EdgeStore, marker: Path, parts: Parts) -> bool:
    """The marker counts what was written. Files may have been lost since: what is left would give other lists without a word."""
    counts = [await store.count(), *([await store.memory_count()] if parts.compressor else [])]
    return _says(marker, counts)


def _says(marker: Path, counts: Sequence[int]) -> bool:
    return marker.exists() and all(f"{count}\n" == marker.read_text() for count in counts)


# -- first stage -------------------------------------------------------------------------------------------------------


async def _search(
    run: TaskRun, setup: Setup, parts: Parts, store: EdgeStore, meter: Callable[[str, int], None]
) -> None:
    """Exact: Qdrant Edge scans every vector until it is told to optimize."""
    todo = (n for n in range(len(run.data)) if run.data.queries[n].id not in run.first_stage)
    for numbers in _batches(todo, setup.concurrency):
        queries = await _readable(run, numbers, setup, parts)
        vectors = await embed(parts.embedder, [query for _, query in queries]) if queries else ()
        found = await asyncio.gather(*(_nearest(store, vector) for vector in vectors))
        run.first_stage.append(
            {"query": query.id, "number": number, "ranked": ranked}
            for (number, query), ranked in zip(queries, found, strict=True)
        )
        meter("first stage", len(numbers))


async def _nearest(store: EdgeStore, vector: np.ndarray) -> list[tuple[str, float]]:
    """Which of equals at the end of the list come back depends on how the store was written: all are asked for, and stand by id."""
    limit = DEPTH + 1
    while True:
        found = await store.search(vector, limit, with_memory=False)
        scored = [(c.document.id, c.retrieval_score or 0.0) for c in found]
        if len(scored) < limit or scored[-1][1] < scored[DEPTH - 1][1]:
            return scored[:DEPTH]
        limit *= 2


async def _readable(run: TaskRun, numbers: Sequence[int], setup: Setup, parts: Parts) -> list[tuple[int, Query]]:
    """Those whose pictures can be read, decoded. The instruction depends on the seed and the line alone."""
    queries = []
    for number in numbers:
        query = run.data.query(number, random.Random(f"{setup.seed} {number}")).query
        try:
            queries.append((number, await load_query(parts.images, query)))
        except ImageError as error:
            run.skipped.append(f"query {query.id}: {error}")
    return queries


# -- reranking ---------------------------------------------------------------------------------------------------------


async def _rerank(
    run: TaskRun,
    setup: Setup,
    parts: Parts,
    store: EdgeStore,
    options: RerankOptions,
    meter: Callable[[str, int], None],
) -> None:
    """What `_spoiled` names is not kept: the next run tries it again, and until then the query counts as skipped."""
    assert parts.engine is not None
    journal = run.rerankings[label(options)]
    reranker = RetrvR1Reranker(parts.engine, images=parts.images, observers=parts.observers)
    todo = (row for row in run.first_stage.rows() if row["query"] not in journal)
    for rows in _batches(todo, setup.concurrency):
        stage = RunFirstStage(store, {row["query"]: row["ranked"] for row in rows}, parts.compressor is not None)
        queries = [query for _, query in await _readable(run, [row["number"] for row in rows], setup, parts)]
        found = [await stage(query, top_k=options.top_k) for query in queries]
        ranked = await reranker.arerank_batch(queries, found, options=options, concurrency=setup.concurrency)
        spoiled = [(r, reason) for r in ranked if (reason := _spoiled(r))]
        run.skipped.extend(f"query {r.query.id}, {label(options)}: {reason}" for r, reason in spoiled)
        journal.append({"query": r.query.id, "record": record_of(r).to_json()} for r in ranked if not _spoiled(r))
        meter("reranking", len(rows))


def _spoiled(ranked: RankedResults) -> str | None:
    """Why this says nothing of the system: the engine failed, before or in a thought, or memory or a picture that was indexed is gone.

    What the model left unjudged by itself, or for want of budget, is the system's own doing and counts.
    """
    if ranked.status is Status.FALLBACK:
        return f"not reranked: {ranked.reason}"
    trace = ranked.trace
    assert trace is not None  # only fallbacks have none
    unread = {r.document.id for r in ranked} - {*trace.candidates}  # without memory they were not in the prompt
    broken = trace.stop_reason is StopReason.ENGINE_ERROR or trace.unreadable or unread
    return f"not as asked for: {ranked.reason}" if broken else None


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
