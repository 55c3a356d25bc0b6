"""From the index to the answer over the real server: our retriever, our service, a framework's adapter and other people's clients."""

from __future__ import annotations

import json
from pathlib import Path

import cohere
import httpx
import pytest
from langchain_retrv_r1 import RetrvR1Retriever as LangChainRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank

from retrv_r1_retriever import Query
from retrv_r1_retriever import RetrvR1Retriever as CoreRetriever
from retrv_r1_retriever.cli.app import main
from retrv_r1_retriever.config import open_retriever, read_config
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.types import Status
from tests.serving.test_miniature import serving
from tests.vllm.shop import CARDS, as_json, order, queries

pytestmark = pytest.mark.vllm

TEXTS = [card.text for card in CARDS[:10]]


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


def test_clients_for_other_rerankers_reach_the_server(shop: Path) -> None:
    """Texts that come with the call: compressed in `serve`, without the backbone, judged by vLLM."""
    with serving(shop) as served:
        body = {"query": TEXTS[3], "documents": TEXTS, "return_trace": True}
        answer = httpx.post(f"{served.url}/v1/rerank", json=body, timeout=200).json()
        places = [r["index"] for r in answer["results"]]
        client = cohere.ClientV2(api_key="any", base_url=served.url, timeout=200)
        found = client.rerank(model="retrv-r1", query=TEXTS[3], documents=TEXTS, top_n=4)
        stock = CohereRerank(model="retrv-r1", api_key="any", base_url=served.url, top_n=5, max_retries=1)
        nodes = [NodeWithScore(node=TextNode(id_=str(i), text=text), score=0.1) for i, text in enumerate(TEXTS)]
        kept = stock.postprocess_nodes(nodes, query_bundle=QueryBundle(TEXTS[3]))
    assert answer["status"] in ("reranked", "partial"), answer["reason"]
    assert answer["trace"]["versions"]["engine"] == "vllm"
    assert sorted(places) == list(range(10))
    assert [r.index for r in found.results] == places[:4]
    assert [int(n.node.node_id) for n in kept] == places[:5]
    assert [n.score for n in kept] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])


def test_doctor_finds_nothing_to_change(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--config", str(shop / "retrv.toml"), "--json"])
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["engine"]["detail"].endswith("4,096 tokens")
    assert {found[name]["level"] for name in ("engine", "model server", "prefix cache", "memory")} == {"ok"}
    assert code == 0
