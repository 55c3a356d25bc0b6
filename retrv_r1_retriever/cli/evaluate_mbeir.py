"""`retrv-r1 eval mbeir`: the sixteen tasks of M-BEIR from a data folder to the papers' table."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._arguments import at_least_one
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.evaluate import add_modes, modes_of
from retrv_r1_retriever.cli.outcome import configuration_table
from retrv_r1_retriever.cli.search import add_options, check_output, load_config
from retrv_r1_retriever.cli.terminal import Progress, print_json, print_table, print_wrapped, printable
from retrv_r1_retriever.config import Config
from retrv_r1_retriever.engines.base import Compressor
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.benchmark import TASKS, Parts, Setup, Task, TaskRun, run_benchmark
from retrv_r1_retriever.evaluation.journal import digest_of, fingerprint
from retrv_r1_retriever.evaluation.measure import label, tag
from retrv_r1_retriever.evaluation.records import LostBy, Record, lost_by
from retrv_r1_retriever.evaluation.runs import run_lines
from retrv_r1_retriever.evaluation.scores import CEILINGS, FIRST_STAGE, BenchmarkScore, score
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.report import ReportEntry, ReportTable
from retrv_r1_retriever.types import Candidate, Document, RankedResult, RankedResults

PROBLEMS_SHOWN = 5
ROWS_SHOWN = 5


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, required=True, metavar="DIR", help="M-BEIR's folder: query, cand_pool, ..."
    )
    parser.add_argument("--out", type=Path, default=Path("mbeir-eval"), metavar="DIR", help="caches and results")
    parser.add_argument("--pool", choices=("local", "global"), default="local", help="each task's own, or the union")
    parser.add_argument("--tasks", metavar="NAME[,NAME...]", help="e.g. cirr_task7; the average needs all")
    parser.add_argument(
        "--same-dataset", action="store_true", help="positives of other data sets do not count (OVEN, InfoSeek)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the paraphrase of each query's instruction")
    parser.add_argument("--first-stage-only", action="store_true", help="no reranking, and an index without memory")
    parser.add_argument(
        "--shown", type=at_least_one, default=2, metavar="N", help="lost queries per task and step in --report"
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of rows that may be skipped; refuses the average",
    )
    add_modes(parser)
    add_options(parser)
    parser.set_defaults(run=main, concurrency=8)


def main(args: argparse.Namespace) -> int:
    """1 while the average is refused."""
    config = load_config(args)
    modes = [o.with_options(timeout_s=args.timeout_s) for o in modes_of(args, config.rerank)]  # load decides no number
    setup = Setup(args.root, args.out, tuple(modes), _tasks(args.tasks), args.pool, args.same_dataset, args.seed,
                  args.concurrency, args.max_bad_share)  # fmt: skip
    absent = setup.absent()
    if len(absent) == len(setup.tasks):
        name, files = next(iter(absent.items()))
        fix = "Point --root at the folder that holds query/, qrels/ and cand_pool/."
        raise InputError(explain(str(args.root), expected="M-BEIR's files", got=f"no {files[0]} for {name}", fix=fix))
    check_output(args.report)
    parts = _parts(config, args)
    configuration = describe(setup, parts)
    check_output(results_folder(setup, configuration) / "results.json")
    runs = run(run_benchmark(setup, parts, Progress()))
    scores = BenchmarkScore(tuple(score(one) for one in runs), absent)
    written = write_results(setup, runs, scores, configuration)
    if args.report:
        _write_report(args.report, setup, runs, scores, configuration, args.shown)
        written.append(args.report)
    if args.json:
        print_json(results_json(scores, configuration))
    else:
        _print(scores, configuration, written)
    return 0 if scores.complete else 1


def _tasks(names: str | None) -> tuple[Task, ...]:
    known = {task.name: task for task in TASKS}
    asked = [name.strip() for name in names.split(",")] if names else list(known)
    for name in asked:
        if name not in known:
            raise InputError(explain("--tasks", expected=f"some of {', '.join(known)}", got=repr(name), fix="Fix it."))
    return tuple(task for task in TASKS if task.name in asked)


def _parts(config: Config, args: argparse.Namespace) -> Parts:
    from retrv_r1_retriever.model.checkpoint import numerics

    observers = config.observers()  # the quick part first: a wrong path should not wait for a model
    embedder = settings.open_embedder(config)
    engine = None if args.first_stage_only else settings.open_reader(config)
    compressor = engine if isinstance(engine, Compressor) else None
    spec = settings.collection_spec(compressor, embedder)
    limits = config.images
    images = LocalImages(
        args.root, max_bytes=limits.max_bytes, max_pixels=limits.max_pixels, timeout_s=limits.timeout_s
    )
    digest = " ".join((embedder.digest, *numerics(embedder.model).values()))
    return Parts(embedder, digest, spec, images, engine, observers)


def describe(setup: Setup, parts: Parts) -> dict[str, Any]:
    """What the numbers depend on; `id` stands in every run file's tag. tasks: those asked for, with what tells their files apart"""
    absent = setup.absent()
    files = {task.name: [] if task.name in absent else setup.files(task) for task in setup.tasks}
    values = {
        "benchmark": "M-BEIR test",
        "pool": setup.pool,
        "tasks": {
            name: digest_of([fingerprint(setup.root / file) for file in needed]) if needed else "files are missing"
            for name, needed in files.items()
        },
        "metric": "recall@k: any right answer among the first k; k = 10 for Fashion200K and FashionIQ, else 5",
        "first_stage": {"search": "exact cosine (Qdrant Edge)", "embedder": parts.embedder_digest},
        "fusion": "none",
        "modes": {label(options): asdict(options) for options in setup.modes} if parts.engine else {},
        "engine": dict(parts.engine.versions) if parts.engine else None,
        "same_dataset": setup.same_dataset,
        "instruction_seed": setup.seed,
    }
    return {"id": digest_of(values), **values}


def results_folder(setup: Setup, configuration: Mapping[str, Any]) -> Path:
    """A folder for each configuration, its tasks and data among it: two runs into one `out` share index and lists, and neither
    overwrites the other's results.
    """
    return setup.out / f"{setup.pool}.{configuration['id']}"


# -- files -------------------------------------------------------------------------------------------------------------


def write_results(
    setup: Setup, runs: Sequence[TaskRun], scores: BenchmarkScore, configuration: Mapping[str, Any]
) -> list[Path]:
    """The table, everything as JSON, a TREC run per task and system, and all problems."""
    out = results_folder(setup, configuration)
    folder = out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    head = f"mbeir.{setup.pool}.{configuration['id']}"
    for one in runs:
        lists = ((row["query"], row["ranked"]) for row in one.first_stage.rows())
        _write_run(folder / f"{one.task.name}.{setup.pool}.first-stage.txt", lists, f"{head}.first-stage")
        for options, mode in zip(setup.modes, one.rerankings, strict=False):
            lists = ((r.query, [(id, -place) for place, id in enumerate(r.reranked, 1)]) for r in one.records(mode))
            name = tag(options)
            _write_run(folder / f"{one.task.name}.{setup.pool}.{name}.txt", lists, f"{head}.{name}")
    table, everything, problems = (out / name for name in ("results.tsv", "results.json", "problems.txt"))
    rows = [("system", *(task.title for task in TASKS), "average"), *_papers_rows(scores)]
    comment = json.dumps(configuration, ensure_ascii=False)
    table.write_text(f"# {comment}\n" + "".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    everything.write_text(json.dumps(results_json(scores, configuration), ensure_ascii=False, indent=1) + "\n", "utf-8")
    problems.write_text(f"# {comment}\n" + "".join(f"{line}\n" for line in _problems(scores)), encoding="utf-8")
    return [table, everything, folder, problems]


def _write_run(path: Path, lists: Any, name: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for query, ranked in lists:
            file.writelines(run_lines(query, ranked, name))


def _papers_rows(scores: BenchmarkScore) -> list[tuple[str, ...]]:
    """Percent with one digit, as papers print them; an empty cell for a task without a number."""
    tasks = {task.task: task for task in scores.tasks}
    rows = []
    for system in scores.systems:
        found = [tasks.get(task.name) for task in TASKS]
        cells = (f"{100 * t.systems[system].recall[t.headline]:.1f}" if t else "" for t in found)
        rows.append((system, *cells, _percent(scores.average[system])))
    return rows


def _percent(value: float | None) -> str:
    return "refused" if value is None else f"{100 * value:.1f}"


def results_json(scores: BenchmarkScore, configuration: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "configuration": configuration,
        "average": scores.average,
        "complete": scores.complete,
        "absent": scores.absent,
        "notes": _notes(scores, configuration),
        "tasks": {task.task: asdict(task) for task in scores.tasks},
    }


def _problems(scores: BenchmarkScore) -> list[str]:
    absent = [f"{name}: missing: {', '.join(files)}" for name, files in scores.absent.items()]
    asked = len(scores.tasks) + len(absent)
    fewer = [f"{asked} of the {len(TASKS)} tasks were asked for"] if asked < len(TASKS) else []
    return fewer + absent + [f"{task.task}: {problem}" for task in scores.tasks for problem in task.problems]


def _notes(scores: BenchmarkScore, configuration: Mapping[str, Any]) -> list[str]:
    """A reranking changes places among its K candidates alone: a recall at K or beyond is the first stage's."""
    notes = []
    for k in sorted({options["top_k"] for options in configuration["modes"].values()}):
        fixed = sorted(Counter(task.headline for task in scores.tasks if k <= task.headline).items())
        metrics = " and ".join(f"R@{headline} ({count} tasks)" for headline, count in fixed)
        if fixed:
            notes.append(f"K={k}: reranking the first {k} cannot change {metrics}; take a larger --top-k")
    return notes


def _refusal(scores: BenchmarkScore) -> list[str]:
    """Why there is no average, in a few lines; empty if there is one."""
    problems = _problems(scores)
    if not problems:
        return []
    more = len(problems) - PROBLEMS_SHOWN
    return [
        f"the average is refused: it would not be one of sixteen whole tasks ({len(problems)} problems)",
        *(f"  {line}" for line in problems[:PROBLEMS_SHOWN]),
        *([f"  ... and {more} more in problems.txt"] if more > 0 else []),
    ]


# -- what is shown -----------------------------------------------------------------------------------------------------


def _tables(scores: BenchmarkScore) -> list[ReportTable]:
    """Tasks as rows, in the papers' order: headline recalls; the ceilings of the first stage; who lost the rest."""
    average = ("average", "", "", *(_percent(scores.average[system]) for system in scores.systems))
    recalls = [
        (
            t.title,
            f"{t.queries:,}",
            f"R@{t.headline}",
            *(f"{100 * s.recall[t.headline]:.1f}" for s in t.systems.values()),
        )
        for t in scores.tasks
    ]
    tables = [ReportTable("Recall in percent", ("", "queries", "metric", *scores.systems), (*recalls, average))]
    ceilings = [(t.title, *(f"{100 * t.systems[FIRST_STAGE].recall[k]:.1f}" for k in CEILINGS)) for t in scores.tasks]
    header = ("", *(f"R@{k}" for k in CEILINGS))
    tables.append(ReportTable("What the first stage found: no reranking of K can find more", header, tuple(ceilings)))
    for system in scores.systems[1:]:
        lost = [(t.title, *(f"{t.systems[system].lost[step.value]:,}" for step in LostBy)) for t in scores.tasks]
        tables.append(
            ReportTable(f"Who lost the queries: {system}", ("", *(step.value for step in LostBy)), tuple(lost))
        )
    return tables


def _print(scores: BenchmarkScore, configuration: Mapping[str, Any], written: Sequence[Path]) -> None:
    totals = [
        (system, *(f"{sum(t.systems[system].lost[step.value] for t in scores.tasks):,}" for step in LostBy))
        for system in scores.systems[1:]
    ]
    lost = ReportTable(
        "Queries lost, by the step that lost them", ("", *(step.value for step in LostBy)), tuple(totals)
    )
    for table in (_tables(scores)[0], *([lost] if totals else [])):
        print(f"{table.caption}\n")
        print_table(table.header, table.rows, indent="  ")
        print()
    print_wrapped(
        f"pool {configuration['pool']}, instruction seed {configuration['instruction_seed']}, fusion none, "
        f"positives of other data sets {'left out' if configuration['same_dataset'] else 'as in the qrels'}"
    )
    for line in (*_notes(scores, configuration), *_refusal(scores)):
        print_wrapped(printable(line), indent=4)
    for path in written:
        print(f"wrote {path}")


def _write_report(
    path: Path,
    setup: Setup,
    runs: Sequence[TaskRun],
    scores: BenchmarkScore,
    configuration: Mapping[str, Any],
    shown: int,
) -> None:
    from retrv_r1_retriever.report import write_report

    first, *rest = _tables(scores)
    entries = [entry for one in runs for mode in one.rerankings for entry in _lost(one, mode, shown)]
    intro = (
        f"{setup.pool.capitalize()} pools. Below the tables: queries that a reranking lost, {shown} per task and step."
    )
    remarks = [*_notes(scores, configuration), *_refusal(scores)]
    tables = [replace(first, note="\n".join(remarks) or None), *rest, configuration_table(configuration)]
    write_report(path, entries, title="M-BEIR", intro=intro, tables=tables, images=LocalImages(setup.root))


def _lost(one: TaskRun, mode: str, shown: int) -> list[ReportEntry]:
    """The first queries that each step but the first lost: where a right answer was among the candidates."""
    entries: list[ReportEntry] = []
    for step in (step for step in LostBy if step is not LostBy.FIRST_STAGE):
        judged = ((record, one.data.queries.get(record.query)) for record in one.records(mode))
        graded = ((record, one.data.graded(query)) for record, query in judged if query)
        lost = ((r, q) for r, q in graded if lost_by(r, q.grades, one.task.headline) is step)
        for record, query in islice(lost, shown):
            results = _results(one, record, frozenset(query.grades))
            entries.append(ReportEntry(results, f"{one.task.title}, {mode}: lost: {step}", frozenset(query.grades)))
    return entries


def _results(one: TaskRun, record: Record, right: frozenset[str]) -> RankedResults:
    """The list's head and its right answers, with their contents from the pool."""
    query = one.data.queries.get(record.query)
    assert query is not None
    before = {id: place for place, id in enumerate(record.before, 1)}
    rows = []
    for rank, id in enumerate(record.after, 1):
        if rank > ROWS_SHOWN and id not in right:
            continue
        document = one.data.pool.get(id)
        assert isinstance(document, Document)  # the list was made from this pool
        candidate = Candidate(document, None, before[id])
        rows.append(RankedResult(candidate, rank, None if record.status == "fallback" else 1 - (rank - 1) / len(before),
                                 id == record.selected))  # fmt: skip
    return RankedResults(query.query, tuple(rows), record.status)
