"""Arguments that several commands share, with their ranges."""

from __future__ import annotations

import argparse

from retrv_r1_retriever.cli.terminal import at_least_one


def add_threads(parser: argparse.ArgumentParser) -> None:
    """`--threads`, for commands that compute; `cli.main` sets it for all of them."""
    parser.add_argument("--threads", type=at_least_one, default=2, metavar="N", help="of the CPU (default: 2)")


def share(text: str) -> float:
    """A share, as the `type` of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share, 0 to 1, got {text!r}")
    return value
