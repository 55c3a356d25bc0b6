"""docs/PAPER.md: every name leads into the code, every value in code type is the one there."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from retrv_r1_training.align import Frame
from retrv_r1_training.backbone import BackboneSize
from retrv_r1_training.chat_teacher import ChatOptions
from retrv_r1_training.data_config import DataConfig
from retrv_r1_training.grpo_config import GrpoConfig, GrpoRecipe
from retrv_r1_training.labelled import ListOptions
from retrv_r1_training.loss import TokenWeights
from retrv_r1_training.overrides import load
from retrv_r1_training.sft import SftLoss
from retrv_r1_training.sft_recipe import DistillRecipe, ExampleSettings, LoraSettings, Optimisation, SftRecipe, Thinking
from retrv_r1_training.stage_command import _STAGES
from retrv_r1_training.stage_recipe import AlignRecipe, BaseRecipe, EmbedderRecipe
from retrv_r1_training.synthesize import RunOptions
from retrv_r1_training.teacher import TeacherStyle

from retrv_r1_retriever.model.configuration import IcmConfig

RECIPES = Path(__file__).parents[2] / "training" / "retrv_r1_training" / "recipes"
PAGE = (Path(__file__).parents[2] / "docs" / "PAPER.md").read_text(encoding="utf-8")


def rows(page: str) -> list[list[str]]:
    lines = [line.replace("<|none|>", "<!none!>") for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("constant", "---")]


def resolve(dotted: str) -> object:
    """A module, what is in it, or the default of a dataclass's field."""
    names = dotted.split(".")
    at = next(n for n in range(len(names), 0, -1) if _module(".".join(names[:n])))
    found: object = importlib.import_module(".".join(names[:at]))
    for name in names[at:]:
        fields = {f.name: f for f in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else {}
        found = fields[name].default if name in fields else getattr(found, name)
    return found


def _module(name: str) -> bool:
    try:
        return bool(importlib.util.find_spec(name))
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("row", rows(PAGE), ids=lambda row: row[0] or row[1])
def test_values_are_those_of_the_code(row: list[str]) -> None:
    assert len(row) == 5
    value, where = row[1].replace("<!none!>", "<|none|>"), row[4]
    names = re.findall(r"`([^`]+)`", where)
    assert names
    for name in names:
        if name.endswith(".yaml"):
            assert (RECIPES / name).is_file()
        else:
            found = resolve(name)
            if told := re.match(r"`([^`]+)`", value):
                assert found == ast.literal_eval(told[1])


#: What is in a recipe and changes no result, or is the user's own: data, places, batches on one GPU, what is logged when.
ELSEWHERE = {
    "start", "checkpoint", "data", "optim", "grpo", "loss", "lora", "run", "examples", "thinking", "icm", "backbone", "frame", "tokens",
    "stage", "seed", "steps", "batch_size", "per_device", "lr", "warmup", "weight_decay", "hardware", "length", "thought", "micro_batch",
    "gradient_checkpointing", "evaluate_every", "save_every", "report_to", "dtype", "deepspeed", "hard", "root", "train",
    "validation", "captions", "workers", "validation_queries", "cache_gb", "concurrency", "limit", "give_up_after", "instruction",
}  # fmt: skip
RECIPES_OF = (
    IcmConfig, EmbedderRecipe, AlignRecipe, BaseRecipe, LoraSettings, ExampleSettings, Optimisation, SftRecipe, SftLoss, TokenWeights,
    Thinking, DistillRecipe, GrpoConfig, GrpoRecipe, DataConfig, TeacherStyle, ChatOptions, RunOptions, ListOptions, Frame, BackboneSize,
)  # fmt: skip


@pytest.mark.parametrize("kind", RECIPES_OF)
def test_every_constant_is_on_the_page(kind: type) -> None:
    """By its own name, or its whole class by one row; what a class has from another is named there."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    inherited = {
        f.name for base in kind.__mro__[1:] if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)
    }
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in ELSEWHERE | inherited and f"`{name}.{f.name}`" not in PAGE and f"`{name}`" not in PAGE
    ]
    assert not missing


@pytest.mark.parametrize("recipe", ["embedder-3b", "embedder-7b", "align-3b", "align-7b", "base"])
def test_shipped_recipes_load(recipe: str) -> None:
    load(_STAGES[recipe.partition("-")[0]][0], RECIPES / f"{recipe}.yaml")
