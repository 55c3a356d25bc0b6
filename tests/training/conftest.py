"""A tiny checkpoint with an embedder inside and a small M-BEIR folder, on disk, as `retrv-r1-train sft` finds them."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
import yaml

from retrv_r1_retriever.model.checkpoint import save_checkpoint
from tests.tiny import checkpoint
from tests.training.parts import data_block, small_catalogue

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
