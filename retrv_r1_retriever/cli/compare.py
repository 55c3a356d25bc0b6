"""`retrv-r1 eval compare`: two runs over the same queries, and whether their difference is more than chance."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retrv_r1_retriever._arguments import at_least_one, whole
from retrv_r1_retriever.cli.terminal import print_json, print_table, print_wrapped, printable
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.metrics import Qrels, Run, values
from retrv_r1_retriever.evaluation.runs import read_qrels, read_run, run_tag
from retrv_r1_retriever.evaluation.significance import SAMPLES, PairedTest, paired_test

METRICS = ("recall@1", "recall@5", "mrr", "ndcg@10")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs=2, type=Path, metavar="RUN", help="TREC runs, or BEIR's JSON; the second is tested"
    )
    parser.add_argument("--qrels", type=Path, required=True, metavar="FILE", help="TREC qrels, or BEIR's TSV")
    parser.add_argument(
        "--metric", action="append", metavar="NAME", help=f"recall@K, mrr, ndcg@K, map@K; default: {' '.join(METRICS)}"
    )
    parser.add_argument(
        "--samples", type=at_least_one, default=SAMPLES, metavar="N", help="of bootstrap and randomisation"
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    first, second = map(read_run, args.runs)
    judged = read_qrels(args.qrels)
    qrels, unanswerable = _answerable(judged)
    tags = {str(path): run_tag(path) for path in args.runs}
    unjudged = {str(path): len(run.keys() - judged) for path, run in zip(args.runs, (first, second), strict=True)}
    missing = {str(path): _missing(run, qrels, path) for path, run in zip(args.runs, (first, second), strict=True)}
    pools = list(_pools((first, second), qrels, args.runs, tags))
    rows: dict[str, dict[str, Any]] = {}
    for name in args.metric or METRICS:
        a, b = (list(values(run, qrels, name).values()) for run in (first, second))
        test = paired_test(a, b, samples=args.samples, seed=args.seed)
        rows[name] = {"first": sum(a) / len(a), "second": sum(b) / len(b), "test": test}
    if args.json:
        print_json(
            {"runs": args.runs, "qrels": args.qrels, "queries": len(qrels), "samples": args.samples, "seed": args.seed,
             "tags": tags, "missing_queries": missing, "unjudged_queries": unjudged, "without_right_answer": unanswerable,
             "different_pools": pools,
             "metrics": {name: row | {"test": asdict(row["test"])} for name, row in rows.items()}}
        )  # fmt: skip
        return 0
    for place, path in zip(("first", "second"), args.runs, strict=True):
        print_wrapped(printable(f"{place}: {path}, tag {tags[str(path)] or 'none'}"))
    print()
    header = ("", "first", "second", "difference", "95 % interval", "p", "better", "worse")
    print_table(
        header, [(name, f"{r['first']:.4f}", f"{r['second']:.4f}", *_cells(r["test"])) for name, r in rows.items()]
    )
    print_wrapped(
        f"{len(qrels)} queries; interval: paired bootstrap; p: two-sided randomisation test; {args.samples:,} samples each, "
        f"seed {args.seed}. A query that a run lacks counts as 0."
    )
    for path, count in missing.items():
        if count:
            print_wrapped(printable(f"{path} lacks {count} of the {len(qrels)} queries"))
    for path, count in unjudged.items():
        if count:
            print_wrapped(printable(f"{path} has {count} queries that are not in the qrels; they are left out"))
    for sentence in pools:
        print_wrapped(printable(sentence))
    if unanswerable:
        print_wrapped(f"{unanswerable} queries of the qrels have no right answer and are left out")
    return 0


def _pools(runs: Sequence[Run], qrels: Qrels, paths: Sequence[Path], tags: Mapping[str, str]) -> Iterator[str]:
    """What says that the runs are not of one pool, or not of the one that was judged: their difference is then not one of ranking."""
    named = {tag.split(".")[1] for tag in tags.values() if tag.startswith("mbeir.")}
    found = [{document for query in qrels for document in run.get(query, ())} for run in runs]
    if len(named) > 1:
        yield f"the runs are over different pools ({', '.join(sorted(named))}): their difference is not one of ranking"
    elif found[0].isdisjoint(found[1]):
        yield (
            "the runs share no document, so they seem to be over different pools: their difference is then not one of ranking"
        )
    judged = {document for grades in qrels.values() for document in grades}
    for path, documents in zip(paths, found, strict=True):
        if documents.isdisjoint(judged):
            yield f"no document of {path} is in the qrels, so all its values are 0: they seem to be of different pools"


def _cells(test: PairedTest) -> tuple[str, ...]:
    d = test.difference
    return f"{d.mean:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}", f"{test.p:.4f}", str(test.better), str(test.worse)


def _answerable(qrels: Mapping[str, Mapping[str, int]]) -> tuple[Qrels, int]:
    """Without the queries that no document answers, and how many these were."""
    kept = {query: grades for query, grades in qrels.items() if any(grade > 0 for grade in grades.values())}
    return kept, len(qrels) - len(kept)


def _missing(run: Run, qrels: Qrels, path: Path) -> int:
    missing = sum(query not in run for query in qrels)
    if missing == len(qrels):
        fix = "Name the run and the qrels of one data set."
        raise InputError(explain(str(path), expected="a run of the qrels' queries", got="none of them", fix=fix))
    return missing
