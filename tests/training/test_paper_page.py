"""docs/PAPER.md: every name leads into the code, every value in code type is the one there."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from retrv_r1_training.overrides import load
from retrv_r1_training.stage_command import _STAGES

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


@pytest.mark.parametrize("recipe", ["embedder-3b", "embedder-7b", "align-3b", "align-7b", "base"])
def test_shipped_recipes_load(recipe: str) -> None:
    load(_STAGES[recipe.partition("-")[0]][0], RECIPES / f"{recipe}.yaml")
