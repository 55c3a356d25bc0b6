"""`retrv-r1-train check`: a folder of M-BEIR files, read as training will read it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from retrv_r1_retriever.cli.terminal import one_line, terminal_width
from retrv_r1_retriever.evaluation.mbeir import Limits
from retrv_r1_retriever.evaluation.offsets import MAX_BAD_SHARE
from retrv_r1_training.check import CheckConfig, FileReport, check


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "check", help="validate a data folder, show counts and samples"
    )
    parser.set_defaults(main=main)
    parser.add_argument("data", type=Path, help="folder of M-BEIR files")
    parser.add_argument("--queries", action="append", default=[], metavar="FILE", help="only this one; below DATA")
    parser.add_argument("--pool", action="append", default=[], metavar="FILE", help="only this one; below DATA")
    parser.add_argument(
        "--pictures", type=_pictures, default=1000, metavar="N", help="pictures opened per file, or: all"
    )
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="rows shown per file")
    parser.add_argument("--max-bad-share", type=float, default=MAX_BAD_SHARE, metavar="SHARE")
    parser.add_argument("--index-dir", type=Path, help="where to keep line indexes (default: .retrv beside each file)")


def _pictures(text: str) -> int | None:
    """None = all."""
    try:
        return None if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number or all, got {text!r}") from None


def main(args: argparse.Namespace) -> int:
    """1 if something must be repaired."""
    limits = Limits(args.index_dir, args.max_bad_share)
    config = CheckConfig(tuple(args.queries), tuple(args.pool), args.pictures, args.samples, limits)
    problems = skipped = 0
    for report in check(args.data, config):
        sys.stdout.write(describe(report))
        problems += len(report.problems)
        skipped += report.skipped.count
    sys.stdout.write(f"{problems} problems, {skipped:,} rows skipped\n")
    return 1 if problems else 0


def describe(report: FileReport) -> str:
    skipped = f", {report.skipped.count:,} skipped" if report.skipped.count else ""
    lines = [f"{report.file}: {report.rows:,} rows{skipped}"]
    width = max((len(name) for name in report.facts), default=0)
    lines += [f"  {name:<{width}}  {value}" for name, value in report.facts.items()]
    lines += [f"  skipped   {example}" for example in report.skipped.examples]
    lines += [f"  PROBLEM   {problem}" for problem in report.problems]
    lines += [f"  note      {note}" for note in report.notes]
    for line in (line for sample in report.samples for line in sample.split("\n")):
        words = line.lstrip()
        indent = " " * (4 + len(line) - len(words))
        lines.append(indent + one_line(words, terminal_width() - len(indent)))
    return "\n".join(lines) + "\n\n"
