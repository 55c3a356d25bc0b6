"""`retrv-r1 bench`: what a mode costs on this machine."""

from __future__ import annotations

import argparse
import contextlib
import sys

from retrv_r1_retriever.bench.arguments import add_arguments
from retrv_r1_retriever.cli.terminal import print_json


def add(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> int:
    from retrv_r1_retriever.bench.__main__ import command, measure  # torch

    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        report = measure(args, command("retrv-r1", None))
    if args.json:
        print_json(report)
    return 0
