"""`retrv-r1-train ablation`."""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path
from typing import Any

import torch

from retrv_r1_retriever.cli.terminal import at_least_one
from retrv_r1_training.ablation import Study
from retrv_r1_training.miniature_cli import RECIPES

log = logging.getLogger(__name__)


def add_parser(commands: Any) -> None:
    text = "train and measure the miniature without one part at a time; resumable row by row and stage by stage"
    parser = commands.add_parser("ablation", help=text, description=text)
    parser.add_argument("--recipe", type=Path, default=RECIPES / "ablation.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation/results"), help="JSON per run, table and plot")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="weights and logs of the runs")
    parser.add_argument("--rows", nargs="+", default=[], help="only these (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these (default: each row's own)")
    parser.add_argument("--steps", type=at_least_one, help="cut every stage to this many steps: a smoke test")
    parser.add_argument("--table", action="store_true", help="train nothing: table and plot of what is finished")
    parser.add_argument("--threads", type=int, default=2)
    parser.set_defaults(main=_main)


def _main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    study = Study(args.recipe, args.out, args.work, args.steps)
    page = importlib.import_module("retrv_r1_training.ablation_page")  # matplotlib: before anything is trained
    for row in () if args.table else study.ablation.only(args.rows):
        for seed in (s for s in row.seeds if args.seeds is None or s in args.seeds):
            log.info("ablation: %s, seed %d", row.name, seed)
            study.run(row, seed)
            page.write(study)
    page.write(study)
    return 0
