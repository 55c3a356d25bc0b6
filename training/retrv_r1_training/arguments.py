"""Arguments that several commands share, with their ranges."""

from __future__ import annotations

import argparse

from retrv_r1_retriever._arguments import at_least_one


def add_threads(parser: argparse.ArgumentParser) -> None:
    """`--threads`, for commands that compute; `cli.main` sets it for all of them."""
    parser.add_argument("--threads", type=at_least_one, default=2, metavar="N", help="of the CPU (default: 2)")
