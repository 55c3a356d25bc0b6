"""`retrv-r1-train base`, `embedder` and `align`: arguments only; TRL is imported when a run starts."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import missing_extra
from retrv_r1_training.arguments import add_threads
from retrv_r1_training.overrides import load
from retrv_r1_training.run_folder import open_run
from retrv_r1_training.stage_recipe import AlignRecipe, BaseRecipe, EmbedderRecipe

_STAGES = {
    "base": (BaseRecipe, "a small backbone and its tokenizer from scratch, from captions"),
    "embedder": (EmbedderRecipe, "a first stage: the backbone's last-token embedding, by contrast"),
    "align": (AlignRecipe, "the compression module: two tokens say what the full ones say"),
}


def add_parser(commands: Any) -> None:
    for stage, (kind, text) in _STAGES.items():
        parser = commands.add_parser(stage, help=text, description=text)
        parser.add_argument("recipe", type=Path, help="YAML, e.g. one of the package's recipes/")
        parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
        # the second name is for torchrun, which takes --run for an abbreviation of its own --run-path
        parser.add_argument("--run", "--folder", type=Path, required=True, help="the same command resumes it")
        add_threads(parser)
        parser.set_defaults(main=_main, stage=stage, kind=kind)


def _main(args: argparse.Namespace) -> int:
    recipe = load(args.kind, args.recipe, args.overrides)
    try:
        module = importlib.import_module(f"retrv_r1_training.train_{args.stage}")
    except ModuleNotFoundError as error:
        if error.name not in ("trl", "peft", "datasets", "accelerate", "deepspeed"):
            raise
        raise missing_extra(error.name, "train") from error
    with open_run(recipe, args.run) as unfinished:
        if unfinished:
            getattr(module, f"train_{args.stage}")(recipe, args.run)
    return 0
