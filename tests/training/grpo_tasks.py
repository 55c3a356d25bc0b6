"""A few lists of catalogue cards for the shipped miniature: it writes thoughts with inspections, which no random model does."""

from __future__ import annotations

import random

from retrv_r1_training.rollout import Task

from retrv_r1_retriever.config import Config, checkpoint_path
from retrv_r1_retriever.demo.catalogue import SPLITS, TASKS, make_cards, render
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.model.checkpoint import Checkpoint, load_checkpoint
from retrv_r1_retriever.prompt import build_prompt
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query


def miniature() -> Checkpoint:
    return load_checkpoint(checkpoint_path(Config()), device="cpu", dtype="float32")


def make_tasks(checkpoint: Checkpoint, count: int = 4, top_k: int = 6) -> list[Task]:
    """Text queries with a code over pictures: three siblings that differ in the code, and others."""
    rng = random.Random(0)
    cards = [card for card, stratum in make_cards(SPLITS["val"]) if stratum == "fine"]
    engine = LocalEngine(checkpoint)
    tasks = []
    for number in range(count):
        start = 3 * number
        shown = cards[start : start + 3] + cards[30 + start : 30 + start + top_k - 3]
        contents = [Content(image=engine.encode_picture(render(card, rng))) for card in shown]
        memories = [Memory(r.rows, "", "", r.full_tokens) for r in engine.compress(contents)]
        candidates = [
            Candidate(Document(f"{number}-{i}", c), None, i + 1, m)
            for i, (c, m) in enumerate(zip(contents, memories, strict=True))
        ]
        query = Query.of(shown[1].text, None, TASKS["t2i"], f"q{number}")
        tasks.append(Task(f"q{number}", "fine", build_prompt(query, candidates), (1,)))
    return tasks
