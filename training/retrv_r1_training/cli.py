"""`retrv-r1-train`: one command per stage family (docs/training.md)."""

from __future__ import annotations

import argparse
import logging
import sys

import torch

from retrv_r1_retriever.errors import RetrvR1Error
from retrv_r1_training import (
    ablation_cli,
    check_cli,
    convert_cli,
    export,
    first_stage,
    grpo_cli,
    miniature_cli,
    plot_cli,
    sft_command,
    stage_command,
    synthesize_cli,
)

RECIPES = miniature_cli.RECIPES


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="retrv-r1-train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    miniature_cli.add_parser(commands)
    ablation_cli.add_parser(commands)
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
    if "threads" in args:
        torch.set_num_threads(args.threads)
    try:
        return int(args.main(args))
    except (RetrvR1Error, OSError) as error:  # the latter name the file
        sys.stderr.write(f"retrv-r1-train: {error}\n")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
