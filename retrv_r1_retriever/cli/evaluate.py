"""`retrv-r1 eval`: what reranking does for your own queries, against the first stage it was given."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

from retrv_r1_retriever._arguments import at_least_one
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.outcome import DEPTH, Gaps, Outcome, outcome_json, print_outcome, write_page
from retrv_r1_retriever.cli.queries import Asked, read_queries
from retrv_r1_retriever.cli.search import (
    add_filter,
    add_options,
    check_output,
    filter_of,
    load_config,
    no_match,
    opened_retriever,
    options_of,
)
from retrv_r1_retriever.cli.terminal import Progress, print_json
from retrv_r1_retriever.config import Config
from retrv_r1_retriever.errors import InputError, OptionsError, RetrvR1Error, explain
from retrv_r1_retriever.evaluation.first_stage import RunFirstStage
from retrv_r1_retriever.evaluation.journal import digest_of
from retrv_r1_retriever.evaluation.measure import Measured, label, measure, tag
from retrv_r1_retriever.evaluation.modes import check_modes
from retrv_r1_retriever.evaluation.records import Price
from retrv_r1_retriever.evaluation.runs import check_field, read_scored_run, write_run
from retrv_r1_retriever.filters import matches
from retrv_r1_retriever.options import Ranking, RerankOptions, Think
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.store import Filter, FirstStage, VectorFirstStage


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
    check_modes(modes)
    price = Price(*args.price) if args.price else None
    only = filter_of(args.filter)
    if only and args.from_run:
        fix = "Filter the run, or leave --from-run out."
        raise OptionsError(explain("--filter", expected="a search", got="--from-run, which searches nothing", fix=fix))
    inputs = (args.file, args.qrels, args.from_run, Path(args.config))
    check_output(args.report, args.traces, *_run_files(args, modes).values(), inputs=inputs)
    files = _digests(args)  # now: they may change while the model reads
    asked, unjudged, unasked = read_queries(args.file, config, qrels=args.qrels, limit=args.limit)
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
        settings = _settings(args, modes, retriever, config, files)
        missing, outside = _unfindable(retriever, asked, only, config, _retrieved(measured))
        empty = no_match(args.filter, retriever.first_stage) if only and not _retrieved(measured) else None
        gaps = Gaps(missing, outside, empty, unjudged, unasked, _unlisted(stage, asked), measured.unreadable)
    outcome = Outcome.of(measured, qrels, price)
    notes = [*outcome.sentences(), *gaps.sentences(args, len(asked))]
    page = partial(write_page, outcome, notes, settings, retriever.images)
    written: list[Path] = []
    failed: Exception | None = None  # what took hours must not be lost to a file that cannot be written
    try:
        for path in _write(args, modes, measured, settings, page):
            written.append(path)
    except (RetrvR1Error, OSError) as error:
        failed = error
    if args.json:
        broken = {"error": {"type": type(failed).__name__, "message": str(failed)}} if failed else {}
        print_json(outcome_json(outcome, settings) | asdict(gaps) | broken)
        return 2 if failed else 0
    print_outcome(outcome, notes, settings)
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


def _retrieved(measured: Measured) -> set[str]:
    """Documents that any query got: one list was fetched for all modes."""
    return {id for record in next(iter(measured.records.values())) for id in record.retrieved}


def _unfindable(
    retriever: RetrvR1Retriever,
    asked: Sequence[Asked],
    only: Filter | None,
    config: Config,
    retrieved: Set[str],
    batch: int = 500,
) -> tuple[list[str], list[str]]:
    """Positives that no search can find, sorted: those that are not in the store, and those outside the filter."""
    assert isinstance(retriever.first_stage, VectorFirstStage)  # what a config makes
    wanted = sorted({id for one in asked for id in one.grades})
    parts = (wanted[start : start + batch] for start in range(0, len(wanted), batch))
    inside = {}
    fields = [condition.field for condition in only.must] if only else []
    content = (config.store.id, config.store.text, config.store.image)
    known = not any(
        field in content or "[" in field for field in fields
    )  # documents have these elsewhere than in metadata
    for ids in parts:
        for document in (c.document for c in run(retriever.first_stage.store.get(ids, with_memory=False))):
            found = document.id in retrieved or not known
            inside[document.id] = found or only is None or matches(only, document.metadata)
    return [id for id in wanted if id not in inside], [id for id, within in inside.items() if not within]


def _unlisted(stage: FirstStage, asked: Sequence[Asked]) -> int:
    """Queries that a run given as the first stage does not have."""
    return sum(one.query.id not in stage.run for one in asked) if isinstance(stage, RunFirstStage) else 0


def _digests(args: argparse.Namespace) -> dict[str, str]:
    """Of what the files say: another first stage under the same name makes other numbers."""
    named = {"queries": args.file, "qrels": args.qrels, "from_run": args.from_run}
    return {
        name: hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        for name, path in named.items()
        if path is not None and path.is_file()  # its reader names what is missing
    }


def _settings(
    args: argparse.Namespace,
    modes: Sequence[RerankOptions],
    retriever: RetrvR1Retriever,
    config: Config,
    files: Mapping[str, str],
) -> dict[str, Any]:
    """What the numbers depend on; `id` stands in every run file's tag."""
    versions = getattr(getattr(retriever.reranker, "engine", None), "versions", {})
    own = retriever.first_stage
    assert isinstance(own, VectorFirstStage)  # what a config makes
    store = config.store
    where = store.path if store.kind == "edge" else f"{store.collection} at {store.url}"
    values = {
        "queries": str(args.file),
        "qrels": args.qrels and str(args.qrels),
        "limit": args.limit,
        "first_stage": f"run {args.from_run}" if args.from_run else f"vectors ({store.kind})",
        "embedder": None if args.from_run else getattr(own.embedder, "digest", None),
        "pool": f"{run(own.store.count()):,} documents in {where}",
        "filter": args.filter,
        "fusion": "none",
        "concurrency": args.concurrency,
        "model": asdict(config.model),
        "modes": {label(options): asdict(options) for options in modes},
        "versions": dict(versions),
        "files": dict(files),
    }
    return {"id": digest_of(values), **values}


def _check_ids(asked: Sequence[Asked]) -> None:
    """Before the work: a run could not be written with them."""
    for one in asked:
        check_field("--run", "ids of queries", one.query.id or "")


def _run_files(args: argparse.Namespace, modes: Sequence[RerankOptions]) -> dict[RerankOptions, Path]:
    """Of each mode; with several, the mode is part of the name."""
    path: Path | None = args.run_file
    if path is None:
        return {}
    if len(modes) == 1:
        return {modes[0]: path}
    return {options: path.with_name(f"{path.stem}.{tag(options)}{path.suffix}") for options in modes}


def _write(
    args: argparse.Namespace,
    modes: Sequence[RerankOptions],
    measured: Measured,
    settings: Mapping[str, Any],
    write_page: Callable[[Path], object],
) -> Iterator[Path]:
    """The page, and one run per mode."""
    if args.report:
        write_page(args.report)
        yield args.report
    for options, own in _run_files(args, modes).items():
        write_run(
            own, {r.query: r.reranked for r in measured.records[label(options)]}, f"{tag(options)}.{settings['id']}"
        )
        yield own
