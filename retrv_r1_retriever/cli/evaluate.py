"""`retrv-r1 eval`: what reranking does for your own queries, against the first stage it was given."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.queries import Asked, read_queries
from retrv_r1_retriever.cli.search import (
    add_filter,
    add_options,
    check_output,
    filter_of,
    load_config,
    opened_retriever,
    options_of,
)
from retrv_r1_retriever.cli.terminal import Progress, at_least_one, print_json, print_table, print_wrapped, printable
from retrv_r1_retriever.errors import InputError, OptionsError, RetrvR1Error, explain
from retrv_r1_retriever.evaluation.first_stage import RunFirstStage
from retrv_r1_retriever.evaluation.measure import Measured, check_independent, label, measure, tag
from retrv_r1_retriever.evaluation.metrics import Qrels
from retrv_r1_retriever.evaluation.records import Effort, LostBy, Price, Record, Summary, effort, percentiles, summarise
from retrv_r1_retriever.evaluation.runs import is_field, read_scored_run, write_run
from retrv_r1_retriever.options import Ranking, RerankOptions, Think
from retrv_r1_retriever.report import ReportTable
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.store import FirstStage, VectorFirstStage

NAMED = 10  # of what is missing
METRICS = ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10")  # the last one is tested for significance
DEPTH = 10  # the deepest cut among them
LATENCY_NOTE = "p50 and p95 are seconds per query, first stage included"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        help='JSONL of {"id", "text", "image", "instruction", "positives": [ids]}, or CSV with these columns; '
        "M-BEIR's and BEIR's query files are read too. Without positives: where first stage and reranking disagree",
    )
    parser.add_argument("--qrels", type=Path, metavar="FILE", help="TREC or BEIR judgements in place of the positives")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="only the first N queries")
    parser.add_argument(
        "--from-run", type=Path, metavar="FILE", help="rerank this TREC or BEIR run; its documents must be in the store"
    )
    parser.add_argument(
        "--run", type=Path, metavar="FILE", dest="run_file", help="write the reranked lists as a TREC run per mode"
    )
    parser.add_argument(
        "--price", type=float, nargs=2, metavar=("IN", "OUT"), help="of a million tokens read, and written"
    )
    parser.add_argument("--shown", type=at_least_one, default=20, metavar="N", help="queries of a kind on the page")
    add_modes(parser)
    add_filter(parser)
    add_options(parser)
    parser.set_defaults(run=main)


def add_modes(parser: argparse.ArgumentParser) -> None:
    """`--top-k`, `--mode` and `--concurrency`, for every command that evaluates."""
    parser.add_argument(
        "--top-k", metavar="K[,K...]", help="candidates from the first stage; several: one after another"
    )
    parser.add_argument("--mode", action="append", metavar="THINK/RANKING", help="e.g. never/logits; repeatable")
    parser.add_argument(
        "--concurrency", type=at_least_one, default=1, metavar="N", help="queries at a time; 1 measures latency"
    )


def main(args: argparse.Namespace) -> int:
    config = load_config(args)
    modes = modes_of(args, config.rerank)
    check_independent(modes)
    price = Price(*args.price) if args.price else None
    only = filter_of(args.filter)
    if only and args.from_run:
        fix = "Filter the run, or leave --from-run out."
        raise OptionsError(explain("--filter", expected="a search", got="--from-run, which searches nothing", fix=fix))
    check_output(args.report, args.run_file)
    asked, unjudged = read_queries(args.file, config, qrels=args.qrels, limit=args.limit)
    if args.run_file:
        _check_ids(asked)
    qrels = {one.query.id or "": one.grades for one in asked} if asked[0].grades else None
    with opened_retriever(config) as retriever:
        stage = _stage(args, retriever, asked)
        queries = [one.query for one in asked]
        measured = run(
            measure(
                stage, retriever.reranker, retriever.images, queries, modes, depth=DEPTH, filter=only,
                qrels=qrels, concurrency=args.concurrency, shown=args.shown, progress=Progress(),
            )
        )  # fmt: skip
        gaps = Gaps(_missing(retriever, asked), unjudged, _unlisted(stage, asked), measured.unreadable)
    outcome = Outcome.of(measured, qrels, price)
    settings = _settings(args, modes, retriever, config.store.kind)
    written: list[Path] = []
    failed: Exception | None = None  # what took hours must not be lost to a file that cannot be written
    try:
        for path in _write(args, modes, measured, outcome, settings, retriever):
            written.append(path)
    except (RetrvR1Error, OSError) as error:
        failed = error
    if args.json:
        broken = {"error": {"type": type(failed).__name__, "message": str(failed)}} if failed else {}
        print_json(_json(measured, outcome, settings) | asdict(gaps) | broken)
        return 2 if failed else 0
    _print(measured, outcome, args)
    for line in gaps.sentences(args, len(asked)):
        print_wrapped(printable(line))
    for path in written:
        print(f"wrote {path}")
    if failed:
        raise failed
    return 0


def modes_of(args: argparse.Namespace, options: RerankOptions) -> list[RerankOptions]:
    """Every K in every mode; without `--mode` the config's own. Raises `OptionsError`."""
    if args.top_n is not None:
        raise InputError(explain("--top-n", expected="no cut in eval", got=args.top_n, fix="Use --top-k."))
    if args.concurrency < 1:
        raise OptionsError(explain("--concurrency", expected="1 or more", got=args.concurrency, fix="Raise it."))
    sizes = str(args.top_k or options.top_k).split(",")
    if not all(size.strip().isdecimal() for size in sizes):
        raise OptionsError(explain("--top-k", expected="numbers, e.g. 10,50", got=repr(args.top_k), fix="Fix it."))
    args.top_k = None  # one number is all that `options_of` knows
    options = options_of(args, options).with_options(top_n=None)
    named = [_mode(mode) for mode in args.mode or ()] or [(options.think, options.ranking)]
    every = (
        options.with_options(top_k=int(size), think=think, ranking=ranking)
        for size in sizes
        for think, ranking in named
    )
    return list(dict.fromkeys(every))


def _mode(text: str) -> tuple[str, str]:
    think, _, ranking = text.partition("/")
    if think not in get_args(Think) or ranking not in get_args(Ranking):
        expected = f"THINK/RANKING of {get_args(Think)} and {get_args(Ranking)}"
        raise OptionsError(explain("--mode", expected=expected, got=repr(text), fix="E.g. --mode never/logits."))
    return think, ranking


def _stage(args: argparse.Namespace, retriever: RetrvR1Retriever, asked: Sequence[Asked]) -> FirstStage:
    if args.from_run is None:
        return retriever.first_stage
    found, own = read_scored_run(args.from_run), retriever.first_stage
    assert isinstance(own, VectorFirstStage)  # what a config makes
    if not any(one.query.id in found for one in asked):
        got = f"none of the {len(asked)} (the run's first query: {next(iter(found), 'none')!r})"
        fix = "Name the run of these queries."
        raise InputError(explain(str(args.from_run), expected="the ids of the queries", got=got, fix=fix))
    return RunFirstStage(own.store, found, own.with_memory)


def _missing(retriever: RetrvR1Retriever, asked: Sequence[Asked], batch: int = 500) -> list[str]:
    """Positives that are not in the store, sorted: no search can find them."""
    assert isinstance(retriever.first_stage, VectorFirstStage)  # what a config makes
    wanted = sorted({id for one in asked for id in one.grades})
    parts = (wanted[start : start + batch] for start in range(0, len(wanted), batch))
    found = {c.document.id for ids in parts for c in run(retriever.first_stage.store.get(ids, with_memory=False))}
    return [id for id in wanted if id not in found]


def _unlisted(stage: FirstStage, asked: Sequence[Asked]) -> int:
    """Queries that a run given as the first stage does not have."""
    return sum(one.query.id not in stage.run for one in asked) if isinstance(stage, RunFirstStage) else 0


def _settings(
    args: argparse.Namespace, modes: Sequence[RerankOptions], retriever: RetrvR1Retriever, store: str
) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = getattr(getattr(retriever.reranker, "engine", None), "versions", {})
    stage = f"run {args.from_run}" if args.from_run else f"vectors ({store})"
    return {
        "queries": str(args.file),
        "first_stage": stage,
        "filter": args.filter,
        "fusion": "none",
        "concurrency": args.concurrency,
        "modes": {label(options): asdict(options) for options in modes},
        "versions": dict(versions),
    }


def _check_ids(asked: Sequence[Asked]) -> None:
    """Before the work: a run could not be written with them."""
    for id in (one.query.id or "" for one in asked):
        if not is_field(id):
            fix = "Columns of a TREC file are split there. Rename it; a row without an id is named after file and line."
            raise InputError(explain("--run", expected="ids of queries without spaces", got=repr(id), fix=fix))


def _write(
    args: argparse.Namespace,
    modes: Sequence[RerankOptions],
    measured: Measured,
    outcome: Outcome,
    settings: Mapping[str, Any],
    retriever: RetrvR1Retriever,
) -> Iterator[Path]:
    """The page, and one run per mode; with several, the mode is part of the name."""
    if args.report:
        _write_report(args.report, measured, outcome, settings, retriever)
        yield args.report
    for options in modes if args.run_file else ():
        path: Path = args.run_file
        own = path if len(modes) == 1 else path.with_name(f"{path.stem}.{tag(options)}{path.suffix}")
        write_run(own, {r.query: r.reranked for r in measured.records[label(options)]}, tag(options))
        yield own


# -- what is shown -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gaps:
    """What the figures leave out, or count as not found. unreadable_queries: id -> why"""

    missing_positives: Sequence[str]
    unjudged_queries: int
    queries_not_in_run: int
    unreadable_queries: Mapping[str, str]

    def sentences(self, args: argparse.Namespace, total: int) -> Iterator[str]:
        """Nothing where nothing is amiss."""
        if missing := self.missing_positives:
            yield f"right answers that are not in the store, so that no search can find them: {_counted(missing, ', ')}"
        if self.unjudged_queries:
            yield f"queries without a right answer in {args.qrels}, left out: {self.unjudged_queries}"
        if self.queries_not_in_run:
            lacking = f"{self.queries_not_in_run} of {total}"
            yield f"queries that {args.from_run} does not have: {lacking}; they count as not found"
        if unreadable := [f"{id}: {why}" for id, why in self.unreadable_queries.items()]:
            yield f"queries whose picture cannot be read, left out: {_counted(unreadable, ' ')}"


def _counted(items: Sequence[str], between: str) -> str:
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return f"{len(items)} ({between.join(items[:NAMED])}{more})"


@dataclass(frozen=True, slots=True)
class Outcome:
    """By mode; no summaries without right answers."""

    summaries: Mapping[str, Summary]
    efforts: Mapping[str, Effort]
    words: Mapping[str, str]

    @classmethod
    def of(cls, measured: Measured, qrels: Qrels | None, price: Price | None) -> Outcome:
        judged = {id: grades for id, grades in (qrels or {}).items() if id not in measured.unreadable}
        summaries = {name: summarise(records, judged, METRICS) for name, records in measured.records.items() if qrels}
        words = {
            name: verdict(summaries[name]) if qrels else _disagreement(records)
            for name, records in measured.records.items()
        }
        return cls(summaries, {name: effort(records, price) for name, records in measured.records.items()}, words)


def _print(measured: Measured, outcome: Outcome, args: argparse.Namespace) -> None:
    for table in _tables(measured, outcome):
        print(f"{table.caption}\n")
        print_table(table.header, table.rows, indent="  ")
        print()
    print_wrapped(f"{LATENCY_NOTE}, {args.concurrency} at a time.")
    for line in _sentences(measured, outcome):
        print_wrapped(line)


def _sentences(measured: Measured, outcome: Outcome) -> Iterator[str]:
    """Of each mode: what it changed, how many queries were reranked, and what all its traces note."""
    for name, words in outcome.words.items():
        took, total = outcome.efforts[name], len(measured.records[name])
        yield f"{name}: {words} {', '.join(f'{count} {status}' for status, count in took.statuses.items())}."
        if took.counted < total:
            yield f"{name}: opened and tokens are over {took.counted} of {total} queries: of the others nobody knows them."
        yield from (f"note: {note}" for note in measured.notes[name])


def _tables(measured: Measured, outcome: Outcome) -> list[ReportTable]:
    """Quality beside effort; with right answers also who lost the others."""
    header = ("", *(map(_short, METRICS) if outcome.summaries else ()), "opened", "p50", "p95", "tokens in", "out")
    rows = []
    if outcome.summaries:  # one list was fetched for all modes
        found = next(iter(outcome.summaries.values())).first_stage
        rows.append(("first stage", *_numbers(found.values()), "", *_numbers(percentiles(measured.seconds)), "", ""))
    for name, one in outcome.efforts.items():
        quality = outcome.summaries[name].reranked.values() if outcome.summaries else ()
        tokens = _numbers((one.tokens_in, one.tokens_out), "{:,.0f}")
        rows.append((name, *_numbers(quality), *_numbers([one.opened], "{:.2f}"), *_numbers((one.p50, one.p95)), *tokens))
    if any(one.cost is not None for one in outcome.efforts.values()):
        costs = ["", *_numbers((one.cost for one in outcome.efforts.values()), "{:,.2f}")][-len(rows) :]
        header, rows = (*header, "per 1,000"), [(*row, cost) for row, cost in zip(rows, costs, strict=True)]
    queries = f"{len(measured.seconds)} queries" + ("" if outcome.summaries else " without right answers")
    tables = [ReportTable(queries, header, tuple(rows))]
    if outcome.summaries:
        lost = [
            (name, f"{s.ceiling:.3f}", f"{s.reranked['recall@1']:.3f}", *map(str, s.lost.values()))
            for name, s in outcome.summaries.items()
        ]
        lost_header = ("", "R@K found", "R@1 final", *(step.value for step in LostBy))
        tables.append(ReportTable("Who lost the queries whose first place is wrong", lost_header, tuple(lost)))
    return tables


def _numbers(values: Iterable[float | None], form: str = "{:.3f}") -> tuple[str, ...]:
    """With a dash for what was not measured."""
    return tuple("–" if value is None else form.format(value) for value in values)


def _short(metric: str) -> str:
    return metric.replace("recall", "R").replace("ndcg", "nDCG").replace("mrr", "MRR")


def verdict(summary: Summary) -> str:
    """What reranking did to the first places, and whether the gain is more than chance, in a few sentences."""
    before, after = summary.first_stage["recall@1"], summary.reranked["recall@1"]
    moved = f"first place: {summary.rescued} rescued by reranking, {summary.spoiled} lost."
    gain, metric = summary.gain.difference, list(summary.reranked)[-1]
    moved += f" {_short(metric)} {gain.mean:+.3f} (95 % interval {gain.low:+.3f} to {gain.high:+.3f}, p = {summary.gain.p:.4f})."
    if after >= before:
        return moved
    return f"{moved} Reranking LOWERED R@1, from {before:.3f} to {after:.3f}: here the first stage alone is better."


def _disagreement(records: Sequence[Record]) -> str:
    moved = sum(r.before[:1] != r.after[:1] for r in records)
    return f"another first place than the first stage for {moved} of {len(records)} queries."


def _json(measured: Measured, outcome: Outcome, settings: Mapping[str, Any]) -> dict[str, Any]:
    modes = {
        name: {
            **(asdict(outcome.summaries[name]) if outcome.summaries else {}),
            **asdict(one),
            "first_place_changed": sum(r.before[:1] != r.after[:1] for r in measured.records[name]),
            "notes": measured.notes[name],
        }
        for name, one in outcome.efforts.items()
    }
    return {"queries": len(measured.seconds), "configuration": settings, "modes": modes}


def _write_report(
    path: Path, measured: Measured, outcome: Outcome, settings: Mapping[str, Any], retriever: RetrvR1Retriever
) -> None:
    from retrv_r1_retriever.report import ReportEntry, write_report

    shown = sorted((one for kept in measured.shown.values() for one in kept), key=lambda one: (one.mode, one.kind))
    entries = [ReportEntry(s.results, kind=f"{s.mode}: {s.kind}", positives=s.positives) for s in shown]
    first, *rest = _tables(measured, outcome)
    intro = (
        f"First stage: {settings['first_stage']}; fusion: none; {LATENCY_NOTE}, {settings['concurrency']} at a time. "
        f"Below: {len(entries)} queries that reranking changed or left wrong, at most {measured.limit} of a kind."
    )
    tables = [replace(first, note="\n".join(_sentences(measured, outcome))), *rest, configuration_table(settings)]
    write_report(path, entries, title="Evaluation", intro=intro, tables=tables, images=retriever.images, tiles=False)


def configuration_table(settings: Mapping[str, Any]) -> ReportTable:
    """What the numbers on a page depend on, a line each."""
    rows = [(name.replace("_", " "), value) for name, value in settings.items() if not isinstance(value, Mapping)]
    nested = [(f"{name.replace('_', ' ')}: {key}", v) for name, value in settings.items() if isinstance(value, Mapping)
              for key, v in value.items()]  # fmt: skip
    return ReportTable("Configuration", ("", ""), tuple((name, _plain(value)) for name, value in (*rows, *nested)))


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_plain(inner)}" for name, inner in value.items())
    return (
        {True: "yes", False: "no", None: "none"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )
