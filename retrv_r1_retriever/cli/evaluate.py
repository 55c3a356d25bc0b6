"""`retrv-r1 eval`: what reranking does for your own queries, against the first stage it was given."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cli.search import (
    add_options,
    check_output,
    load_config,
    opened_retriever,
    options_of,
    read_picture,
)
from retrv_r1_retriever.cli.terminal import Progress, print_json, print_table, print_wrapped, printable
from retrv_r1_retriever.config import Config
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.comparison import Comparison, Judged, Scores, compare
from retrv_r1_retriever.evaluation.runs import run_of, write_run
from retrv_r1_retriever.images import is_data_uri
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.retriever import RetrvR1Retriever
from retrv_r1_retriever.store import VectorFirstStage
from retrv_r1_retriever.types import ImageInput, Query, RankedResults

MISSING_SHOWN = 10


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        help='JSONL of {"text", "image", "instruction", "positives": [ids]} (M-BEIR query files are read too)',
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="candidates from the first stage")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N queries")
    parser.add_argument(
        "--run", type=Path, metavar="FILE", dest="run_file", help="write the reranked lists as a TREC run"
    )
    add_options(parser)
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    config = load_config(args)
    if args.top_n is not None:
        raise InputError(explain("--top-n", expected="no cut in eval", got=args.top_n, fix="Use --top-k."))
    options = options_of(args, config.rerank).with_options(top_n=None)
    check_output(args.report, args.run_file)
    judged = read_queries(args.file, config)[: args.limit]
    with opened_retriever(config) as retriever:
        missing = _missing(retriever, judged)
        results = retrieve_all(retriever, judged, options, Progress())
    comparison = compare([one.positives for one in judged], results)
    if args.run_file:
        write_run(args.run_file, run_of(results), f"retrv-r1-{options.ranking}-{options.think}")
    if args.report:
        _write_report(args.report, judged, results, comparison, options, retriever)
    if args.json:
        print_json(
            comparison_json(comparison, options) | {"missing_positives": missing, "notes": shared_notes(results)}
        )
    else:
        print_comparison(comparison, options)
        if missing:
            print_wrapped(_missing_words(missing))
        for note in shared_notes(results):
            print_wrapped(f"note: {note}")
        for path in filter(None, (args.run_file, args.report)):
            print(f"wrote {path}")
    return 0


def retrieve_all(
    retriever: RetrvR1Retriever, judged: Sequence[Judged], options: RerankOptions, progress: Progress, batch: int = 16
) -> list[RankedResults]:
    results: list[RankedResults] = []
    for start in range(0, len(judged), batch):
        queries = [one.query for one in judged[start : start + batch]]
        results += retriever.retrieve_batch(queries, options=options, concurrency=batch)
        progress("searching", len(results), len(judged))
    return results


def _missing(retriever: RetrvR1Retriever, judged: Sequence[Judged], batch: int = 500) -> list[str]:
    """Positives that are not in the store, sorted: no search can find them."""
    assert isinstance(retriever.first_stage, VectorFirstStage)  # what a config makes
    asked = sorted(set().union(*(one.positives for one in judged)))
    parts = (asked[start : start + batch] for start in range(0, len(asked), batch))
    found = {c.document.id for ids in parts for c in run(retriever.first_stage.store.get(ids, with_memory=False))}
    return [id for id in asked if id not in found]


def _missing_words(missing: Sequence[str]) -> str:
    more = f" and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
    names = printable(", ".join(missing[:MISSING_SHOWN]))
    return f"right answers that are not in the store, so that no search can find them: {len(missing)} ({names}{more})"


def shared_notes(results: Sequence[RankedResults]) -> list[str]:
    """What the traces of all queries note."""
    notes = [result.trace.notes if result.trace else () for result in results]
    return [note for note in notes[0] if all(note in others for others in notes)]


def verdict(comparison: Comparison) -> str:
    """What reranking did to the first places, in a sentence or two."""
    before, after = comparison.first_stage.recall_at_1, comparison.reranked.recall_at_1
    moved = f"first place: {comparison.rescued} rescued by reranking, {comparison.lost} lost."
    if after >= before:
        return moved
    return f"{moved} Reranking LOWERED R@1, from {before:.3f} to {after:.3f}: here the first stage alone is better."


def print_comparison(comparison: Comparison, options: RerankOptions) -> None:
    print_table(("", "R@1", "R@5", "MRR"), _rows(comparison))
    statuses = ", ".join(f"{count} {name}" for name, count in sorted(comparison.statuses.items()))
    print(
        f"{comparison.queries} queries, K = {options.top_k}, ranking {options.ranking}, think {options.think}; "
        f"right answer among the K: {comparison.ceiling:.3f}; "
        f"opened per query: {comparison.opened:.2f}; {statuses}"
    )
    print_wrapped(verdict(comparison))


def comparison_json(comparison: Comparison, options: RerankOptions) -> dict[str, Any]:
    def scores(s: Scores) -> dict[str, float]:
        return {"recall@1": s.recall_at_1, "recall@5": s.recall_at_5, "mrr": s.mrr}

    return {
        "queries": comparison.queries,
        "top_k": options.top_k,
        "ranking": options.ranking,
        "think": options.think,
        "first_stage": scores(comparison.first_stage),
        "reranked": scores(comparison.reranked),
        "recall@k": comparison.ceiling,
        "opened_per_query": comparison.opened,
        "statuses": comparison.statuses,
        "rescued": comparison.rescued,
        "lost": comparison.lost,
    }


def _rows(comparison: Comparison) -> list[tuple[str, ...]]:
    named = (("first stage", comparison.first_stage), ("reranked", comparison.reranked))
    return [(name, f"{s.recall_at_1:.3f}", f"{s.recall_at_5:.3f}", f"{s.mrr:.3f}") for name, s in named]


def _write_report(
    path: Path,
    judged: Sequence[Judged],
    results: Sequence[RankedResults],
    comparison: Comparison,
    options: RerankOptions,
    retriever: RetrvR1Retriever,
) -> None:
    from retrv_r1_retriever.report import ReportEntry, ReportTable, write_report

    table = ReportTable(
        f"{comparison.queries} queries, K = {options.top_k}, ranking {options.ranking}, think {options.think}",
        ("", "R@1", "R@5", "MRR"),
        tuple(_rows(comparison)),
        f"Right answer among the K: {comparison.ceiling:.3f}. Opened per query: {comparison.opened:.2f}. {verdict(comparison)}",
    )
    entries = [ReportEntry(ranked, positives=one.positives) for one, ranked in zip(judged, results, strict=True)]
    write_report(path, entries, title="Evaluation", tables=[table], images=retriever.images)


# -- queries -----------------------------------------------------------------------------------------------------------


def read_queries(path: Path, config: Config) -> list[Judged]:
    """Raises `InputError` naming file and line: a measurement over the readable part would be another measurement."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 inside a string
    except (OSError, ValueError) as error:
        raise InputError(explain(str(path), expected="a JSONL of queries", got=error, fix="Fix the path.")) from None
    judged = list(_judged(path, lines, config))
    if not judged:
        raise InputError(explain(str(path), expected="at least one query", got="none", fix="Write one per line."))
    return judged


def _judged(path: Path, lines: Sequence[str], config: Config) -> Iterator[Judged]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
            yield _judged_row(row, where, path.parent, config)
        except (ValueError, AttributeError, TypeError) as error:  # our InputError is a ValueError
            raise InputError(f"{where}: {error}") from None


def _judged_row(row: Any, where: str, folder: Path, config: Config) -> Judged:
    """A line of ours, or of an M-BEIR query file."""
    if not isinstance(row, dict):
        raise InputError(explain("row", expected="a JSON object", got=type(row).__name__, fix="Write {...}."))
    positives = row.get("positives", row.get("pos_cand_list"))
    if not isinstance(positives, list) or not positives:
        raise InputError(explain("positives", expected="a list of document ids", got=repr(positives), fix="Add it."))
    image = row.get("image", row.get("query_img_path"))
    query = Query.of(
        row.get("text", row.get("query_txt")),
        None if image is None else _picture(image, folder, config),
        row.get("instruction"),
        str(row.get("id", row.get("qid", where))),
    )
    return Judged(query, frozenset(map(str, positives)))


def _picture(image: str, folder: Path, config: Config) -> ImageInput:
    """A data URI, a file below the images' root, or one beside the queries."""
    if is_data_uri(image) or (config.path(config.images.root) / image).is_file():
        return image
    beside = (folder / image).resolve()
    if not beside.is_relative_to(
        folder.resolve()
    ):  # the file may be somebody else's: it names no picture just anywhere
        expected = "a file below [images] root or beside the queries"
        raise InputError(explain(f"image {image}", expected=expected, got=f"{beside}, outside both", fix="Move it."))
    return read_picture(beside)
