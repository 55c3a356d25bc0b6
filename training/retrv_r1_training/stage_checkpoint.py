"""What every stage after `align` leaves behind: a whole checkpoint whose stored memories and embedder are those of the start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open

from retrv_r1_retriever.errors import CheckpointError, explain
from retrv_r1_retriever.model.checkpoint import Checkpoint, Manifest, read_manifest, save_checkpoint
from retrv_r1_training.data_config import DataConfig


def save_stage(
    start: Path,
    out: Path,
    trained: Checkpoint,
    *,
    data: DataConfig | None = None,
    teachers: Mapping[str, str] | None = None,
) -> Manifest:
    """Write `trained` to `out` in the dtype of `start`, with the embedder of `start` as it is and no thresholds: they were
    calibrated on other weights.

    data: its lists, None = as before; teachers: who wrote its thoughts, with licences, added to those before
    Raises `CheckpointError` if a frozen weight moved.
    """
    before = with_list_lengths(trained.manifest, data) if data else trained.manifest
    manifest = replace(before, think_margin=None, none_margin=None, teachers={**before.teachers, **(teachers or {})})
    return save_whole(start, out, replace(trained, manifest=manifest))


def with_list_lengths(before: Manifest, data: DataConfig) -> Manifest:
    """The manifest after a stage on `data`: short lists of a stage before are not forgotten because these are long."""
    shortest = min(before.trained_min_k, data.top_k) if data.min_k is None else data.min_k
    return replace(before, trained_top_k=data.top_k, trained_min_k=shortest)


def save_whole(start: Path, out: Path, trained: Checkpoint) -> Manifest:
    """`trained` in the dtype of `start`, with its embedder. Raises `CheckpointError` if what memory is made of has changed."""
    before = trained.manifest
    saved = save_checkpoint(out, trained.model, trained.processor, before, dtype=stored_dtype(start))
    if saved.memory_digest != before.memory_digest:
        raise CheckpointError(
            explain(f"memory digest of {out}", expected=before.memory_digest, got=saved.memory_digest,
                    fix="Weights that must not move have changed: copy the starting checkpoint again; if it is whole, report this.")
        )  # fmt: skip
    return keep_embedder(start, out, saved)


def keep_embedder(start: Path, out: Path, saved: Manifest) -> Manifest:
    """The starting checkpoint's embedder as it is: vectors on users' disks were made by it. Writes and returns the manifest."""
    before = read_manifest(start)
    if before.embedder_dim:
        shutil.copytree(start / "retrv" / "embedder", out / "retrv" / "embedder", dirs_exist_ok=True)
        saved = replace(saved, embedder_dim=before.embedder_dim, embedder_digest=before.embedder_digest)
    write_manifest(out, saved)
    return saved


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / "retrv" / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def stored_dtype(folder: Path) -> torch.dtype:
    """Of a checkpoint's weights on disk."""
    with safe_open(folder / "retrv" / "icm.safetensors", "pt") as file:
        dtype: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return dtype
