"""`retrv-r1-train sft RECIPE`, `distill RECIPE` and `estimate RECIPE`: arguments only; TRL is imported when a run starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from retrv_r1_retriever.errors import OptionsError, explain, missing_extra
from retrv_r1_training.arguments import add_threads
from retrv_r1_training.estimate import AnyRecipe, estimate, table
from retrv_r1_training.grpo_config import GrpoRecipe
from retrv_r1_training.overrides import load, override, read_yaml
from retrv_r1_training.run_folder import open_run
from retrv_r1_training.sft_recipe import DistillRecipe, SftRecipe
from retrv_r1_training.stage_recipe import AlignRecipe, BaseRecipe, EmbedderRecipe

_RECIPES: dict[str, type[AnyRecipe]] = {
    "base": BaseRecipe, "embedder": EmbedderRecipe, "align": AlignRecipe, "sft": SftRecipe, "grpo": GrpoRecipe, "distill": DistillRecipe,
}  # fmt: skip


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sft = commands.add_parser(
        "sft", help="teach the thought and the direct answer (TRL; start it with `accelerate launch`)"
    )
    _recipe_arguments(sft)
    # the second name is for torchrun, which takes --run for an abbreviation of its own --run-path
    sft.add_argument(
        "--run", "--folder", type=Path, required=True, help="folder of the run; the same command resumes it"
    )
    add_threads(sft)
    sft.set_defaults(main=_sft)
    distill = commands.add_parser("distill", help="teach the direct read the order that the model's own thoughts give")
    _recipe_arguments(distill)
    distill.add_argument(
        "--run", "--folder", type=Path, required=True, help="folder of the run; the same command resumes it"
    )
    distill.add_argument(
        "--think-only", action="store_true", help="write the thoughts and stop, before a launch of many"
    )
    add_threads(distill)
    distill.set_defaults(main=_distill)
    size = commands.add_parser("estimate", help="GB per GPU and GPU-hours of a recipe, with the assumptions")
    _recipe_arguments(size)
    size.set_defaults(main=_estimate)


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML, e.g. one of the package's recipes/")
    parser.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help="e.g. --set optim.lr=2e-5"
    )


def _sft(args: argparse.Namespace) -> int:
    recipe = load(SftRecipe, args.recipe, args.overrides)
    try:
        from retrv_r1_training.trl_sft import train_sft
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "trl", "train") from error
    with open_run(recipe, args.run) as unfinished:
        if unfinished:
            train_sft(recipe, args.run)
    return 0


def _distill(args: argparse.Namespace) -> int:
    recipe = load(DistillRecipe, args.recipe, args.overrides)
    try:
        from retrv_r1_training.distill import train_distill
    except ModuleNotFoundError as error:
        raise missing_extra(error.name or "trl", "train") from error
    with open_run(recipe, args.run) as unfinished:
        if unfinished:
            train_distill(recipe, args.run, args.think_only)
    return 0


def _estimate(args: argparse.Namespace) -> int:
    recipe = load_any(args.recipe, args.overrides)
    sys.stdout.write(table(recipe, estimate(recipe)))
    return 0


def load_any(file: Path, overrides: Sequence[str]) -> AnyRecipe:
    """The recipe of whatever stage it is of."""
    data = override(read_yaml(file), overrides)
    guess = next(
        (stage for key, stage in (("grpo", "grpo"), ("thinking", "distill"), ("checkpoint", "sft")) if key in data),
        None,
    )
    stage = data.get("stage", guess)
    if stage not in _RECIPES:
        expected = f"stage: one of {', '.join(_RECIPES)}"
        raise OptionsError(explain(str(file), expected=expected, got=stage or "none", fix="Name the stage."))
    return load(_RECIPES[stage], file, overrides)
