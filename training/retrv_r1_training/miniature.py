"""All stages of the miniature in order, each resumable: a finished stage leaves its weights and is not run again.

captions -> episodes -> embedder -> align -> [pointwise] -> direct -> eliminate -> sft -> [polish] -> [in_full] -> [grpo] -> export
([...]: if the recipe has it)
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from retrv_r1_retriever.demo.catalogue import write_catalogue
from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.model.checkpoint import Checkpoint, Manifest, save_checkpoint
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_retriever.types import Content
from retrv_r1_training import align, base, direct, embedder, pointwise, sft
from retrv_r1_training.backbone import build_model, build_processor, build_tokenizer
from retrv_r1_training.card import write_card
from retrv_r1_training.data import Pool, encode_pool, load_pool
from retrv_r1_training.lists import MIN_K, Contrast, ListConfig, Lists, make_lists
from retrv_r1_training.loss import TokenWeights
from retrv_r1_training.memory_training import learn_memory
from retrv_r1_training.overrides import same_as_before
from retrv_r1_training.quality import Quality, plain, quality
from retrv_r1_training.recipe import Recipe
from retrv_r1_training.rollout import RolloutRunner, Sampling, tasks_of
from retrv_r1_training.run_folder import locked
from retrv_r1_training.teacher import TeacherStyle

log = logging.getLogger(__name__)
TRAIN = ("train0", "train1", "train2")
#: What each stage reads of a recipe beside `stages.NAME`, `seed` and `top_k`, where a stage before it has not read it already; a test
#: holds every key of `Recipe` to be somewhere.
READS: dict[str, tuple[str, ...]] = {
    "captions": ("backbone",),
    "episodes": ("comparisons",),
    "embedder": ("embedder_dim", "embedder_recall"),
    "align": ("icm", "pairs_per_query"),
    "pointwise": ("freeze_memory", "rehearsal"),
    "direct": ("candidates", "freeze_memory", "rehearsal"),
    "eliminate": ("direct_weight",),
    "sft": ("max_inspections",),
    "polish": (),
    "in_full": (),
    "grpo": (),
}
STAGES = tuple(READS)


class Miniature:
    """One run in one folder. Validation data are looked at, the test split is not even written."""

    def __init__(self, recipe: Recipe, run: Path) -> None:
        self.recipe = recipe
        self.run = run
        self.data = run / "catalogue"
        self.log_file = run / "log.jsonl"
        run.mkdir(parents=True, exist_ok=True)

    def train(self, out: Path) -> str:
        """Run what is left and write the checkpoint to `out`; returns the last stage's name."""
        for stage in STAGES:
            self.stage(stage)
        self.export(out)
        return self.last

    def stage(self, name: str) -> None:
        """Run one stage, unless it was run before or the recipe has none of this name.

        Raises `OptionsError` if the weights that are there were made with another recipe, `RetrvR1Error` while another run is at work.
        """
        file = self.run / f"{name}.pt"
        if name not in stages_of(self.recipe):
            return
        note, made_with = file.with_suffix(".json"), json.dumps(reads(self.recipe, name), indent=1) + "\n"
        if file.exists():
            expected = f"what {name} reads of this recipe"
            fix = f"Remove {file.name} and the stages after it, or choose another folder."
            if not note.exists():
                got = f"no such file beside {file.name}"
                raise OptionsError(explain(str(note), expected=expected, got=got, fix=fix))
            same_as_before(note, made_with, expected, fix)
            log.info("%s: done before, %s", name, file)
            return
        with locked(self.run):
            self._make(name, note, made_with)

    def _make(self, name: str, note: Path, made_with: str) -> None:
        file, schedule = self.run / f"{name}.pt", getattr(self.recipe.stages, name)
        if name != "grpo" or not note.exists() or note.read_text(encoding="utf-8") != made_with:
            # states of another recipe, or of a start that is made anew
            shutil.rmtree(self.run / "grpo-states", ignore_errors=True)
        note.write_text(made_with, encoding="utf-8")
        (self.run / f"quality-{name}.json").unlink(missing_ok=True)  # of weights that somebody removed
        started = time.monotonic()
        torch.manual_seed(self.recipe.seed)
        model: RetrvR1ForConditionalGeneration = getattr(self, name)()
        torch.save(model.state_dict(), file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
        minutes = (time.monotonic() - started) / 60
        with (self.run / "stages.jsonl").open("a", encoding="utf-8") as out:
            out.write(json.dumps({"stage": name, "minutes": round(minutes, 2), **asdict(schedule)}) + "\n")
        log.info("%s: %.1f minutes", name, minutes)

    # -- stages --------------------------------------------------------------------------------------------------------

    def captions(self) -> RetrvR1ForConditionalGeneration:
        model = self._fresh()
        pictures = [p for pool in self.raw_pools[:-1] for p in _captioned(pool)]
        held_out = _captioned(self.raw_pools[-1])
        Random(0).shuffle(held_out)
        schedule = self.recipe.stages.captions
        base.train_captions(model, self.processor, pictures, held_out, schedule, self.recipe.seed + 1, self.log_file)
        return model

    def episodes(self) -> RetrvR1ForConditionalGeneration:
        model = self._load("captions")
        base.train_episodes(
            model, self.processor, self.pools[:-1], self.pools[-1], self.recipe.stages.episodes,
            self.recipe.comparisons, self.recipe.seed + 2, self.log_file,
        )  # fmt: skip
        return model

    def embedder(self) -> RetrvR1ForConditionalGeneration:
        model = self._load("episodes")
        dim = self.recipe.embedder_dim
        embedder.train_embedder(
            model, self.processor, self.pools[:-1], self.pools[-1], dim, self.recipe.stages.embedder,
            self.recipe.embedder_recall, self.recipe.seed + 3, self.log_file,
        )  # fmt: skip
        lists = [embedder.first_stage_lists(model, self.processor, p, dim, self.recipe.top_k) for p in self.pools]
        np.savez(self.run / "lists.npz", *lists)
        return model

    def align(self) -> RetrvR1ForConditionalGeneration:
        model = self._load("episodes")
        align.train_align(
            model, self.processor, self.pools, self.ranked, self.recipe.stages.align,
            self.recipe.pairs_per_query, Contrast(self.recipe.top_k), self.recipe.seed + 4, self.log_file,
        )  # fmt: skip
        return model

    def pointwise(self) -> RetrvR1ForConditionalGeneration:
        model, recipe = self._start("align"), self.recipe
        assert recipe.stages.pointwise is not None
        pointwise.train_pointwise(
            model, self.processor, self.lists, recipe.stages.pointwise, recipe.rehearsal, recipe.seed + 5, self.log_file
        )
        return model

    def direct(self) -> RetrvR1ForConditionalGeneration:
        model = self._start("pointwise" if self.recipe.stages.pointwise else "align")
        direct.train_direct(
            model, self.processor, self.lists, Contrast(self.recipe.top_k), self.recipe.stages.direct,
            self.recipe.rehearsal, self.recipe.seed + 5, self.log_file,
        )  # fmt: skip
        return model

    def eliminate(self) -> RetrvR1ForConditionalGeneration:
        """First half of the SFT curriculum: sequences end after the elimination, so three times as many fit."""
        return self._sft("direct", "eliminate", None)

    def sft(self) -> RetrvR1ForConditionalGeneration:
        return self._sft("eliminate", "sft", TeacherStyle(max_inspections=self.recipe.max_inspections))

    def polish(self) -> RetrvR1ForConditionalGeneration:
        """Thoughts that stop at the match, and labels that weigh as much as words.

        What `sft` gets wrong shows only where the model writes on its own: a label skipped, an inspection asked for in the middle of
        the elimination, an answer that is not the candidate that matched (docs/experiments.md).
        """
        return self._sft("sft", "polish", _polished(self.recipe), TokenWeights(list_label=1.0), seed=8)

    def in_full(self) -> RetrvR1ForConditionalGeneration:
        """A peer for the benchmarks: the same thoughts over candidates in full, from weights that know how to think."""
        self.lists = [replace(part, full=True) for part in self.lists]
        return self._sft("polish", "in_full", _polished(self.recipe), TokenWeights(list_label=1.0), seed=9)

    def grpo(self) -> RetrvR1ForConditionalGeneration:
        config, top_k = self.recipe.stages.grpo, self.recipe.top_k
        assert config is not None
        model = self._start(self.supervised)
        if not config.steps:
            return model
        from retrv_r1_training.grpo import train_grpo  # TRL: only this stage needs it

        tasks = tasks_of(self.lists[:-1], top_k, config.missing, ListConfig(top_k).short)
        held_out = tasks_of(self.lists[-1:], top_k)
        start = Checkpoint(model, self.processor, Manifest("miniature"))
        config = replace(config, max_inspections=self.recipe.max_inspections)
        few = held_out[:: max(1, len(held_out) // 150)]
        return train_grpo(start, tasks, few, config, self.recipe.seed + 7, self.run / "grpo-states", self.log_file)

    def quality(self, stage: str) -> dict[str, Quality]:
        """Of a stage's weights on the whole validation pool, kept in RUN/quality-STAGE.json. Memory is made as it is served."""
        file = self.run / f"quality-{stage}.json"
        if file.exists():
            return {name: Quality(**row) for name, row in json.loads(file.read_text(encoding="utf-8")).items()}
        model, full = (
            self._load(stage),
            self.recipe.candidates != "compressed" or self.recipe.stages.in_full is not None,
        )
        lists = make_lists(model, self.processor, self.pools[-1], self.ranked[-1], full)
        if self.recipe.candidates == "single":
            found = pointwise.quality(model, self.processor, lists, self.recipe.top_k)
        else:
            runner = RolloutRunner(Checkpoint(model, self.processor, Manifest("miniature")))
            greedy = Sampling(0.0, max_inspections=self.recipe.max_inspections)
            found = quality(runner, tasks_of([lists], self.recipe.top_k), greedy)
        file.write_text(json.dumps(plain(found), indent=1) + "\n", encoding="utf-8")
        return found

    @property
    def supervised(self) -> str:
        """The last stage before reinforcement."""
        return next(name for name in ("in_full", "polish", "sft") if getattr(self.recipe.stages, name))

    @property
    def last(self) -> str:
        return "grpo" if self.recipe.stages.grpo else self.supervised

    def export(self, out: Path) -> None:
        model, first_stage = self._load(self.last), self._load("embedder")
        saved = save_checkpoint(out, model, self.processor, _manifest(self.recipe), first_stage, torch.float16)
        parameters = sum(p.numel() for p in model.parameters())
        write_card(out, self.run, self.recipe, saved, parameters)
        size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
        log.info("checkpoint %s, %.2f MB, memory %s", saved.checkpoint_digest, size / 1e6, saved.memory_digest)

    # -- shared parts --------------------------------------------------------------------------------------------------

    @cached_property
    def raw_pools(self) -> list[Pool]:
        """Three training pools, then validation, pictures as Pillow images."""
        write_catalogue(self.data, (*TRAIN, "val"))
        return [load_pool(self.data, split) for split in (*TRAIN, "val")]

    @cached_property
    def processor(self) -> Processor:
        return build_processor(build_tokenizer(base.vocabulary(self.raw_pools)), self.recipe.backbone)

    @cached_property
    def pools(self) -> list[Pool]:
        """The same after the tower, which is frozen from here on."""
        model = self._load("captions").eval()
        return [encode_pool(model.model, self.processor, pool) for pool in self.raw_pools]

    def share_data(self, other: Miniature) -> None:
        """Take pools and lists from a run with the same first three stages: reading them takes a minute."""
        self.__dict__.update({name: getattr(other, name) for name in ("raw_pools", "processor", "pools", "ranked")})

    @cached_property
    def ranked(self) -> list[np.ndarray]:
        """First-stage lists of each pool, (queries, K)."""
        with np.load(self.run / "lists.npz") as file:
            return [file[f"arr_{i}"] for i in range(len(self.pools))]

    @cached_property
    def lists(self) -> list[Lists]:
        """To train on from `align` on."""
        model, full = self._start("align"), self.recipe.candidates != "compressed"
        return [make_lists(model, self.processor, p, r, full) for p, r in zip(self.pools, self.ranked, strict=True)]

    def _sft(
        self,
        start: str,
        name: str,
        style: TeacherStyle | None,
        tokens: TokenWeights = TokenWeights(),
        seed: int = 6,
    ) -> RetrvR1ForConditionalGeneration:
        model, recipe = self._start(start), self.recipe
        schedule = getattr(recipe.stages, name)
        sft.train_sft(
            model, self.processor, self.lists[:-1], self.lists[-1], ListConfig(recipe.top_k), style, schedule,
            recipe.rehearsal, recipe.direct_weight, recipe.seed + seed, self.log_file, name, tokens,
        )  # fmt: skip
        return model

    def _fresh(self) -> RetrvR1ForConditionalGeneration:
        tokenizer = self.processor.tokenizer
        return build_model(tokenizer, self.recipe.backbone, self.recipe.icm, self.recipe.seed)

    def _load(self, stage: str) -> RetrvR1ForConditionalGeneration:
        model = self._fresh()
        weights = torch.load(self.run / f"{stage}.pt", weights_only=True)
        if stage in STAGES[:3]:  # the module is as it was made; lent by another run, it may have another size
            weights = {**model.state_dict(), **{k: v for k, v in weights.items() if ".icm." not in k}}
        model.load_state_dict(weights)
        return model

    def _start(self, stage: str) -> RetrvR1ForConditionalGeneration:
        """To train on from there."""
        model = self._load(stage)
        return model if self.recipe.freeze_memory else learn_memory(model)


def _manifest(recipe: Recipe) -> Manifest:
    return Manifest(
        "retrv-r1-miniature (from scratch)", base_revision=f"seed {recipe.seed}", licence="Apache-2.0",
        trained_top_k=recipe.top_k, trained_min_k=MIN_K, embedder_dim=recipe.embedder_dim,
    )  # fmt: skip


def _polished(recipe: Recipe) -> TeacherStyle:
    return TeacherStyle(extra=0.15, exhaustive=0.0, max_inspections=recipe.max_inspections)


def _captioned(pool: Pool) -> list[tuple[Content, str]]:
    """Cards and query pictures that show their target, with captions."""
    pictures = [(Content(image=i.content.image), i.caption) for i in pool.items if i.modality == "image"]
    pictures += [(Content(image=q.query.content.image), q.target_text) for q in pool.queries if q.task == "i2t"]
    return pictures


def stages_of(recipe: Recipe) -> list[str]:
    """Those that it has, in order."""
    return [name for name in STAGES if getattr(recipe.stages, name)]


def reads(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What a stage's weights depend on, beside the stages before it."""
    before = [name for name in stages_of(recipe) if STAGES.index(name) < STAGES.index(stage)]
    values = asdict(recipe)
    return {"after": before, stage: values["stages"][stage]} | {k: values[k] for k in ("seed", "top_k", *READS[stage])}


def with_fewer_steps(recipe: Recipe, steps: int) -> Recipe:
    """The same recipe cut short: a smoke test of every stage, no model worth having."""
    known = {name: getattr(recipe.stages, name) for name in stages_of(recipe)}
    cut = {name: replace(stage, steps=min(steps, stage.steps)) for name, stage in known.items()}
    return replace(recipe, stages=replace(recipe.stages, **cut))
