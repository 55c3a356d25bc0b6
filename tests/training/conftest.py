"""A tiny checkpoint with an embedder inside and a small catalogue, on disk, as `retrv-r1-train sft` finds them."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
import yaml

from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.model.checkpoint import save_checkpoint
from tests.tiny import checkpoint

__all__ = ["checkpoint", "material"]


@pytest.fixture(scope="session")
def material(checkpoint, tmp_path_factory):
    """A folder with `start` (checkpoint), `catalogue` and `recipe.yaml`: lists of 3, batches of 4, two steps."""
    root = tmp_path_factory.mktemp("sft")
    manifest = replace(checkpoint.manifest, embedder_dim=4, icm=asdict(checkpoint.model.config.icm_config))
    save_checkpoint(root / "start", checkpoint.model, checkpoint.processor, manifest, checkpoint.model, torch.float16)
    few = catalogue.combos("val")[:12]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            catalogue, "SPLITS", {n: catalogue.Split(n, "val", s.seed, 3) for n, s in catalogue.SPLITS.items()}
        )
        patch.setattr(catalogue, "combos", lambda part: few)
        catalogue.write_catalogue(root / "catalogue", ("train0", "val"))
    recipe = {
        "checkpoint": str(root / "start"), "data": {"folder": str(root / "catalogue"), "train": ["train0"], "examples": 0},
        "lists": {"top_k": 3}, "lora": {"rank": 4, "alpha": 8},
        "optim": {"steps": 2, "batch_size": 4, "per_device": 4, "lr": 0.003},
        "run": {"dtype": "float32", "every": 1, "save": 100, "checkpointing": False, "report_to": []},
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root
