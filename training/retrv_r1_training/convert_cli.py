"""`retrv-r1-train convert`: a table and its pictures into M-BEIR's files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrv_r1_retriever._arguments import at_least_one
from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.evaluation.offsets import MAX_BAD_SHARE
from retrv_r1_training.convert import (
    Table,
    convert_candidates,
    convert_queries,
    parse_instructions,
    write_instructions,
)
from retrv_r1_training.convert_output import Report, Target
from retrv_r1_training.pictures import Pictures
from retrv_r1_training.sources import FORMATS


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert", help="tables (Parquet, CSV, JSONL) to M-BEIR files"
    )
    parser.set_defaults(main=main)
    parser.add_argument("source", help="a .parquet, .csv, .tsv or .jsonl file, or an fsspec URL of one")
    parser.add_argument("--out", type=Path, required=True, help="the data folder; several conversions may share it")
    parser.add_argument("--rows", choices=("candidates", "queries"), required=True, help="what a row is")
    parser.add_argument("--map", action="append", default=[], metavar="FIELD=COLUMN", help=_MAP_HELP)
    parser.add_argument("--name", required=True, help="of the data set, for file names")
    parser.add_argument("--dataset-id", type=int, default=100, metavar="N", help="ids become N:<id> (default 100)")
    parser.add_argument("--split", help="queries: train, val, test, ...")
    parser.add_argument("--images", metavar="WHERE", help="folder, .tar or fsspec URL that picture names start from")
    parser.add_argument("--keep", action="append", default=[], metavar="COLUMN", help="candidates: into src_content")
    parser.add_argument("--separator", help="between several ids in one cell")
    parser.add_argument("--judgements", metavar="SOURCE", help="queries: a table of (query, candidate, grade)")
    parser.add_argument("--judgement-map", action="append", default=[], metavar="FIELD=COLUMN")
    parser.add_argument("--instruction", action="append", default=[], metavar='"text -> image: words"')
    parser.add_argument("--format", choices=FORMATS, help="of SOURCE, where its suffix does not say it")
    parser.add_argument("--max-bad-share", type=float, default=MAX_BAD_SHARE, metavar="SHARE")
    parser.add_argument("--workers", type=at_least_one, default=8, help="threads that read pictures")
    parser.add_argument("--overwrite", action="store_true")


_MAP_HELP = (
    "repeatable. Candidates: id, text, image. Queries: id, text, image, instruction, positives, grades, negatives. "
    "For text also a template: 'text={title}. {brand}'"
)


def main(args: argparse.Namespace) -> int:
    table = Table(args.source, _mapping("--map", args.map), args.format, args.separator)
    target = Target(args.out, args.name, args.dataset_id, args.overwrite, args.max_bad_share)
    pictures = Pictures(args.images, args.out, args.name) if "image" in table.mapping else None
    if args.rows == "candidates":
        _refuse(args, ("split", "judgements", "instruction"))
        report = convert_candidates(table, target, pictures, args.keep, args.workers)
    else:
        _refuse(args, ("keep",))
        if args.split is None:
            raise OptionsError(explain("--split", expected="train, val, test, ...", got="none", fix="Name it."))
        instructions = parse_instructions(args.instruction)
        judgements = None
        if args.judgements is not None:
            judgements = Table(args.judgements, _mapping("--judgement-map", args.judgement_map))
        report = convert_queries(table, target, args.split, pictures, judgements, args.workers)
        if instructions:
            report.files.append(write_instructions(target, instructions))
    sys.stdout.write(describe(report))
    return 0


def describe(report: Report) -> str:
    rows, judgements = report.skipped, report.judgements
    lines = [f"{report.written:,} rows written, {rows.count:,} of {rows.total:,} input rows skipped"]
    if judgements is not None:
        lines.append(f"{judgements.count:,} of {judgements.total:,} judgements skipped")
    lines += [f"  {count:,} {note}" for note, count in report.notes.items()]
    lines += [f"  skipped {example}" for example in (*rows.examples, *(judgements.examples if judgements else ()))]
    lines += [f"wrote {path}" for path in report.files]
    return "\n".join(lines) + "\n"


def _mapping(option: str, pairs: Sequence[str]) -> dict[str, str]:
    mapping = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not name or not column or name in mapping:
            fix = "Give every field once."
            raise OptionsError(explain(option, expected="FIELD=COLUMN", got=repr(pair), fix=fix))
        mapping[name] = column
    return mapping


def _refuse(args: argparse.Namespace, names: Sequence[str]) -> None:
    for name in names:
        if getattr(args, name):
            fix = "Leave it out."
            raise OptionsError(explain(f"--{name}", expected=f"none with --rows {args.rows}", got="one", fix=fix))
