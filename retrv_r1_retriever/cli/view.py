"""`retrv-r1 view`: stored traces as one HTML page."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections import deque
from pathlib import Path

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._arguments import at_least_one
from retrv_r1_retriever.cli.search import check_output, load_config
from retrv_r1_retriever.cli.terminal import print_json
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.types import RankedResults

#: Calls on one page, some 10 MB of it; a file of many weeks would stop a browser. Ours.
LAST = 1000


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="TRACE", help="files of stored traces, the oldest first")
    parser.add_argument(
        "--out", type=Path, metavar="PAGE.html", help="the page (default: beside the first file; opened)"
    )
    parser.add_argument(
        "--last", type=at_least_one, default=LAST, metavar="N", help=f"the last N calls (default: {LAST:,})"
    )
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    from retrv_r1_retriever.report import ReportEntry, write_report
    from retrv_r1_retriever.tracelog import read_traces

    config = load_config(args)
    page = args.out or args.files[0].with_suffix(".html")
    check_output(page)
    shown, stored = deque[RankedResults](maxlen=args.last), 0
    for path in args.files:
        for results in read_traces(path):
            shown.append(results)
            stored += 1
    if not shown:
        fix = "Write some: retrv-r1 search --traces FILE."
        raise InputError(explain(str(args.files[0]), expected="at least one trace", got="none", fix=fix))
    title = ", ".join(path.name for path in args.files)
    write_report(page, [ReportEntry(results) for results in shown], title=title, images=settings.open_images(config))
    if args.json:
        print_json({"report": str(page), "calls": len(shown), "stored": stored})
        return 0
    beside = f" of {stored:,}, --last N shows more" if stored > len(shown) == LAST else ""
    print(f"{len(shown):,} calls{beside}: {page}")
    if args.out is None and sys.stdout.isatty() and _has_a_screen():
        webbrowser.open(page.resolve().as_uri())
    return 0


def _has_a_screen() -> bool:
    """Without one, a browser in the terminal would take it over."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
