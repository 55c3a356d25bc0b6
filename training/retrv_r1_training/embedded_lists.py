"""First-stage lists without an index: the checkpoint's embedder searches a small pool exactly, all vectors in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.mbeir import Dataset, modality_of
from retrv_r1_retriever.images import ImageSource, load_content
from retrv_r1_retriever.model.checkpoint import read_manifest
from retrv_r1_retriever.model.embedding import BackboneEmbedder
from retrv_r1_retriever.types import Content, Query

_BATCH = 64


class EmbeddedLists:
    """Searches among candidates of the modality that a query's first positive has, as M-BEIR's local pools do."""

    def __init__(
        self, embedder: BackboneEmbedder, data: Dataset, images: ImageSource, depth: int, seed: int = 0
    ) -> None:
        pool = [data.pool[n] for n in range(len(data.pool))]
        judged = [data.query(n, random.Random(f"{seed} {n}")) for n in range(len(data))]
        vectors = _embed(embedder, images, [d.content for d in pool])
        queries = _embed(embedder, images, [j.query for j in judged])
        modalities = np.array([modality_of(d) for d in pool])
        self._lists: dict[str, list[str]] = {}
        for j, vector in zip(judged, queries, strict=True):
            wanted = data.target_modality(j)
            members = np.flatnonzero(modalities == wanted) if wanted else np.arange(len(pool))
            order = np.argsort(-(vectors[members] @ vector), kind="stable")[:depth]
            self._lists[j.id] = [pool[i].id for i in members[order]]

    def ranked(self, qid: str) -> list[str]:
        """Ids, best first; empty for an unknown query."""
        return self._lists.get(qid, [])


def open_embedder(checkpoint: Path) -> BackboneEmbedder:
    if not read_manifest(checkpoint).embedder_dim:
        fix = "Name a run of `retrv-r1-train first-stage` as lists, or train the stage `embedder`."
        raise InputError(
            explain(f"checkpoint {checkpoint}", expected="an embedder inside, where a part of `data` names no lists",
                    got="none", fix=fix)
        )  # fmt: skip
    return BackboneEmbedder.from_pretrained(checkpoint)


def _embed(embedder: BackboneEmbedder, images: ImageSource, items: Sequence[Query | Content]) -> np.ndarray:
    """(n, dim); pictures are decoded a batch at a time."""

    async def decoded(part: Sequence[Query | Content]) -> list[Query | Content]:
        return await asyncio.gather(*(_decoded(images, item) for item in part))

    parts = [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]
    return np.concatenate([embedder.embed(run(decoded(part))) for part in parts])


async def _decoded(images: ImageSource, item: Query | Content) -> Query | Content:
    if isinstance(item, Query):
        return replace(item, content=(await load_content(images, item.content))[0])
    return (await load_content(images, item))[0]
