"""`retrv-r1-train miniature`: one run, or the same recipe with several seeds."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from retrv_r1_retriever._arguments import at_least_one
from retrv_r1_training.arguments import add_threads
from retrv_r1_training.miniature import Miniature, with_fewer_steps
from retrv_r1_training.overrides import dump, load
from retrv_r1_training.recipe import Recipe
from retrv_r1_training.seeds import by_seed

log = logging.getLogger(__name__)
RECIPES = Path(__file__).parent / "recipes"


def add_parser(commands: Any) -> None:
    text = "train the miniature from scratch (more than an hour on two cores)"
    parser = commands.add_parser("miniature", help=text, description=text)
    parser.add_argument("--recipe", type=Path, default=RECIPES / "miniature.yaml")
    parser.add_argument("--run", type=Path, default=Path("runs/miniature"), help="folder of the run; resumable")
    parser.add_argument("--out", type=Path, help="checkpoint folder (default: RUN/checkpoint)")
    parser.add_argument("--seeds", type=int, nargs="+", help="one run for each, in RUN/seed-N; prints mean and spread")
    add_common(parser)
    parser.set_defaults(main=_main)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=at_least_one, help="cut every stage to this many steps: a smoke test")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    add_threads(parser)


def _main(args: argparse.Namespace) -> int:
    recipe = load(Recipe, args.recipe, args.overrides)
    if args.steps is not None:
        recipe = with_fewer_steps(recipe, args.steps)
    log.info("%s", dump(recipe))
    if args.seeds is None:
        Miniature(recipe, args.run).train(args.out or args.run / "checkpoint")
        return 0
    runs = [Miniature(replace(recipe, seed=seed), args.run / f"seed-{seed}") for seed in args.seeds]
    for run in runs:
        run.train(run.run / "checkpoint")
    stages = [stage for stage in (runs[0].supervised, "grpo") if getattr(recipe.stages, stage)]
    table = by_seed({stage: [run.quality(stage) for run in runs] for stage in stages})
    (args.run / "seeds.md").write_text(table + "\n", encoding="utf-8")
    log.info("%s\n\nwritten to %s", table, args.run / "seeds.md")
    return 0
