"""`retrv-r1-train`: one command per stage family (docs/training.md)."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from retrv_r1_retriever.errors import RetrvR1Error
from retrv_r1_training import (
    check_cli,
    convert_cli,
    export,
    first_stage,
    grpo_cli,
    plot_cli,
    sft_command,
    stage_command,
    synthesize_cli,
)
from retrv_r1_training.miniature import Miniature, with_fewer_steps
from retrv_r1_training.recipe import load_recipe

RECIPES = Path(__file__).parent / "recipes"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="retrv-r1-train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    miniature = commands.add_parser("miniature", help="train the miniature from scratch (about an hour on two cores)")
    miniature.add_argument("--recipe", type=Path, default=RECIPES / "miniature.yaml")
    miniature.add_argument("--run", type=Path, default=Path("runs/miniature"), help="folder of the run; resumable")
    miniature.add_argument("--out", type=Path, help="checkpoint folder (default: RUN/checkpoint)")
    miniature.add_argument("--steps", type=int, help="cut every stage to this many steps: a smoke test")
    miniature.add_argument("--threads", type=int, default=2)
    convert_cli.add_parser(commands)
    first_stage.add_parser(commands)
    check_cli.add_parser(commands)
    synthesize_cli.add_parser(commands)
    stage_command.add_parser(commands)
    sft_command.add_parser(commands)
    grpo_cli.add_parser(commands)
    grpo_cli.add_passrate_parser(commands)
    grpo_cli.add_calibrate_parser(commands)
    plot_cli.add_parser(commands)
    export.add_parser(commands)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if "main" in args:  # a subcommand with a module of its own
            return int(args.main(args))
        torch.set_num_threads(args.threads)
        recipe = load_recipe(args.recipe)
        if args.steps:
            recipe = with_fewer_steps(recipe, args.steps)
        Miniature(recipe, args.run).train(args.out or args.run / "checkpoint")
    except RetrvR1Error as error:
        sys.stderr.write(f"retrv-r1-train: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
