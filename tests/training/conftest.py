"""A tiny checkpoint with an embedder inside and a small M-BEIR folder, on disk, as `retrv-r1-train sft` finds them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from retrv_r1_retriever.model.checkpoint import save_checkpoint
from tests.tiny import checkpoint
from tests.training.parts import data_block, small_catalogue, stage_part

__all__ = ["checkpoint", "material"]


@pytest.fixture(scope="session")
def material(checkpoint, tmp_path_factory):
    """A folder with `start` (checkpoint), `catalogue` and `recipe.yaml`: lists of 3, batches of 4, two steps."""
    root = tmp_path_factory.mktemp("sft")
    manifest = replace(checkpoint.manifest, embedder_dim=4, icm=asdict(checkpoint.model.config.icm_config))
    save_checkpoint(root / "start", checkpoint.model, checkpoint.processor, manifest, checkpoint.model, torch.float16)
    small_catalogue(root / "catalogue")
    recipe = {
        "checkpoint": str(root / "start"), "data": data_block(root / "catalogue", 3),
        "lora": {"rank": 4, "alpha": 8},
        "optim": {"steps": 2, "batch_size": 4, "per_device": 4, "lr": 0.003},
        "run": {"dtype": "float32", "every": 1, "save": 100, "checkpointing": False, "report_to": []},
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="session")
def recipes(material, tmp_path_factory):
    """Recipes of all three stages on the catalogue's files; the first stage's lists are the pool in its order."""
    folder, out = material / "catalogue", tmp_path_factory.mktemp("recipes")
    parts = {split: [stage_part(split, task) for task in ("t2i", "i2t", "cir")] for split in ("train0", "val")}
    for entry in (entry for entries in parts.values() for entry in entries):
        ids = [json.loads(line)["did"] for line in (folder / entry["pool"]).read_text().splitlines()]
        queries = [json.loads(line)["qid"] for line in (folder / entry["queries"]).read_text().splitlines()]
        lines = [f"{q} Q0 {did} {n} {-n} x\n" for q in queries for n, did in enumerate(ids, 1)]
        entry["lists"] = str(folder / entry["lists"])
        Path(entry["lists"]).write_text("".join(lines))
    wordless = {split: [{**entry, "pool": f"plain_{split}.jsonl"} for entry in parts[split]] for split in parts}
    for split in parts:
        rows = [json.loads(line) for line in (folder / parts[split][0]["pool"]).read_text().splitlines()]
        lines = [json.dumps({k: v for k, v in row.items() if k != "src_content"}) + "\n" for row in rows]
        (folder / f"plain_{split}.jsonl").write_text("".join(lines))
    common = {
        "data": {"root": str(folder), "train": parts["train0"], "validation": parts["val"], "validation_queries": 4, "top_k": 3},
        "optim": {"steps": 4, "batch_size": 4, "per_device": 2, "lr": 0.003},
        "run": {"dtype": "float32", "every": 1, "save": 2, "evaluate": 2, "checkpointing": False, "report_to": ["tensorboard"]},
    }  # fmt: skip
    start = {"start": {"path": str(material / "start")}}
    kinds = {
        "embedder": {**start, "temperature": 0.1, "dim": 8, "pool": 12, "lora": {"rank": 4, "alpha": 8}},
        "align": {**start, "described": 2, "tokens": 6},
        "base": {"vocab": 600, "backbone": {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 96,
                                            "tower_hidden": 32, "tower_depth": 1}, "icm": {"width": 32, "heads": 2}},
    }  # fmt: skip
    kinds["align"]["data"] = {**common["data"], "train": wordless["train0"], "validation": wordless["val"]}
    for name, kind in kinds.items():
        (out / f"{name}.yaml").write_text(yaml.safe_dump({**common, **kind}))
    return out
