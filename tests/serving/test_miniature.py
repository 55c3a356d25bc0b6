"""`retrv-r1 serve` as users start it, on the shipped miniature: other people's clients, stopping, load. No torch in this process."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cohere
import httpx
import pytest
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank

from retrv_r1_retriever import RemoteReranker
from retrv_r1_retriever.demo import catalogue
from retrv_r1_retriever.types import Content, Document

CARDS = [card for card, stratum in catalogue.make_cards(catalogue.SPLITS["test"])[:24]]
TEXTS = [card.text for card in CARDS]
KEYS = {"KEY_OF_ALPHA": "alpha-secret", "KEY_OF_BETA": "beta-secret"}
CONFIG = """
[store]
path = "index"
[images]
root = "cards"
[rerank]
top_k = 20
max_new_tokens = 160
timeout_s = 100.0
[serve]
tenant_field = "shop"
[serve.tenants]
alpha = "KEY_OF_ALPHA"
beta = "KEY_OF_BETA"
"""
INDEX = """
import json, sys
from retrv_r1_retriever import Content, Document, Indexer
from retrv_r1_retriever import config as settings
config = settings.read_config("retrv.toml")
engine, embedder = settings.open_engine(config), settings.open_embedder(config)
store, images = settings.open_store(config, settings.collection_spec(engine, embedder)), settings.open_images(config)
for tenant, rows in json.load(sys.stdin).items():
    documents = [Document(str(i), Content(**row)) for i, row in enumerate(rows)]
    report = Indexer(store.for_tenant("shop", tenant), embedder, engine, images).index(documents)
    assert report.indexed == len(rows), report
"""
COMMAND = [sys.executable, "-m", "retrv_r1_retriever.cli"]


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Server]:
    log = folder / f"log-{random.random()}"
    environment = {**os.environ, **KEYS, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        command = [*COMMAND, "serve", "--port", "0", *arguments]
        process = subprocess.Popen(command, cwd=folder, stderr=file, env=environment, text=True)
    try:
        until = time.monotonic() + 300
        while not (found := re.search(r"running on (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.1)
        yield Server(found[1], process, log)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """alpha: the cards as pictures, beta: the same ids with another card's text; one index, open nowhere."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "cards").mkdir()
    for i, card in enumerate(CARDS):
        catalogue.render(card, random.Random(i)).save(folder / "cards" / f"{i}.png")
    alpha = [{"image": f"{i}.png"} for i in range(len(CARDS))]
    beta = [{"text": text} for text in TEXTS[::-1]]
    (folder / "retrv.toml").write_text(CONFIG)
    rows = json.dumps({"alpha": alpha, "beta": beta})
    subprocess.run([sys.executable, "-c", INDEX], cwd=folder, input=rows, text=True, check=True, capture_output=True)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "shop")


@pytest.fixture(scope="module")
def server(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(shutil.copytree(pristine, tmp_path_factory.mktemp("served") / "shop")) as server:
        yield server


def http(server: Server, key: str = "alpha-secret") -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=200, headers={"authorization": f"Bearer {key}"})


def test_the_cohere_client(server: Server) -> None:
    documents = [Document(str(i), Content(text)) for i, text in enumerate(TEXTS[:10])]
    expected = RemoteReranker(server.url, api_key="alpha-secret").rerank(TEXTS[3], documents)
    order = [int(r.document.id) for r in expected]
    for made in (cohere.ClientV2, cohere.Client):
        client = made(api_key="alpha-secret", base_url=server.url, timeout=200)
        answer = client.rerank(model="retrv-r1", query=TEXTS[3], documents=TEXTS[:10], top_n=4)
        assert [r.index for r in answer.results] == order[:4]
        assert [r.relevance_score for r in answer.results] == [1.0, 0.9, 0.8, 0.7]
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2(api_key="wrong", base_url=server.url).rerank(model="retrv-r1", query="q", documents=["a"])
    with pytest.raises(cohere.UnprocessableEntityError, match="expected 'retrv-r1', got 'rerank-v4'"):
        client.rerank(model="rerank-v4", query="q", documents=["a"])


def test_rerankers_that_llama_index_has_already(server: Server) -> None:
    nodes = [NodeWithScore(node=TextNode(id_=str(i), text=text), score=0.1) for i, text in enumerate(TEXTS[:10])]
    with http(server) as client:
        answer = client.post("/v1/rerank", json={"query": TEXTS[3], "documents": TEXTS[:10]}).json()
    order = [str(r["index"]) for r in answer["results"]]
    for reranker in (
        CohereRerank(model="retrv-r1", api_key="alpha-secret", base_url=server.url, top_n=5, max_retries=1),
        JinaRerank(model="retrv-r1", api_key="alpha-secret", base_url=f"{server.url}/v1", top_n=5),
    ):
        made = reranker.postprocess_nodes(nodes, query_bundle=QueryBundle(TEXTS[3]))
        assert [n.node.node_id for n in made] == order[:5]
        assert [n.score for n in made] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])


def test_search_reads_pictures_and_stored_memory_per_tenant(server: Server) -> None:
    body = {
        "query": {"text": TEXTS[5], "instruction": catalogue.TASKS["t2i"]},
        "return_trace": True,
        "options": {"on_stale": "raise"},
    }
    with http(server) as alpha, http(server, "beta-secret") as beta:
        found, others = alpha.post("/v1/search", json=body).json(), beta.post("/v1/search", json=body).json()
        named = {
            "query": TEXTS[5],
            "documents": [{"id": "5"}, {"id": "6"}],
            "return_documents": True,
            "options": {"on_stale": "raise"},
        }
        reranked = alpha.post("/v1/rerank", json=named).json()
        assert beta.post("/v1/rerank", json=named).json()["results"][0]["document"]["text"] in TEXTS
    for answer in (found, others):
        assert len(answer["results"]) == 20
        assert answer["status"] in ("reranked", "partial")
        assert answer["trace"]["versions"]["engine"] == "local"
    assert {r["document"]["metadata"]["shop"] for r in found["results"]} == {"alpha"}
    assert all(re.fullmatch(r"\d+\.png", r["document"]["image"]) for r in found["results"])
    assert {r["document"]["metadata"]["shop"] for r in others["results"]} == {"beta"}
    assert {r["document"]["image"] for r in reranked["results"]} == {"5.png", "6.png"}


def test_pictures_travel_with_the_call(server: Server) -> None:
    def encoded(i: int) -> str:
        buffer = io.BytesIO()
        catalogue.render(CARDS[i], random.Random(i)).save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    documents = [{"image": encoded(i)} for i in range(3)] + [{"text": TEXTS[3], "image": encoded(3)}]
    with http(server) as client:
        answer = client.post("/v1/rerank", json={"query": {"image": encoded(4)}, "documents": documents}).json()
    assert sorted(r["index"] for r in answer["results"]) == [0, 1, 2, 3]
    assert answer["status"] in ("reranked", "partial")
    assert answer["usage"]["uncompressed_tokens"] > answer["usage"]["prompt_tokens"]


def test_sigterm_lets_calls_end(folder: Path) -> None:
    with serving(folder) as second, http(second) as client:
        client.get("/readyz").raise_for_status()
        rambling = {"think": "always", "temperature": 2.0, "max_new_tokens": 1000}  # seconds long: it has to be seen
        body = {"query": TEXTS[0], "options": rambling}
        call = subprocess.Popen(
            [sys.executable, "-c", "import httpx, json, sys; a = json.loads(sys.argv[1]); "
             "print(httpx.post(a['url'], json=a['body'], headers=a['headers'], timeout=200).status_code)",
             json.dumps({"url": f"{second.url}/v1/search", "body": body, "headers": {"x-api-key": "alpha-secret"}})],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        while "retrv_running 1.0" not in client.get("/metrics").text:
            assert call.poll() is None, "the call was over before it was seen; ask for a longer one"
        second.process.send_signal(signal.SIGTERM)
        assert call.communicate(timeout=200)[0].strip() == "200"
        second.process.wait(60)
        assert "route=search code=200" in second.log.read_text()
        assert "Traceback" not in second.log.read_text()
        index = subprocess.run([*COMMAND, "doctor", "--json"], cwd=folder, capture_output=True, text=True, check=False)
        assert "locked" not in index.stdout


def test_rerank_only_and_what_keeps_it_from_starting(tmp_path: Path, folder: Path) -> None:
    def start(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:  # variables
        return subprocess.run(
            [*COMMAND, "serve", *arguments], cwd=folder, capture_output=True, text=True, env={**os.environ, **environment}, check=False
        )  # fmt: skip

    no_key, no_index = start(folder, KEY_OF_ALPHA="x"), start(tmp_path)
    assert (no_key.returncode, "environment variable KEY_OF_BETA" in no_key.stderr) == (2, True)
    assert (no_index.returncode, "expected an index" in no_index.stderr) == (2, True)
    with serving(tmp_path, "--rerank-only") as server:
        answer = httpx.post(f"{server.url}/v1/rerank", json={"query": TEXTS[0], "documents": TEXTS[:3]}, timeout=200)
        assert answer.json()["status"] in ("reranked", "partial")
        assert httpx.post(f"{server.url}/v1/search", json={"query": "q"}).status_code == 422
        taken = start(tmp_path, "--rerank-only", "--port", server.url.rpartition(":")[2])
    assert (taken.returncode, "expected a free port" in taken.stderr) == (2, True)
    assert "Traceback" not in no_key.stderr + no_index.stderr + taken.stderr


@pytest.mark.slow
def test_schemathesis_finds_no_5xx(folder: Path) -> None:
    """Whatever OpenAPI allows, and what it does not. A deadline that a caller sets too short is 504 by intent."""
    with serving(folder) as server, http(server) as client:
        document = client.get("/openapi.json").json()
        for name in ("RerankRequest", "SearchRequest"):  # or nearly every call ends at the model's name
            document["components"]["schemas"][name]["properties"]["model"] = {"enum": [None, "retrv-r1"]}
        document["components"]["schemas"]["OptionsIn"]["properties"]["timeout_s"] |= {"minimum": 90, "maximum": 120}
        (folder / "openapi.json").write_text(json.dumps(document))
        command = [
            str(Path(sys.executable).with_name("schemathesis")), "run", "openapi.json", "--url", server.url, "--checks",
            "not_a_server_error", "--max-examples", "60", "--header", "Authorization: Bearer alpha-secret", "--request-timeout", "200",
            "--suppress-health-check", "all", "--no-color",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        codes = set(re.findall(r'retrv_calls_total{code="(\d+)"', client.get("/metrics").text))
        answered = re.search(r'retrv_results_total{[^}]*route="search"', client.get("/metrics").text)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-6000:]
    assert answered
    assert not {code for code in codes if code >= "500"}


@dataclass
class Load:
    seconds: list[float] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)


async def load(server: Server, total: int, at_once: int, body: dict[str, object]) -> Load:
    measured, left = Load(), iter(range(total))
    limits = httpx.Limits(max_connections=at_once)
    headers = {"authorization": "Bearer alpha-secret"}

    async def worker(client: httpx.AsyncClient) -> None:
        for i in left:
            started = time.monotonic()
            answer = await client.post("/v1/search", json={**body, "query": TEXTS[i % len(TEXTS)]})
            measured.seconds.append(time.monotonic() - started)
            measured.codes[answer.status_code] = measured.codes.get(answer.status_code, 0) + 1

    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits, headers=headers) as client:
        await asyncio.gather(*(worker(client) for _ in range(at_once)))
    return measured


@pytest.mark.slow
async def test_64_at_a_time_and_memory_flat_over_2000(folder: Path) -> None:
    with serving(folder) as server:
        thinking = await load(server, 64, 64, {"options": {"think": "always"}})
        assert thinking.codes == {200: 64}
        direct: dict[str, object] = {"options": {"think": "never"}, "top_n": 5}
        await load(server, 300, 64, direct)
        before = server.resident_mb()
        measured = await load(server, 2000, 64, direct)
        after = server.resident_mb()
        flooded = await load(server, 300, 150, direct)
        assert (await load(server, 20, 4, direct)).codes == {200: 20}
    p95 = statistics.quantiles(measured.seconds, n=20)[-1]
    print(
        f"p50 {statistics.median(measured.seconds):.3f} s, p95 {p95:.3f} s; {before:.0f} -> {after:.0f} MB; flood {flooded.codes}"
    )
    assert measured.codes == {200: 2000}
    assert set(flooded.codes) == {200, 429}
    assert after < before * 1.1 + 20
