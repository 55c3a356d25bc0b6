"""The model card of a miniature run, written from its own logs; `notes.md` in the run folder is added as it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retrv_r1_retriever.model.checkpoint import Manifest
from retrv_r1_training.recipe import Recipe

_HEAD = """---
license: apache-2.0
library_name: retrv-r1-retriever
tags: [reranking, retrieval, multimodal]
---

# retrv-r1-miniature

A Retrv-R1 model small enough to train on two CPU cores: {parameters} M parameters, trained from scratch on procedural product cards
with the stages of `make miniature`. It shows that the mechanism works (two compressed tokens a candidate, reasoning, inspection) and
serves demos and tests. It knows nothing but these cards: for real data, train on Qwen2.5-VL.

- Method: Retrv-R1, arXiv 2510.02745. No official code or weights exist; this is an independent implementation.
- Data: `retrv_r1_retriever.demo.catalogue`, made by this package; combinations of the validation and test pools never occur in training.
- Base: none. Licence: Apache-2.0. Seed: {seed}. Lists of {min_k} to {top_k} candidates. First-stage embedding: {dim} dimensions,
  small on purpose.
- Checkpoint digest `{checkpoint}`, memory digest `{memory}`.
- Test results: `python -m retrv_r1_retriever.demo.figures --split test` prints them; the README quotes them.
"""


def write_card(folder: Path, run: Path, recipe: Recipe, manifest: Manifest, parameters: int) -> None:
    stages = [row for row in rows_of(run / "stages.jsonl") if row["steps"]]  # 0: left out, and not in the log
    last = {row["stage"]: row for row in rows_of(run / "log.jsonl")}
    text = _HEAD.format(
        parameters=f"{parameters / 1e6:.1f}", seed=recipe.seed, min_k=manifest.trained_min_k, top_k=recipe.top_k, dim=recipe.embedder_dim,
        checkpoint=manifest.checkpoint_digest, memory=manifest.memory_digest,
    )  # fmt: skip
    text += "\n| stage | steps | batch | learning rate | minutes | at the end, on validation data |\n"
    text += "| --- | --- | --- | --- | --- | --- |\n"
    for stage in stages:
        shown = {
            k: v for k, v in last[stage["stage"]].items() if _is_validation(k) and v == v
        }  # NaN: not in this stage
        numbers = ", ".join(f"{k.removeprefix('val_')} {v:.3f}" for k, v in shown.items())
        text += f"| {stage['stage']} | {stage['steps']} | {stage['batch_size']} | {stage['lr']} | {stage['minutes']} | {numbers} |\n"
    if (run / "notes.md").exists():
        text += "\n" + (run / "notes.md").read_text(encoding="utf-8")
    text += f"\nMinutes in all: {sum(stage['minutes'] for stage in stages):.0f}. Recipe:\n\n```json\n"
    (folder / "README.md").write_text(text + json.dumps(asdict(recipe), indent=1) + "\n```\n", encoding="utf-8")


def _is_validation(name: str) -> bool:
    if name in {"stage", "step", "s", "loss", "length", "scale"} or name.startswith("drill_"):
        return False
    return name.startswith("val_") or name in _CAPTION_WORDS or "_R@" in name


_CAPTION_WORDS = {
    "count",
    "colour",
    "shape",
    "pattern",
    "frame",
    "a",
    "b",
    "c",
}  # `captions` evaluates on validation pictures only


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Of a log; none if every stage was lent by another run."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
