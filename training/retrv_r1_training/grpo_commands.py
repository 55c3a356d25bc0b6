"""What `retrv-r1-train grpo`, `passrate` and `calibrate` read, and what they write."""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

import retrv_r1_retriever
from retrv_r1_retriever.errors import InputError, OptionsError, explain
from retrv_r1_retriever.model.checkpoint import Checkpoint, load_checkpoint
from retrv_r1_training.adapters import onto
from retrv_r1_training.calibrate import calibrate, measurements, table, write_thresholds
from retrv_r1_training.candidate_reader import CandidateReader
from retrv_r1_training.estimate import only_estimated
from retrv_r1_training.grpo import dtype_of, sampling_of, train_grpo
from retrv_r1_training.grpo_config import GrpoRecipe
from retrv_r1_training.inputs import inputs_of
from retrv_r1_training.mbeir_tasks import Folder, checkpoint_folder
from retrv_r1_training.overrides import dump, load, read_yaml, same_as_before
from retrv_r1_training.processes import device, from_all, is_first
from retrv_r1_training.rollout import RolloutRunner, Task
from retrv_r1_training.run_folder import finish, locked, open_run
from retrv_r1_training.stage_checkpoint import save_stage
from retrv_r1_training.waiting import counted

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
    out = args.out or args.run / "checkpoint"
    with open_run(recipe, args.run, out) as unfinished:
        if unfinished:
            _train(recipe, args.run, out)


def _train(recipe: GrpoRecipe, run: Path, out: Path) -> None:
    opened = _Opened.of(recipe, checkpoint_folder(recipe.checkpoint))
    only = hard_queries(Path(recipe.hard), opened.checkpoint.manifest.checkpoint_digest) if recipe.hard else None
    if only is not None and not any(id in only for id in opened.data.query_ids()):
        fix = "Name a file that `passrate` made from these data."
        got = f"none of its {len(only)} hard ids among them"
        raise InputError(explain(f"hard {recipe.hard}", expected="ids of the training queries", got=got, fix=fix))
    tasks = opened.data.training(opened.reader, recipe.shuffle, recipe.grpo.missing, only)
    held_out = opened.data.validation(opened.reader)
    log.info("grpo: %d training lists, %d for validation", len(tasks), len(held_out))
    model = train_grpo(
        opened.checkpoint, tasks, held_out, recipe.grpo, recipe.seed, run / "states", run / "log.jsonl",
        opened.reader,
    )  # fmt: skip
    if is_first():
        start = load_checkpoint(opened.folder, device="cpu", dtype="float32")
        merged = replace(start, model=onto(start.model, model, start.processor))
        finish(out, lambda aside: save_stage(opened.folder, aside, merged, data=recipe.data))
    from_all(None)  # the first process is done, too


def run_passrate(args: argparse.Namespace) -> None:
    with locked(args.out.parent, f".{args.out.name}.lock"):
        _passrate(args)


def _passrate(args: argparse.Namespace) -> None:
    recipe = load(GrpoRecipe, args.recipe, args.overrides)
    opened = _Opened.of(recipe, checkpoint_folder(recipe.checkpoint))
    tasks = opened.data.training(opened.reader, recipe.shuffle, recipe.grpo.missing)
    if args.limit:
        tasks = tasks.sample(args.limit, recipe.seed)
    rows = known_rates(args, opened.checkpoint.manifest.checkpoint_digest, recipe)
    args.out.write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )  # without a half-written line
    left = tasks.others({row["id"] for row in rows})
    lists = (task for _, task in left.each(recipe.data.max_bad_share))
    found = pass_rates(RolloutRunner(opened.checkpoint, opened.reader), lists, recipe, args.samples)
    with args.out.open("a", encoding="utf-8") as out:
        for row in counted(found, "pass rates", len(left)):
            rows.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
    hard = sum(row["hard"] for row in rows)
    log.info("passrate: %d of %d queries are solved sometimes, not always: %s", hard, len(rows), args.out)


def known_rates(args: argparse.Namespace, checkpoint: str, recipe: GrpoRecipe) -> list[dict[str, Any]]:
    """What --out has already. Raises `OptionsError` unless these weights made it, from these data, with this recipe and --samples.

    --limit may be another: a larger one draws the same queries and further ones.
    """
    started = args.out.with_suffix(".yaml")
    expected, fix = "what this file was started with", "Choose another --out, or remove both files."
    rows = read_rates(args.out) if args.out.exists() else []
    if rows and not started.exists():
        raise OptionsError(explain(str(started), expected=expected, got="no such file", fix=fix))
    recipe = replace(recipe, hard=None)  # not read here, and often this very file
    inputs = yaml.safe_dump({"inputs": inputs_of(recipe)}, sort_keys=False, allow_unicode=True, width=1000)
    text = f"checkpoint_digest: {checkpoint}\nsamples: {args.samples}\n{dump(recipe)}{inputs}"
    same_as_before(started, text, expected, fix, only_estimated(recipe))
    return rows


def pass_rates(
    runner: RolloutRunner, tasks: Iterable[Task], recipe: GrpoRecipe, samples: int
) -> Iterator[dict[str, Any]]:
    """One row per query. hard: solved in some samples and not in all; rank: of the positive in the list, None if it is missing."""
    sampling, together = sampling_of(recipe.grpo, recipe.grpo.temperature), max(1, 256 // samples)
    tasks = iter(tasks)
    while part := list(islice(tasks, together)):
        seeds = [random.Random(f"{recipe.seed}/{t.id}/{s}").getrandbits(48) for t in part for s in range(samples)]
        rollouts = runner.run([t for t in part for _ in range(samples)], seeds, sampling)
        for i, task in enumerate(part):
            solved = sum(r.correct for r in rollouts[i * samples : (i + 1) * samples])
            yield {"id": task.id, "stratum": task.stratum, "rank": task.rank, "samples": samples, "solved": solved,
                   "pass_rate": solved / samples, "hard": 0 < solved < samples}  # fmt: skip


def hard_queries(file: Path, checkpoint: str) -> frozenset[str]:
    """Ids of the queries that are solved sometimes, not always. A file of other weights than `checkpoint` is said to be one."""
    started = file.with_suffix(".yaml")
    made_by = read_yaml(started).get("checkpoint_digest") if started.exists() else None
    if made_by != checkpoint:
        text = "%s: the rates are those of checkpoint %s, training starts at %s: what is hard for one may not be for the other"
        log.warning(text, file, made_by or "unknown", checkpoint)
    rows = read_rates(file)
    hard = frozenset(row["id"] for row in rows if row["hard"])
    if not hard:
        fix = "Take more --samples, a larger --limit, or a checkpoint that is neither perfect nor helpless."
        raise InputError(
            explain(str(file), expected="queries solved sometimes, not always", got=f"none among {len(rows)}", fix=fix)
        )
    return hard


def read_rates(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of `passrate`; a last one that a kill cut off is left out. Raises `InputError` for any other file."""
    rows = []
    try:
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                if not (isinstance(row, dict) and isinstance(row.get("id"), str) and isinstance(row.get("hard"), bool)):
                    raise ValueError(f"a row without id, or without hard: true or false: {line.strip()[:80]}")
                rows.append(row)
    except (OSError, ValueError) as error:
        raise InputError(
            explain(str(file), expected="rows of `retrv-r1-train passrate`", got=error, fix="Run it, or fix the path.")
        ) from error
    return rows


def own_folder(named: Path | None, checkpoint: str) -> Path:
    """The checkpoint to write thresholds into. Raises `OptionsError` for one that was lent: the package's own, or the hub cache's."""
    folder = named or checkpoint_folder(checkpoint)
    package = Path(retrv_r1_retriever.__file__).resolve().parent
    if package in folder.resolve().parents or not (named or Path(checkpoint).is_dir()):
        got = f"{folder}, which other programs read, too"
        fix = f"Copy it, `cp -rL {folder} calibrated`, and pass --checkpoint calibrated."
        raise OptionsError(
            explain(f"checkpoint {named or checkpoint}", expected="a folder of your own", got=got, fix=fix)
        )
    return folder


def run_calibrate(args: argparse.Namespace) -> None:
    recipe = load(GrpoRecipe, args.recipe, args.overrides)
    opened = _Opened.of(recipe, own_folder(args.checkpoint, recipe.checkpoint))
    held_out = opened.data.validation(opened.reader)
    runner = RolloutRunner(opened.checkpoint, opened.reader)
    measured = measurements(runner, held_out, sampling_of(recipe.grpo, 0.0))
    found = calibrate(measured, args.max_cost, args.max_false_none)
    write_thresholds(opened.folder, found)
    log.info("%s\nwritten to %s", table(found), opened.folder / "retrv" / "manifest.json")
    if args.out:
        args.out.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
