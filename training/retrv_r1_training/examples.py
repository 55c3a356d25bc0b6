"""Where the examples of `sft` come from: any sequence of `Example`. Today the catalogue with the teacher that needs no model.

A source is indexed by number and says the same every time, so that a resumed run sees what an uninterrupted one sees, and processes
share the work without talking. Under ZeRO-3 its pictures must be encoded ahead (`EncodedImage`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.model.checkpoint import Checkpoint, load_embedder_checkpoint
from retrv_r1_retriever.model.processing import Processor
from retrv_r1_training.data import Pool, encode_pool, load_pool
from retrv_r1_training.embedder import first_stage_lists
from retrv_r1_training.lists import ListConfig, Lists, make_lists
from retrv_r1_training.sft import Example, make_example
from retrv_r1_training.sft_recipe import SftRecipe
from retrv_r1_training.teacher import TeacherStyle


class Source(Protocol):
    """A sequence of examples; `source[number]` is the same each time."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Example: ...


class DrawnExamples:
    """`count` examples drawn from lists: query, list, labels and thought of number n depend on (seed, n) alone."""

    def __init__(
        self, processor: Processor, lists: Sequence[Lists], config: ListConfig, style: TeacherStyle, count: int, seed: int,
        direct_share: float = 1.0,
    ) -> None:  # fmt: skip
        self._make = lambda part, query, rng: make_example(processor, part, query, config, style, rng)
        self._lists, self._count, self._seed, self._direct_share = lists, count, seed, direct_share

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Example:
        if not 0 <= number < self._count:
            raise IndexError(number)
        rng = random.Random(f"{self._seed}:{number}")
        part = rng.choice(self._lists)
        example = self._make(part, rng.randrange(len(part.pool.queries)), rng)
        return replace(example, direct=rng.random() < self._direct_share)


def catalogue_examples(recipe: SftRecipe, start: Checkpoint) -> tuple[Source, Source]:
    """Training and validation examples of the recipe's folder; lists come from the checkpoint's own embedder."""
    data, top_k = recipe.data, recipe.lists.top_k
    *train, held_out = _lists(recipe, start, (*data.train, data.held_out))
    count = recipe.optim.steps * recipe.optim.batch_size
    drawn = DrawnExamples(
        start.processor, train, recipe.lists, recipe.teacher, count, recipe.seed, recipe.data.direct_share
    )
    served = ListConfig.as_served(top_k)
    return drawn, DrawnExamples(start.processor, [held_out], served, recipe.teacher, data.examples, recipe.seed)


def _lists(recipe: SftRecipe, start: Checkpoint, splits: Sequence[str]) -> list[Lists]:
    if not start.manifest.embedder_dim:
        raise InputError(
            explain(f"checkpoint {recipe.checkpoint}", expected="an embedder inside, which makes the candidate lists",
                    got="none", fix="Run the stage `embedder` first.")
        )  # fmt: skip
    embedder = load_embedder_checkpoint(recipe.checkpoint)
    model, out = start.model.eval(), []
    with torch.no_grad():
        for split in splits:
            raw = _pool(Path(recipe.data.folder), split)
            own = encode_pool(embedder.model.model, start.processor, raw)
            ranked = first_stage_lists(
                embedder.model, start.processor, own, start.manifest.embedder_dim, recipe.lists.top_k
            )
            pool = encode_pool(model.model, start.processor, raw)
            out.append(make_lists(model, start.processor, pool, ranked))
    return out


def _pool(folder: Path, split: str) -> Pool:
    try:
        return load_pool(folder, split)
    except FileNotFoundError as error:
        raise InputError(
            explain(f"data.folder {folder}", expected=f"M-BEIR files of the split {split!r}", got=f"no {error.filename}",
                    fix="Fix data.folder or the split's name.")
        ) from error  # fmt: skip
