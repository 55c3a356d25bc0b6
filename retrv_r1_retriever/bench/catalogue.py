"""The demo catalogue behind a checkpoint, as the benches of whole calls use it: its index, its embedder, its engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrv_r1_retriever import config as settings
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.config import Config, ModelConfig
from retrv_r1_retriever.demo import run as demo
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.embedders import Embedder, embed
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.types import Content, Query


@dataclass(frozen=True, slots=True)
class Catalogue:
    folder: Path
    store: EdgeStore
    embedder: Embedder
    engine: LocalEngine
    images: LocalImages


@contextmanager
def opened(folder: Path, checkpoint: str, split: str) -> Iterator[Catalogue]:
    """Written and indexed below `folder` first, if it is not there. checkpoint: "miniature" (the shipped one) or a folder"""
    base = Config(model=ModelConfig(checkpoint=checkpoint))
    demo.prepare(folder, _say, split)
    engine, embedder = settings.open_engine(base), settings.open_embedder(base)
    assert isinstance(engine, LocalEngine)
    config = demo.demo_config(folder, base, engine.versions["checkpoint"], split)
    store = settings.open_store(config, settings.collection_spec(engine, embedder))
    assert isinstance(store, EdgeStore)
    try:
        demo.build_index(config, store, embedder, engine, _say, split)
        yield Catalogue(folder, store, embedder, engine, LocalImages(folder))
    finally:
        run(store.close())
        run(engine.aclose())


class Remembering:
    """An embedder that gives the vectors it gave before: what is measured is not the model."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder, self._known = embedder, dict[str, NDArray[np.float32]]()

    async def embed(self, items: Sequence[Query | Content]) -> NDArray[np.float32]:
        key = repr([item.id if isinstance(item, Query) else item for item in items])
        if key not in self._known:
            self._known[key] = await embed(self._embedder, items)
        return self._known[key]


def _say(what: str, done: int, total: int) -> None:
    if done == total:
        sys.stderr.write(f"{what}: {done}/{total}\n")
