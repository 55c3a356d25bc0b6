"""`retrv-r1-train ablation`."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrv_r1_retriever._arguments import at_least_one
from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_training.ablation import Row, Study
from retrv_r1_training.arguments import add_threads
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
    add_threads(parser)
    parser.set_defaults(main=_main)


def _main(args: argparse.Namespace) -> int:
    study = Study(args.recipe, args.out, args.work, args.steps)
    page = importlib.import_module("retrv_r1_training.ablation_page")  # matplotlib: before anything is trained
    for row, seed in () if args.table else _chosen(study.ablation.only(args.rows), args.seeds):
        log.info("ablation: %s, seed %d", row.name, seed)
        study.run(row, seed)
        page.write(study)
    page.write(study)
    return 0


def _chosen(rows: Sequence[Row], seeds: Sequence[int] | None) -> list[tuple[Row, int]]:
    chosen = [(row, seed) for row in rows for seed in row.seeds if seeds is None or seed in seeds]
    if not chosen:
        known = "; ".join(f"of {row.name} {', '.join(map(str, row.seeds))}" for row in rows)
        got = " ".join(map(str, seeds or ()))
        raise OptionsError(explain("--seeds", expected=known, got=got, fix="Name such seeds, or none for all."))
    return chosen
