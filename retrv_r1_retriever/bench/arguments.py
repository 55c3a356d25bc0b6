"""What `retrv-r1 bench` and `python -m retrv_r1_retriever.bench` can be told. Imports no torch: `--help` must not wait for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from retrv_r1_retriever._arguments import share, whole
from retrv_r1_retriever.types import MAX_CANDIDATES

#: Of `shapes.SHAPES`, and the shipped model.
NAMES = ("miniature", "ratio", "3b", "7b")
MODES = ("U", "U'", "X", "X'", "C", "F", "F+5")  #: of `modes.modes`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=NAMES, nargs="+", default=["miniature", "ratio"])
    parser.add_argument("--top-k", type=whole(1, MAX_CANDIDATES), nargs="+", default=[50])
    parser.add_argument("--rounds", type=whole(1), default=7, help="timed passes through all modes (default: 7)")
    parser.add_argument(
        "--steps", type=whole(0), default=100, help="decoded tokens of a thought (default: 100; 0 = none)"
    )
    parser.add_argument("--concurrency", type=whole(1), nargs="*", default=[1, 8])
    parser.add_argument(
        "--margin", type=float, help="nats below which `auto` thinks (default: the checkpoint's, else by --think-share)"
    )
    parser.add_argument("--think-share", type=share, default=0.2, help="of the queries that `auto` thinks about (0.2)")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help="only these, and U and F, to compare with (default: all)"
    )
    parser.add_argument(
        "--stages", action=argparse.BooleanOptionalAction, default=True, help="also time the stages of a query"
    )
    parser.add_argument("--out", type=Path, help="folder for bench.json and bench.png")
