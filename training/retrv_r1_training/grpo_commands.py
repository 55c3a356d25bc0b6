"""What `retrv-r1-train grpo`, `passrate` and `calibrate` read, and what they write."""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from retrv_r1_retriever.config import Config, ModelConfig, checkpoint_path
from retrv_r1_retriever.demo.catalogue import SPLITS, write_catalogue
from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_retriever.model.checkpoint import (
    Checkpoint,
    Manifest,
    load_checkpoint,
    load_embedder_checkpoint,
    save_checkpoint,
)
from retrv_r1_training.calibrate import calibrate, measurements, write_margin
from retrv_r1_training.data import encode_pool, load_pool
from retrv_r1_training.embedder import first_stage_lists
from retrv_r1_training.grpo import sampling_of, train_grpo
from retrv_r1_training.grpo_config import GrpoConfig
from retrv_r1_training.lists import make_lists
from retrv_r1_training.recipe import build
from retrv_r1_training.rollout import RolloutRunner, Task, tasks_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """root: M-BEIR files (the demo catalogue's splits are written there if they are missing); top_k: K of the lists

    hard: a file of `passrate`; only its queries with a pass rate strictly between 0 and 1 are trained on
    validation_queries: at most, evenly over the split
    """

    root: str
    train: list[str]
    validation: str
    top_k: int
    hard: str | None = None
    validation_queries: int = 120


@dataclass(frozen=True, slots=True)
class GrpoRecipe:
    """checkpoint: "miniature" or a folder, after SFT, with its embedder inside (it makes the lists)"""

    checkpoint: str
    seed: int
    data: DataConfig
    grpo: GrpoConfig


def load_grpo_recipe(path: Path) -> GrpoRecipe:
    return build(GrpoRecipe, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def run_grpo(args: argparse.Namespace) -> None:
    recipe = load_grpo_recipe(args.recipe)
    if args.steps:
        recipe = replace(recipe, grpo=replace(recipe.grpo, steps=args.steps))
    _keep(recipe, args.run / "recipe.json")
    checkpoint = load_checkpoint(_folder(recipe.checkpoint))
    tasks = _tasks(recipe, checkpoint, recipe.data.train)
    if recipe.data.hard:
        tasks = keep_hard(tasks, Path(recipe.data.hard))
    held_out = _spread(_tasks(recipe, checkpoint, [recipe.data.validation]), recipe.data.validation_queries)
    log.info("grpo: %d training lists, %d for validation", len(tasks), len(held_out))
    model = train_grpo(
        checkpoint, tasks, held_out, recipe.grpo, recipe.seed, args.run / "states", args.run / "log.jsonl"
    )
    out = args.out or args.run / "checkpoint"
    saved = save_beside(_folder(recipe.checkpoint), out, replace(checkpoint, model=model))
    log.info("checkpoint %s in %s, memory %s", saved.checkpoint_digest, out, saved.memory_digest)


def save_beside(source: Path, out: Path, trained: Checkpoint) -> Manifest:
    """A checkpoint trained from `source`: same dtype, so the memories of both are one; its embedder as it is; no margin yet."""
    with safe_open(source / "retrv" / "icm.safetensors", "pt") as file:
        dtype = file.get_tensor(next(iter(file.keys()))).dtype
    manifest = save_checkpoint(out, trained.model, trained.processor, trained.manifest, dtype=dtype)
    manifest = replace(manifest, think_margin=None, embedder_digest=trained.manifest.embedder_digest)
    shutil.copytree(source / "retrv" / "embedder", out / "retrv" / "embedder", dirs_exist_ok=True)
    (out / "retrv" / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def _keep(recipe: GrpoRecipe, file: Path) -> None:
    """A folder that was started with another recipe is refused: a resumed run would mix two."""
    text = json.dumps(asdict(recipe), indent=1) + "\n"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        fix = "Choose another --run folder, or remove this one."
        raise OptionsError(
            explain(str(file), expected="the recipe this folder was started with", got="another", fix=fix)
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def run_passrate(args: argparse.Namespace) -> None:
    recipe = load_grpo_recipe(args.recipe)
    checkpoint = load_checkpoint(_folder(recipe.checkpoint))
    tasks = _tasks(recipe, checkpoint, recipe.data.train)
    if args.limit:
        tasks = random.Random(recipe.seed).sample(tasks, min(args.limit, len(tasks)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    solvable = 0
    with args.out.open("w", encoding="utf-8") as out:
        for row in pass_rates(RolloutRunner(checkpoint), tasks, recipe, args.samples):
            solvable += row["hard"]
            out.write(json.dumps(row) + "\n")
            out.flush()
    log.info("passrate: %d of %d queries are solved sometimes, not always: %s", solvable, len(tasks), args.out)


def pass_rates(
    runner: RolloutRunner, tasks: Sequence[Task], recipe: GrpoRecipe, samples: int
) -> Iterator[dict[str, Any]]:
    """One row per query. hard: solved in some samples and not in all; rank: of the positive in the list, None if it is missing."""
    sampling, together = sampling_of(recipe.grpo, recipe.grpo.temperature), max(1, 256 // samples)
    for start in range(0, len(tasks), together):
        part = tasks[start : start + together]
        seeds = [random.Random(f"{recipe.seed}/{t.id}/{s}").getrandbits(48) for t in part for s in range(samples)]
        rollouts = runner.run([t for t in part for _ in range(samples)], seeds, sampling)
        for i, task in enumerate(part):
            solved = sum(r.correct for r in rollouts[i * samples : (i + 1) * samples])
            yield {"id": task.id, "stratum": task.stratum, "rank": task.rank, "samples": samples, "solved": solved,
                   "pass_rate": solved / samples, "hard": 0 < solved < samples}  # fmt: skip


def keep_hard(tasks: Sequence[Task], file: Path) -> list[Task]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    hard = {row["id"] for row in rows if row["hard"]}
    kept = [t for t in tasks if t.id in hard]
    if not kept:
        got = f"none of {len(hard)} hard ids among {len(tasks)} lists"
        raise InputError(
            explain(str(file), expected="queries of this recipe's data", got=got, fix="Run passrate again.")
        )
    return kept


def run_calibrate(args: argparse.Namespace) -> None:
    recipe = load_grpo_recipe(args.recipe)
    folder = args.checkpoint or _folder(recipe.checkpoint)
    checkpoint = load_checkpoint(folder)
    tasks = _tasks(recipe, checkpoint, [recipe.data.validation], folder)
    found = calibrate(measurements(RolloutRunner(checkpoint), tasks, sampling_of(recipe.grpo, 0.0)), args.max_cost)
    write_margin(folder, found.margin)
    log.info("%s", json.dumps(asdict(found), indent=1))


def _tasks(recipe: GrpoRecipe, checkpoint: Checkpoint, splits: Sequence[str], folder: Path | None = None) -> list[Task]:
    """The first stage's lists of these splits, by the embedder inside the checkpoint."""
    root = Path(recipe.data.root)
    write_catalogue(root, tuple(s for s in splits if s in SPLITS))
    embedder = load_embedder_checkpoint(folder or _folder(recipe.checkpoint), device=str(checkpoint.model.device))
    parts = []
    for split in splits:
        pool = encode_pool(checkpoint.model.model, checkpoint.processor, load_pool(root, split))
        dim = checkpoint.manifest.embedder_dim
        ranked = first_stage_lists(embedder.model, checkpoint.processor, pool, dim, recipe.data.top_k)
        parts.append(make_lists(checkpoint.model, checkpoint.processor, pool, ranked))
    return tasks_of(parts, recipe.data.top_k, recipe.grpo.missing)


def _spread(tasks: Sequence[Task], count: int) -> list[Task]:
    step = max(1, len(tasks) // count)
    return list(tasks[::step])


def _folder(checkpoint: str) -> Path:
    return Path(checkpoint_path(Config(model=ModelConfig(checkpoint=checkpoint))))
