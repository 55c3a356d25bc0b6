"""What `retrv-r1-train grpo`, `passrate` and `calibrate` read, and what they write."""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.model.checkpoint import Checkpoint, load_checkpoint
from retrv_r1_training.adapters import onto
from retrv_r1_training.calibrate import calibrate, measurements, table, write_thresholds
from retrv_r1_training.candidate_reader import CandidateReader
from retrv_r1_training.grpo import dtype_of, sampling_of, train_grpo
from retrv_r1_training.grpo_config import GrpoRecipe
from retrv_r1_training.mbeir_tasks import Folder, Tasks, checkpoint_folder
from retrv_r1_training.overrides import dump, keep, load
from retrv_r1_training.processes import device, from_all, is_first
from retrv_r1_training.rollout import RolloutRunner, Task
from retrv_r1_training.stage_checkpoint import save_stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Opened:
    """A recipe's checkpoint and data."""

    folder: Path
    checkpoint: Checkpoint
    data: Folder
    reader: CandidateReader

    @classmethod
    def of(cls, recipe: GrpoRecipe, folder: Path) -> _Opened:
        checkpoint = load_checkpoint(folder, device=device(), dtype=dtype_of(recipe.grpo))
        data = Folder(recipe.data, folder, recipe.seed)
        return cls(folder, checkpoint, data, CandidateReader(checkpoint, data.images, recipe.data.cache_gb))


def run_grpo(args: argparse.Namespace) -> None:
    recipe = load(GrpoRecipe, args.recipe, args.overrides)
    if is_first():
        keep(recipe, args.run)
        log.info("%s", dump(recipe))
    opened = _Opened.of(recipe, checkpoint_folder(recipe.checkpoint))
    tasks = opened.data.training(opened.reader, recipe.shuffle, recipe.grpo.missing)
    if recipe.hard:
        tasks = keep_hard(tasks, Path(recipe.hard))
    held_out = opened.data.validation(opened.reader)
    log.info("grpo: %d training lists, %d for validation", len(tasks), len(held_out))
    model = train_grpo(
        opened.checkpoint, tasks, held_out, recipe.grpo, recipe.seed, args.run / "states", args.run / "log.jsonl",
        opened.reader,
    )  # fmt: skip
    if is_first():
        out = args.out or args.run / "checkpoint"
        start = load_checkpoint(opened.folder, device="cpu", dtype="float32")
        merged = replace(start, model=onto(start.model, model, start.processor))
        saved = save_stage(opened.folder, out, merged, top_k=recipe.data.top_k)
        log.info("checkpoint %s in %s, memory %s", saved.checkpoint_digest, out, saved.memory_digest)
    from_all(None)  # the first process is done, too


def run_passrate(args: argparse.Namespace) -> None:
    recipe = load(GrpoRecipe, args.recipe, args.overrides)
    opened = _Opened.of(recipe, checkpoint_folder(recipe.checkpoint))
    tasks = opened.data.training(opened.reader, recipe.shuffle, recipe.grpo.missing)
    if args.limit:
        tasks = tasks.sample(min(args.limit, len(tasks)), recipe.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    solvable = 0
    with args.out.open("w", encoding="utf-8") as out:
        for row in pass_rates(RolloutRunner(opened.checkpoint, opened.reader), tasks, recipe, args.samples):
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
        part = list(tasks[start : start + together])
        seeds = [random.Random(f"{recipe.seed}/{t.id}/{s}").getrandbits(48) for t in part for s in range(samples)]
        rollouts = runner.run([t for t in part for _ in range(samples)], seeds, sampling)
        for i, task in enumerate(part):
            solved = sum(r.correct for r in rollouts[i * samples : (i + 1) * samples])
            yield {"id": task.id, "stratum": task.stratum, "rank": task.rank, "samples": samples, "solved": solved,
                   "pass_rate": solved / samples, "hard": 0 < solved < samples}  # fmt: skip


def keep_hard(tasks: Tasks, file: Path) -> Tasks:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    hard = frozenset(row["id"] for row in rows if row["hard"])
    kept = tasks.only(hard)
    if not len(kept):
        got = f"none of {len(hard)} hard ids among {len(tasks)} lists"
        raise InputError(
            explain(str(file), expected="queries of this recipe's data", got=got, fix="Run passrate again.")
        )
    return kept


def run_calibrate(args: argparse.Namespace) -> None:
    recipe = load(GrpoRecipe, args.recipe, args.overrides)
    opened = _Opened.of(recipe, args.checkpoint or checkpoint_folder(recipe.checkpoint))
    held_out = opened.data.validation(opened.reader)
    runner = RolloutRunner(opened.checkpoint, opened.reader)
    measured = measurements(runner, held_out, sampling_of(recipe.grpo, 0.0))
    found = calibrate(measured, args.max_cost, args.max_false_none)
    write_thresholds(opened.folder, found)
    log.info("%s\nwritten to %s", table(found), opened.folder / "retrv" / "manifest.json")
    if args.out:
        args.out.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
