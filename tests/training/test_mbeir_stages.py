"""`base`, `embedder` and `align` on any M-BEIR folder: right gradients, bounded batches, resumable, frozen things stay frozen."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
import yaml
from retrv_r1_training import train_align, train_base, train_embedder
from retrv_r1_training.cli import main
from retrv_r1_training.data import Item
from retrv_r1_training.draws import Contrasted, Contrasts, Draws, Opened, Unusable
from retrv_r1_training.stage_recipe import Part, StageData

from retrv_r1_retriever.errors import ImageError, InputError
from retrv_r1_retriever.model.checkpoint import load_checkpoint, load_embedder_checkpoint, read_manifest
from retrv_r1_retriever.model.embedding import embed_chunks, embedding_chunk
from retrv_r1_retriever.types import Query
from tests.tiny import contents

POOL = "cand_pool/local/mbeir_cards_train0_cand_pool.jsonl"


def stage(name, recipe, run, *sets):
    overrides = [part for text in sets for part in ("--set", text)]
    return main([name, str(recipe), "--run", str(run), "--threads", "1", *overrides])


def logged(run, key="loss"):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def part(split, task):
    name = f"mbeir_cards_{task}_{split}"
    return {
        "queries": f"query/{split}/{name}.jsonl", "pool": f"cand_pool/local/mbeir_cards_{split}_cand_pool.jsonl",
        "qrels": f"qrels/{split}/{name}_qrels.txt", "first_stage": f"{name}_run.txt",
    }  # fmt: skip


@pytest.fixture(scope="session")
def recipes(material, tmp_path_factory):
    """Recipes of all three stages on the catalogue's files; the first stage's lists are the pool in its order."""
    folder, out = material / "catalogue", tmp_path_factory.mktemp("recipes")
    parts = {split: [part(split, task) for task in ("t2i", "i2t", "cir")] for split in ("train0", "val")}
    for entry in (entry for entries in parts.values() for entry in entries):
        ids = [json.loads(line)["did"] for line in (folder / entry["pool"]).read_text().splitlines()]
        queries = [json.loads(line)["qid"] for line in (folder / entry["queries"]).read_text().splitlines()]
        lines = [f"{q} Q0 {did} {n} {-n} x\n" for q in queries for n, did in enumerate(ids, 1)]
        (folder / entry["first_stage"]).write_text("".join(lines))
    common = {
        "data": {"folder": str(folder), "train": parts["train0"], "held_out": parts["val"], "examples": 4},
        "optim": {"steps": 4, "batch_size": 4, "per_device": 2, "lr": 0.003},
        "run": {"dtype": "float32", "every": 1, "save": 2, "evaluate": 2, "checkpointing": False, "report_to": ["tensorboard"]},
    }  # fmt: skip
    start = {"start": {"path": str(material / "start")}}
    kinds = {
        "embedder": {**start, "temperature": 0.1, "dim": 8, "pool": 12, "lora": {"rank": 4, "alpha": 8}},
        "align": {**start, "top_k": 4, "described": 2, "tokens": 6},
        "base": {"vocab": 600, "backbone": {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 96,
                                            "tower_hidden": 32, "tower_depth": 1}, "icm": {"width": 32, "heads": 2}},
    }  # fmt: skip
    for name, kind in kinds.items():
        (out / f"{name}.yaml").write_text(yaml.safe_dump({**common, **kind}))
    return out


@pytest.fixture(scope="session", params=["embedder", "align", "base"])
def done(request, recipes, tmp_path_factory):
    """Each stage's finished run of four steps, with states after the second and the fourth."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    assert stage(request.param, recipes / f"{request.param}.yaml", run) == 0
    return request.param, run


def test_a_run_leaves_logs_figures_and_a_checkpoint_that_loads(done):
    name, run = done
    assert len(logged(run)) == 4
    assert len(set(logged(run))) == 4
    figures = {"embedder": "eval_recall@5", "align": "eval_relation", "base": "eval_words"}
    assert len(logged(run, figures[name])) == 2
    assert {json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()} == {name}
    assert list(run.rglob("events.out.tfevents.*"))
    load_checkpoint(run / "checkpoint", device="cpu")


def test_a_resumed_run_is_the_uninterrupted_one(done, recipes, tmp_path):
    name, whole = done
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint")
    assert stage(name, recipes / f"{name}.yaml", run) == 0
    assert logged(run) == logged(whole)
    assert len(logged(run)) == 4
    digests = [read_manifest(folder / "checkpoint") for folder in (run, whole)]
    assert digests[0] == digests[1]
