"""Cards in an index behind the real server: what the tests of the whole loop search in."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path

from PIL import Image

from retrv_r1_retriever import Content, Document, EdgeStore, Indexer, LocalImages, Query, RankedResults
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.config import collection_spec, read_config
from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.engines.vllm import VllmEngine
from retrv_r1_retriever.model.embedding import BackboneEmbedder
from tests.vllm.server import MODEL, Running

CARDS = [card for card, _ in catalogue.make_cards(catalogue.SPLITS["val"])[:20]]
CONFIG = """
[engine]
kind = "vllm"
base_url = "{url}"
model = "{model}"
[images]
root = "cards"
[rerank]
top_k = 20
think = "always"
max_new_tokens = 160
timeout_s = 100.0
on_stale = "raise"
"""


def make_shop(folder: Path, server: Running) -> None:
    """Cards as pictures in an index, made without the backbone, and the config beside it."""
    (folder / "cards").mkdir()
    for i, card in enumerate(CARDS):
        catalogue.render(card, random.Random(i)).save(folder / "cards" / f"{i}.png")
    (folder / "retrv.toml").write_text(CONFIG.format(url=server.base_url, model=MODEL))
    compressor = VllmEngine(server.checkpoint, base_url=server.base_url, model=MODEL, check=False)
    embedder = BackboneEmbedder.from_pretrained(server.checkpoint)
    config = read_config(folder / "retrv.toml")
    store = EdgeStore(config.path(config.store.path), spec=collection_spec(compressor, embedder))
    documents = [Document(str(i), Content(image=f"{i}.png")) for i in range(len(CARDS))]
    indexer = Indexer(store, embedder, compressor, LocalImages(folder / "cards"))
    assert indexer.index(documents).indexed == len(CARDS)
    run(store.close())


def queries() -> list[Query]:
    return [
        Query.of(CARDS[3].text, instruction=catalogue.TASKS["t2i"]),
        Query.of(CARDS[8].text, catalogue.render(CARDS[9], random.Random(77)), catalogue.TASKS["cir"]),
    ]


def order(results: RankedResults) -> list[str]:
    return [r.document.id for r in results]


def as_json(query: Query) -> dict[str, object]:
    image = query.content.image
    assert image is None or isinstance(image, Image.Image)
    shown = {} if image is None else {"image": _base64(image)}
    return {"text": query.content.text, "instruction": query.instruction, **shown}


def _base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
