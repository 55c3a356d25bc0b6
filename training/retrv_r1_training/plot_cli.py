"""`retrv-r1-train plot RUN`: the figures of a run's log as one picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import missing_extra


def add_parser(commands: Any) -> None:
    text = "draw loss, reward, accuracy, inspections, length and lambda of a run as one PNG"
    parser: argparse.ArgumentParser = commands.add_parser("plot", help=text, description=text)
    parser.add_argument("run", type=Path, help="a run's folder, or its log.jsonl")
    parser.add_argument("--out", type=Path, help="the picture (default: RUN/plot.png)")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    try:
        from retrv_r1_training.plot import draw
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise missing_extra("matplotlib", "train") from error
    draw(args.run, args.out)
    return 0
