"""The ablation: one recipe, one change a row, every row trained and measured by the same code.

A row shares with `full` of its seed whatever its change cannot have touched: those stages are copied, not trained again. A finished row
leaves a JSON file; rows and stages that are there are not run again.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_training.card import rows_of
from retrv_r1_training.miniature import STAGES, Miniature, reads, stages_of, with_fewer_steps
from retrv_r1_training.overrides import load
from retrv_r1_training.quality import Quality, plain
from retrv_r1_training.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """set: `key=value` over the base; paper: the same row's R@5 on CIRR and OVEN, as far as known; note: for readers."""

    name: str
    set: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    paper: tuple[float | None, ...] = ()
    note: str = ""

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True, slots=True)
class Ablation:
    """base: a recipe of the miniature, in the same folder; set: changes that all rows share. The first row changes nothing."""

    base: str
    rows: tuple[Row, ...]
    set: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows or self.rows[0].set:
            got = self.rows[0].set if self.rows else "no rows"
            fix = "Put the row that changes nothing first."
            raise OptionsError(explain("rows", expected="a first row without `set`", got=got, fix=fix))

    def only(self, names: Sequence[str]) -> tuple[Row, ...]:
        """The rows of these names (or slugs), in the recipe's order; all if none is named."""
        known = {key: row for row in self.rows for key in (row.name, row.slug)}
        if unknown := [name for name in names if name not in known]:
            raise OptionsError(
                explain("--rows", expected=[row.slug for row in self.rows], got=unknown[0], fix="Name such rows.")
            )
        chosen = {known[name].name for name in names} or {row.name for row in self.rows}
        return tuple(row for row in self.rows if row.name in chosen)


@dataclass(frozen=True, slots=True)
class Result:
    """One finished run. minutes: of the stages that this row trained itself; the others came from `full`."""

    row: str
    seed: int
    recipe: dict[str, Any]
    quality: dict[str, Quality]
    minutes: dict[str, float]

    def write(self, file: Path) -> None:
        data = asdict(self) | {"quality": plain(self.quality)}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Result:
        data = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{**data, "quality": {name: Quality(**q) for name, q in data["quality"].items()}})


@dataclass(frozen=True)
class Study:
    """recipe: the YAML; out: JSON files; work: folders of the runs. steps: cut every stage to so many (a smoke test)

    runs: by row and seed, of which other rows take data and stages
    """

    recipe: Path
    out: Path
    work: Path
    steps: int | None = None
    runs: dict[tuple[str, int], Miniature] = field(default_factory=dict)

    @property
    def ablation(self) -> Ablation:
        return load(Ablation, self.recipe)

    def file(self, row: Row, seed: int) -> Path:
        return self.out / f"{row.slug}-s{seed}.json"

    def recipe_of(self, row: Row, seed: int) -> Recipe:
        ablation = self.ablation
        made = load(Recipe, self.recipe.parent / ablation.base, (*ablation.set, *row.set, f"seed={seed}"))
        return made if self.steps is None else with_fewer_steps(made, self.steps)

    def results(self) -> dict[str, list[Result]]:
        """row -> what is finished of it, in the recipe's order."""
        found = {row.name: [self.file(row, seed) for seed in row.seeds] for row in self.ablation.rows}
        return {name: [Result.read(f) for f in files if f.exists()] for name, files in found.items()}

    def run(self, row: Row, seed: int) -> Result:
        """Train and measure one row, or read what is there. Raises `InputError` if that was made with another recipe."""
        recipe, file = self.recipe_of(row, seed), self.file(row, seed)
        kept = json.loads(json.dumps(asdict(recipe)))
        if file.exists():
            found = Result.read(file)
            if found.recipe != kept:
                fix = "Remove it to run the row again, or choose another --out."
                raise InputError(explain(str(file), expected="this recipe's result", got="another one's", fix=fix))
            log.info("%s, seed %d: done before, %s", row.name, seed, file)
            return found
        run = self._run(row, seed)
        last = run.train(run.run / "checkpoint")
        minutes = {stage["stage"]: stage["minutes"] for stage in rows_of(run.run / "stages.jsonl")}
        result = Result(row.name, seed, kept, run.quality(last), minutes)
        result.write(file)
        return result

    def _run(self, row: Row, seed: int) -> Miniature:
        """With the stages it shares."""
        if (row.name, seed) not in self.runs:
            made = Miniature(self.recipe_of(row, seed), self.work / f"{row.slug}-s{seed}")
            if row != self.ablation.rows[0]:
                borrow(self._run(self.ablation.rows[0], seed), made)
            self.runs[row.name, seed] = made
        return self.runs[row.name, seed]


def shared(a: Recipe, b: Recipe) -> list[str]:
    """Stages that come out the same under both recipes, from the first on."""
    same = takewhile(lambda stage: reads(a, stage) == reads(b, stage), STAGES)
    return [stage for stage in same if stage in stages_of(a)]


def borrow(base: Miniature, run: Miniature) -> None:
    """Give `run` the catalogue and those stages of `base` that are the same, training them there first if need be."""
    if not run.data.exists():
        run.data.symlink_to(base.data.resolve(), target_is_directory=True)
    for stage in shared(base.recipe, run.recipe):
        base.stage(stage)
        for name in (f"{stage}.json", f"{stage}.pt", *(["lists.npz"] if stage == "embedder" else [])):
            if (base.run / name).exists() and not (run.run / name).exists():
                shutil.copy2(base.run / name, run.run / name)
    run.share_data(base)
