"""From the index to the answer over the real server: our retriever, our service, and a framework's adapter, all of one mind."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from pathlib import Path

import httpx
import pytest
from langchain_retrv_r1 import RetrvR1Retriever as LangChainRetriever
from PIL import Image

from retrv_r1_retriever import Content, Document, EdgeStore, Indexer, LocalImages, Query, RankedResults
from retrv_r1_retriever import RetrvR1Retriever as CoreRetriever
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.config import collection_spec, open_retriever, read_config
from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.engines.vllm import VllmEngine
from retrv_r1_retriever.model.embedding import BackboneEmbedder
from retrv_r1_retriever.types import Status
from tests.serving.test_miniature import serving
from tests.vllm.server import MODEL, Running

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

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


@pytest.fixture(scope="module")
def shop(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cards with a text and pictures in an index, made without the backbone, and the config beside it."""
    folder = tmp_path_factory.mktemp("shop")
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
    return folder


def queries() -> list[Query]:
    return [
        Query.of(CARDS[3].text, instruction=catalogue.TASKS["t2i"]),
        Query.of(CARDS[8].text, catalogue.render(CARDS[9], random.Random(77)), catalogue.TASKS["cir"]),
    ]


def order(results: RankedResults) -> list[str]:
    return [r.document.id for r in results]


async def test_retriever_service_and_adapter_agree_with_the_local_engine(shop: Path, local: LocalEngine) -> None:
    config = read_config(shop / "retrv.toml")
    retriever = open_retriever(config)
    assert isinstance(retriever, CoreRetriever)
    same = CoreRetriever(
        first_stage=retriever.first_stage, engine=local, images=retriever.images, options=config.rerank
    )
    wanted = []
    try:
        adapter = LangChainRetriever(base=retriever, k=5)
        for query in queries():
            want, got = await same.aretrieve(query), await retriever.aretrieve(query)
            wanted.append(want)
            assert (got.status, order(got)) == (want.status, order(want))
            assert want.status is not Status.FALLBACK, want.reason
            assert want.trace is not None
            assert got.trace is not None
            assert got.trace.inspected == want.trace.inspected
            assert got.trace.versions["engine"] == "vllm"
        assert any(want.trace and want.trace.inspected for want in wanted), "an inspection was part of it"
        plain = Query.of(queries()[0].content.text or "")
        documents = await adapter.ainvoke(plain.content.text or "")
        direct = await retriever.aretrieve(plain)
        assert [d.id for d in documents] == order(direct)[:5]
    finally:
        await retriever.aclose()
    with serving(shop) as served:
        async with httpx.AsyncClient(base_url=served.url, timeout=200) as client:
            for query, want in zip(queries(), wanted, strict=True):
                body = {"query": as_json(query), "return_trace": True}
                answer = (await client.post("/v1/search", json=body)).json()
                assert [r["id"] for r in answer["results"]] == order(want)
                assert answer["status"] == want.status.value
                assert answer["trace"]["versions"]["engine"] == "vllm"


async def test_sixty_four_searches_at_once(shop: Path) -> None:
    texts = [f"{CARDS[i % 20].text} {i}" for i in range(64)]
    with serving(shop) as served:
        async with httpx.AsyncClient(base_url=served.url, timeout=500) as client:

            async def search(text: str) -> tuple[float, httpx.Response]:
                started, body = time.perf_counter(), {"query": text, "options": {"max_new_tokens": 24}}
                answer = await client.post("/v1/search", json=body)
                return time.perf_counter() - started, answer

            answers = await asyncio.gather(*map(search, texts))
    seconds = sorted(took for took, _ in answers)
    print(f"64 searches at once: median {seconds[32]:.1f} s, p95 {seconds[60]:.1f} s")
    assert {answer.status_code for _, answer in answers} == {200}
    assert [answer.json()["reason"] for _, answer in answers if answer.json()["status"] == "fallback"] == []


def as_json(query: Query) -> dict[str, object]:
    image = query.content.image
    assert image is None or isinstance(image, Image.Image)
    shown = {} if image is None else {"image": _base64(image)}
    return {"text": query.content.text, "instruction": query.instruction, **shown}


def _base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
