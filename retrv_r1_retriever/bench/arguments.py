"""What `retrv-r1 bench` and `python -m retrv_r1_retriever.bench` can be told. Imports no torch: `--help` must not wait for it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

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
    parser.add_argument("--think-share", type=_share, default=0.2, help="of the queries that `auto` thinks about (0.2)")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help="only these, and U and F, to compare with (default: all)"
    )
    parser.add_argument(
        "--stages", action=argparse.BooleanOptionalAction, default=True, help="also time the stages of a query"
    )
    parser.add_argument("--out", type=Path, help="folder for bench.json and bench.png")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The `type` of an argument."""
    expected = f"at least {least}" if most is None else f"{least} to {most}"

    def read(text: str) -> int:
        value = int(text) if text.lstrip("-").isdecimal() else least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"expected a whole number, {expected}, got {text!r}")
        return value

    return read


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share, 0 to 1, got {text!r}")
    return value
