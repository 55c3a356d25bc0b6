"""A tiny random Retrv-R1, built in process: no hub, no files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from retrv_r1_training.backbone import BackboneSize, build_model, build_processor, build_tokenizer

from retrv_r1_retriever.model.checkpoint import Checkpoint, Manifest, save_checkpoint
from retrv_r1_retriever.model.configuration import IcmConfig
from retrv_r1_retriever.prompt import build_prompt
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query

TEXTS = [
    "which card is red two circle plain thin a4 b7 c1 keep same diff match differs Query: Describe: Check: Candidates:"
]


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    torch.set_num_threads(1)
    size = BackboneSize(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=96, tower_hidden=32, tower_depth=1)
    tokenizer = build_tokenizer(TEXTS)
    model = build_model(tokenizer, size, IcmConfig(width=32, heads=2, memory_rows=8), seed=1).eval()
    with torch.no_grad():  # spread the logits, or every greedy text repeats one token
        model.get_input_embeddings().weight.mul_(8)
        model.model.init_icm()
    manifest = Manifest("tiny-random", memory_digest="m", checkpoint_digest="c")
    return Checkpoint(model, build_processor(tokenizer, size), manifest)


@pytest.fixture(scope="session")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as files."""
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path, checkpoint.model, checkpoint.processor, checkpoint.manifest, dtype=torch.float32)
    return path


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    rng = random.Random(seed)
    return Image.frombytes("RGB", (width, height), bytes(rng.randrange(256) for _ in range(width * height * 3)))


def contents(count: int) -> list[Content]:
    """Text, picture, both; of different lengths."""
    kinds = (
        lambda i: Content(f"two red circle {i}"),
        lambda i: Content(image=picture(i)),
        lambda i: Content("which card " * (i + 1), picture(i, 32, 64)),
    )
    return [kinds[i % 3](i) for i in range(count)]


def make_prompt(engine, query: Query, count: int):
    items = contents(count)
    rows = engine.compress(items)
    candidates = [
        Candidate(Document(str(i), c), 1.0 / (i + 1), i + 1, Memory(r.rows, engine.memory_digest, "", r.full_tokens))
        for i, (c, r) in enumerate(zip(items, rows, strict=True))
    ]
    return build_prompt(query, candidates)
