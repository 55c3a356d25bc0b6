"""`retrv-r1 demo`: generate, index, search, explain; a second run takes seconds."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._arguments import at_least_one
from retrv_r1_retriever.cli.search import load_config
from retrv_r1_retriever.cli.show import describe, print_results
from retrv_r1_retriever.cli.terminal import Progress, print_json, print_table, print_wrapped, printable
from retrv_r1_retriever.demo import run as demo
from retrv_r1_retriever.evaluation.comparison import Comparison
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.plain import results_json
from retrv_r1_retriever.report import ReportEntry, ReportTable, write_report

HEADER = ("", "queries", "first stage R@1", "reranked R@1", "first stage R@5", "reranked R@5", "opened per query")
ROWS_SHOWN = 5
HONESTY = (
    "The rescued queries shown are picked: per kind, the first one of a fixed list that is wrong in the first stage, wrong "
    "without an inspection and right with it. The others are the first of their kind, whatever came out. The table is over the whole list. "
    f"Times are from question to list; up to {demo.BATCH} queries share each pass of the model, so each waits for the others."
)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", type=Path, default=Path("demo-data"), help="where everything goes (default: ./demo-data)"
    )
    parser.add_argument(
        "--queries", type=at_least_one, default=demo.PER_STRATUM, metavar="N", help="scanned per kind and stratum"
    )
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    started = time.monotonic()
    progress = Progress()
    base = load_config(args)
    engine, embedder = settings.open_engine(base), settings.open_embedder(base)
    demo.prepare(args.dir, progress)
    config = demo.demo_config(args.dir, base, engine.versions["checkpoint"])
    store = settings.open_store(config, settings.collection_spec(engine, embedder))
    try:
        indexed = demo.build_index(config, store, embedder, engine, progress)
        scan = demo.scan(args.dir, store, embedder, engine, progress, args.queries)
    finally:
        demo.close(store)
    page = _write_report(args.dir, scan)
    if args.json:
        print_json(_json(scan, page))
        return 0
    _print(scan)
    print(
        f"\n{indexed.indexed:,} documents indexed now, {indexed.skipped:,} were there already; {time.monotonic() - started:.1f} s in all"
    )
    print(f"report: {page}")
    return 0


def _print(scan: demo.Scan) -> None:
    for shown in scan.shown:
        query = shown.query.query
        why = "picked: rescued by an inspection" if shown.rescued else "the first of its kind"
        print(f"\n=== {shown.kind} ({why})")
        print(f"{query.instruction} {printable(describe(query.content))}")
        print_results(shown.results, limit=ROWS_SHOWN, positives=frozenset(shown.query.positives))
    print(f"\n=== all {scan.comparison.queries} scanned queries")
    print_table(HEADER, _rows(scan))
    print_wrapped(HONESTY)


def _rows(scan: demo.Scan) -> list[tuple[str, ...]]:
    named: list[tuple[str, Comparison]] = [*scan.strata.items(), ("all", scan.comparison)]
    return [
        (
            name,
            f"{c.queries}",
            f"{c.first_stage.recall_at_1:.3f}",
            f"{c.reranked.recall_at_1:.3f}",
            f"{c.first_stage.recall_at_5:.3f}",
            f"{c.reranked.recall_at_5:.3f}",
            f"{c.opened:.2f}",
        )
        for name, c in named
    ]


def _write_report(folder: Path, scan: demo.Scan) -> Path:
    entries = [
        ReportEntry(
            shown.results,
            kind=shown.kind,
            positives=frozenset(shown.query.positives),
            note=f"{'Picked' if shown.rescued else 'First of its kind'}; stratum {shown.query.stratum}; "
            f"the right card: {shown.query.target_text}",
        )
        for shown in scan.shown
    ]
    options = demo.OPTIONS
    table = ReportTable(
        f"All {scan.comparison.queries} scanned queries: K = {options.top_k}, ranking {options.ranking}, think {options.think}",
        HEADER,
        tuple(_rows(scan)),
        HONESTY,
    )
    return write_report(
        folder / "report.html",
        entries,
        title="Find, read, open, decide",
        intro="Generated product cards, three kinds of queries. The first stage finds 20 candidates by vectors; the model reads each one "
        "as two compressed tokens, opens those it is unsure of in full, and answers.",
        tables=[table],
        images=LocalImages(folder),
    )


def _json(scan: demo.Scan, page: Path) -> dict[str, object]:
    return {
        "report": str(page),
        "scanned": {row[0]: dict(zip(HEADER[1:], row[1:], strict=True)) for row in _rows(scan)},
        "shown": [
            {"kind": s.kind, "rescued": s.rescued, "positives": list(s.query.positives), **results_json(s.results)}
            for s in scan.shown
        ],
    }
