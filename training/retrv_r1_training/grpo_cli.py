"""`retrv-r1-train grpo`, `passrate` and `calibrate`. TRL is imported when one of them runs, not before."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrv_r1_retriever._arguments import at_least_one, share
from retrv_r1_retriever.errors import missing_extra
from retrv_r1_training.arguments import add_threads


def add_parser(commands: Any) -> None:
    parser = _parser(commands, "grpo", "train by curriculum GRPO")
    # the second name is for torchrun, which takes --run for an abbreviation of its own --run-path
    parser.add_argument("--run", "--folder", type=Path, default=Path("runs/grpo"), help="the same command resumes it")
    parser.add_argument("--out", type=Path, help="checkpoint folder (default: RUN/checkpoint)")


def add_passrate_parser(commands: Any) -> None:
    parser = _parser(commands, "passrate", "how often a checkpoint solves each training query, as JSONL")
    parser.add_argument("--samples", type=at_least_one, default=8, help="thoughts per query")
    parser.add_argument("--limit", type=at_least_one, help="queries, drawn at random; a larger one asks further ones")
    parser.add_argument("--out", type=Path, required=True)


def add_calibrate_parser(commands: Any) -> None:
    parser = _parser(
        commands, "calibrate", "choose the thresholds of thinking and of none on validation data, write them into the manifest"
    )  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, help="folder to calibrate (default: the recipe's)")
    parser.add_argument("--max-cost", type=share, default=0.01, help="R@1 that skipping thoughts may cost")
    parser.add_argument(
        "--max-false-none", type=share, default=0.02, help="share of answerable lists that may be answered with none"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write what was found as JSON")


def _parser(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help="e.g. --set grpo.steps=2"
    )
    add_threads(parser)
    parser.set_defaults(main=_later(f"run_{name}"))
    return parser


def _later(name: str) -> Callable[[argparse.Namespace], int]:
    def main(args: argparse.Namespace) -> int:
        try:
            commands = importlib.import_module("retrv_r1_training.grpo_commands")
        except ModuleNotFoundError as error:
            if error.name not in ("trl", "peft", "datasets", "accelerate"):
                raise
            raise missing_extra(error.name, "train") from error
        getattr(commands, name)(args)
        return 0

    return main
