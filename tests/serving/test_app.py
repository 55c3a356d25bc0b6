"""The HTTP interface: shapes, limits, errors, tenants, and what is counted and logged."""

from __future__ import annotations

import base64
import json
import logging
import re
from dataclasses import dataclass
from typing import Any

import pytest

from retrv_r1_retriever import EngineError, OptionsError, RerankOptions
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.parser import Thought
from retrv_r1_retriever.serving.answers import header_text
from retrv_r1_retriever.serving.settings import ServeConfig
from tests.helpers import png
from tests.serving.conftest import FALLING, OPTIONS, RISING, MakeApp, client, limits

PNG = base64.b64encode(png()).decode()
THREE = ["first", "second", "third"]
KEYS: dict[str, str | None] = {"key-a": "alpha", "key-b": "beta"}


def indices(answer: dict[str, Any]) -> list[int]:
    return [result["index"] for result in answer["results"]]


# -- rerank


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_results_are_ranked_and_name_the_place_in_the_input(make_app: MakeApp, path: str) -> None:
    async with client(make_app(RISING)) as http:
        response = await http.post(path, json={"query": "q", "documents": THREE, "return_documents": True})
    answer = response.json()
    assert response.status_code == 200
    assert indices(answer) == [2, 1, 0]
    assert [r["document"]["text"] for r in answer["results"]] == THREE[::-1]
    assert [r["relevance_score"] for r in answer["results"]] == pytest.approx([1, 2 / 3, 1 / 3])
    assert (answer["status"], answer["reason"], response.headers["x-retrv-status"]) == ("reranked", None, "reranked")
    assert answer["results"][0]["selected"]
    assert answer["results"][0]["id"] is None


async def test_top_n_cuts_after_ranking(make_app: MakeApp) -> None:
    async with client(make_app(RISING)) as http:
        answer = (await http.post("/v1/rerank", json={"query": "q", "documents": THREE, "top_n": 1})).json()
    assert indices(answer) == [2]


@dataclass
class Seen:
    """What the model was given, by label."""

    texts: list[str | None]
    pictures: list[bool]

    @classmethod
    def of(cls, engine: ScriptedEngine) -> Seen:
        contents = [c.document.content for c in engine.opened[-1].prompt.candidates]
        return cls([c.text for c in contents], [c.image is not None for c in contents])


async def test_every_shape_of_document_and_query_arrives(make_app: MakeApp) -> None:
    engine = ScriptedEngine(slots=FALLING.slots)
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    documents = [
        "plain", {"text": "object"}, {"image": PNG}, {"text": "both", "image": f"data:image/png;base64,{PNG}"},
        {"content": [{"type": "text", "text": "part"}, image]}, {"content": [image]}, {"id": "common"},
    ]  # fmt: skip
    async with client(make_app(engine)) as http:
        for query in ("q", {"text": "q", "instruction": "Find it."}, {"content": [{"type": "text", "text": "q"}]}):
            answer = (await http.post("/v1/rerank", json={"query": query, "documents": documents})).json()
            assert answer["status"] == "reranked"
    seen = Seen.of(engine)
    assert seen.texts == ["plain", "object", None, "both", "part", None, "a common text"]
    assert seen.pictures == [False, False, True, True, True, True, False]
    assert [r["id"] for r in answer["results"]] == [None] * 6 + ["common"]


async def test_an_id_brings_the_memory_made_at_index_time(make_app: MakeApp) -> None:
    app = make_app(options=OPTIONS.with_options(on_stale="raise"))
    async with client(app, None) as http:
        assert (await http.post("/v1/rerank", json={"query": "q", "documents": [{"id": "common"}]})).status_code == 200
        metrics = (await http.get("/metrics")).text
    assert "retrv_stale_memory_total 0.0" in metrics


async def test_two_documents_with_one_id_stay_two(make_app: MakeApp) -> None:
    async with client(make_app(RISING)) as http:
        answer = (
            await http.post("/v1/rerank", json={"query": "q", "documents": [{"id": "common"}, "x", {"id": "common"}]})
        ).json()
    assert indices(answer) == [2, 1, 0]


async def test_documents_without_content_end_the_list_and_are_named(make_app: MakeApp) -> None:
    async with client(make_app(RISING)) as http:
        answer = (await http.post("/v1/rerank", json={"query": "q", "documents": ["", "a", {"text": " "}, "b"]})).json()
    assert indices(answer) == [3, 1, 0, 2]
    assert [r["relevance_score"] for r in answer["results"]] == [1.0, 0.5, 0.0, 0.0]
    assert (answer["status"], answer["unranked"]) == ("partial", [0, 2])
    assert "2 documents have neither" in answer["reason"]


async def test_a_picture_that_cannot_be_read_makes_the_list_partial(make_app: MakeApp) -> None:
    documents = ["a", {"image": base64.b64encode(b"no picture").decode()}, "b"]
    async with client(make_app(RISING)) as http:
        answer = (await http.post("/v1/rerank", json={"query": "q", "documents": documents})).json()
    assert (answer["status"], answer["unranked"]) == ("partial", [1])
    assert indices(answer) == [2, 0, 1]


async def test_a_fallback_is_the_input_order_without_scores(make_app: MakeApp) -> None:
    engine = ScriptedEngine(failing={"probe": RuntimeError("CUDA\nerror\x1b[31m ü")})
    async with client(make_app(engine)) as http:
        response = await http.post("/v1/rerank", json={"query": "q", "documents": ["a", "", "b"]})
    answer = response.json()
    assert indices(answer) == [0, 1, 2]
    assert [r["rank"] for r in answer["results"]] == [1, 2, 3]
    assert {r["relevance_score"] for r in answer["results"]} == {None}
    assert (answer["status"], response.headers["x-retrv-status"]) == ("fallback", "fallback")
    assert "CUDA error" in response.headers["x-retrv-reason"]


@pytest.mark.parametrize("documents", [[], ["", " "]])
async def test_nothing_to_rank_is_a_fallback_that_says_so(make_app: MakeApp, documents: list[str]) -> None:
    async with client(make_app()) as http:
        answer = (await http.post("/v1/rerank", json={"query": "q", "documents": documents})).json()
    assert answer["status"] == "fallback"
    assert "o rank" in answer["reason"]
    assert indices(answer) == list(range(len(documents)))


async def test_the_trace_comes_when_asked_for(make_app: MakeApp) -> None:
    engine = ScriptedEngine(Thought("red", (), answer=1), slots=FALLING.slots)
    body = {"query": "q", "documents": THREE, "options": {"think": "always"}}
    async with client(make_app(engine)) as http:
        assert (await http.post("/v1/rerank", json=body)).json()["trace"] is None
        answer = (await http.post("/v1/rerank", json={**body, "return_trace": True})).json()
    assert answer["trace"]["answer"] == 1
    assert answer["trace"]["candidates"] == ["#0", "#1", "#2"]


async def test_unknown_fields_are_named_not_refused(make_app: MakeApp) -> None:
    async with client(make_app()) as http:
        answer = (
            await http.post("/v1/rerank", json={"query": "q", "documents": THREE, "max_tokens_per_doc": 9})
        ).json()
    assert answer["notes"][0] == "'max_tokens_per_doc' is not known here and was not applied"


# -- search


async def test_search_finds_ranks_and_shows(make_app: MakeApp) -> None:
    async with client(make_app(RISING)) as http:
        answer = (await http.post("/v1/search", json={"query": "alpha text 3", "top_k": 4, "top_n": 2})).json()
    assert indices(answer) == [3, 2]
    assert [r["rank"] for r in answer["results"]] == [1, 2]
    assert {r["document"]["metadata"].get("tenant") for r in answer["results"]} <= {"alpha", "beta", None}
    assert all(r["document"]["text"] for r in answer["results"])
    assert answer["results"][0]["retrieval_score"] < answer["results"][1]["retrieval_score"]
    assert answer["timings"]["first_stage"] > 0


async def test_search_filters(make_app: MakeApp) -> None:
    async with client(make_app()) as http:
        for condition in ({"equals": "beta"}, {"one_of": ["beta", "gamma"]}):
            only = {"must": [{"field": "tenant", **condition}]}
            answer = (await http.post("/v1/search", json={"query": "text", "filter": only})).json()
            assert len(answer["results"]) == 5
        only = {"must": [{"field": "tenant", "equals": "gamma"}]}
        answer = (await http.post("/v1/search", json={"query": "text", "filter": only})).json()
    assert (answer["results"], answer["status"]) == ([], "fallback")


# -- tenants and keys


async def test_a_tenant_sees_its_own_documents_whatever_it_asks_for(make_app: MakeApp) -> None:
    app = make_app(keys=KEYS)
    for key, tenant in KEYS.items():
        async with client(app, key) as http:
            everything: dict[str, Any] = {"should": [{"field": "tenant", "one_of": ["alpha", "beta"]}]}
            for asked in ({}, {"filter": everything}):
                answer = (await http.post("/v1/search", json={"query": "text", **asked})).json()
                assert len(answer["results"]) == 5
                assert {r["document"]["metadata"]["tenant"] for r in answer["results"]} == {tenant}
            body = {"query": "q", "documents": [{"id": "doc-1"}], "return_documents": True}
            answer = (await http.post("/v1/rerank", json=body)).json()
            assert answer["results"][0]["document"]["text"] == f"{tenant} text 1"
            response = await http.post("/v1/rerank", json={"query": "q", "documents": [{"id": "common"}]})
            assert response.status_code == 422
            assert "'common'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer key"}, {"authorization": "Basic key-a"}, {"x-api-key": "ü"}]
)
async def test_without_a_known_key_nothing_is_read(make_app: MakeApp, headers: dict[str, str]) -> None:
    async with client(make_app(keys=KEYS)) as http:
        response = await http.post(
            "/v1/rerank", content=b"not json", headers={k: v.encode() for k, v in headers.items()}
        )
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        assert (await http.post("/nowhere")).status_code == 401
        assert {(await http.get(path)).status_code for path in ("/healthz", "/readyz", "/metrics")} == {200}
    async with client(make_app(keys=KEYS)) as http:
        body = {"query": "q", "documents": THREE}
        assert (await http.post("/v1/rerank", json=body, headers={"x-api-key": "key-a"})).status_code == 200


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "one")
    monkeypatch.setenv("B", "two")
    assert ServeConfig(api_key_env="A").keys() == {"one": None}
    assert ServeConfig(tenant_field="t", tenants={"a": "A", "b": "B"}).keys() == {"one": "a", "two": "b"}
    with pytest.raises(OptionsError, match="environment variable C: expected an API key, got nothing"):
        ServeConfig(api_key_env="C").keys()
    monkeypatch.setenv("B", "one")
    with pytest.raises(OptionsError, match="one key twice"):
        ServeConfig(tenant_field="t", tenants={"a": "A", "b": "B"}).keys()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tenants": {"a": "A"}}, "tenant_field and tenants"),
        ({"tenant_field": "t"}, "tenant_field and tenants"),
        ({"tenant_field": "t", "tenants": {"a": "A"}, "api_key_env": "B"}, "no api_key_env"),
        ({"max_running": 0}, "max_running: expected >= 1"),
        ({"max_timeout_s": float("nan")}, "max_timeout_s: expected seconds"),
        ({"port": 70_000}, "port: expected 0 to 65535"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionsError, match=re.escape(says)):
        limits(**changes)


# -- bad input

BAD: list[tuple[Any, int, str]] = [
    (b"{", 400, "JSON"),
    (b"\xff\xfe", 400, ""),
    (b"[" * 50_000, 400, ""),
    (b'{"query": "q", "documents": ["\\ud800"]}', 422, "documents.0"),
    (b'{"query": {"instruction": "\\ud800", "text": "a"}, "documents": ["a"]}', 422, "instruction"),
    (b'{"query": "q", "documents": [{"id": "\\ud800"}]}', 422, "documents.0"),
    (b'{"query": "q", "documents": ["a"], "options": {"\\ud800": 1}}', 422, "options: "),
    (b'{"query": "q", "documents": ["a"], "options": {"timeout_s": NaN}}', 422, "timeout_s"),
    ({}, 422, "query: Field required"),
    ({"query": "q"}, 422, "documents: Field required"),
    ({"query": "", "documents": THREE}, 422, "query: expected a text or a picture, got neither"),
    (b"[" * 10_000, 400, "body: expected JSON"),
    (b"7", 422, "body: Input should be an object"),
    (b'{"query": "\\ud800", "documents": ["a"]}', 422, "query: Value error, expected characters, got half of a surrogate pair"),
    ({"query": 7, "documents": THREE}, 422, "query: Input should be a valid string, or Input should be an object"),
    ({"query": {"image": 7}, "documents": THREE}, 422, "query.image: Extra inputs are not permitted, or Input should be a valid string"),
    ({"query": "q", "documents": "a"}, 422, "documents"),
    ({"query": "q", "documents": [7]}, 422, "documents.0"),
    ({"query": "q", "documents": [{"title": "a"}]}, 422, "documents.0"),
    ({"query": "q", "documents": ["a"] * 21}, 422, "expected at most 20, got 21"),
    ({"query": "q", "documents": ["a" * 1001]}, 422, "documents[0]: expected at most 1,000 characters, got 1001"),
    ({"query": "q" * 1001, "documents": THREE}, 422, "query: expected at most 1,000 characters"),
    ({"query": {"text": "q", "instruction": "i" * 1001}, "documents": THREE}, 422, "query.instruction"),
    ({"query": "q", "documents": [{"id": "gone"}, {"id": "lost"}]}, 422, "2 that are not in it ('gone', 'lost')"),
    ({"query": "q", "documents": [{"id": "common", "text": "a"}]}, 422, "expected id, or text and image, got both"),
    ({"query": "q", "documents": [{"image": "cards/1.png"}]}, 422, "expected base64, a data URI or a URL"),
    ({"query": {"image": "../key.png"}, "documents": THREE}, 422, "expected base64, a data URI or a URL"),
    ({"query": {"image": "QUJD"}, "documents": THREE}, 422, "expected a readable PNG"),
    ({"query": {"image": "http://10.0.0.1/a.png"}, "documents": THREE}, 422, ""),
    ({"query": "q", "documents": THREE, "top_n": 0}, 422, "top_n"),
    ({"query": "q", "documents": THREE, "model": "gpt"}, 422, "model: expected 'retrv-r1', got 'gpt'"),
    ({"query": "q", "documents": THREE, "options": {"thinking": "no"}}, 422, "options.thinking"),
    ({"query": "q", "documents": THREE, "options": {"think": "often"}}, 422, "options.think"),
    ({"query": "q", "documents": THREE, "options": {"think": None}}, 422, "options.think"),
    ({"query": "q", "documents": THREE, "options": {"on_failure": "raise"}}, 422, "options.on_failure"),
    ({"query": "q", "documents": THREE, "options": {"timeout_s": 121}}, 422, "timeout_s: expected at most 120"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code", "says"), BAD, ids=[str(i) for i in range(len(BAD))])
async def test_bad_input_gets_a_clear_error(make_app: MakeApp, body: Any, code: int, says: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client(make_app()) as http:
        response = await http.post("/v1/rerank", content=content, headers={"content-type": "application/json"})
    assert response.status_code == code, response.text
    error = response.json()
    assert says in error["error"]["message"]
    assert error["id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])  # curl -d sends the first
async def test_json_under_another_name_is_told_which_header(make_app: MakeApp, kind: str | None) -> None:
    async with client(make_app()) as http:
        headers = {"content-type": kind} if kind else {}
        response = await http.post("/v1/rerank", content=b'{"query": "q", "documents": ["a"]}', headers=headers)
    assert response.status_code == 422
    says = f"body: expected JSON sent as application/json, got {kind!r}. Set the header" if kind else "Set the header"
    assert says in response.json()["error"]["message"]


async def test_another_route_or_method_is_told_where_they_are(make_app: MakeApp) -> None:
    async with client(make_app()) as http:
        lost, got = await http.post("/v1/rank", json={}), await http.get("/v1/rerank")
    assert (lost.status_code, got.status_code) == (404, 405)
    assert all("/openapi.json" in answer.json()["error"]["message"] for answer in (lost, got))


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ({"field": "a"}, "expected equals, one_of or a range, got none of them"),
        ({"field": "a", "equals": 1, "gte": 2}, "got equals and a range"),
        ({"field": "a[", "equals": 1}, "filter.must.0.field"),
        ({"field": "a", "equals": 1.5}, "filter.must.0.equals"),
        ({"field": "a", "equals": 2**63}, "filter.must.0.equals"),
        ({"field": "a", "one_of": []}, "expected at least one value"),
    ],
)
async def test_bad_filters_get_a_clear_error(make_app: MakeApp, condition: dict[str, Any], says: str) -> None:
    async with client(make_app()) as http:
        response = await http.post("/v1/search", json={"query": "q", "filter": {"must": [condition]}})
    assert (response.status_code, says in response.json()["error"]["message"]) == (422, True), response.text


async def test_a_server_without_a_collection_says_so(make_app: MakeApp) -> None:
    async with client(make_app(search=False)) as http:
        for path, body in (("search", {"query": "q"}), ("rerank", {"query": "q", "documents": [{"id": "common"}]})):
            response = await http.post(f"/v1/{path}", json=body)
            assert response.status_code == 422
            assert "a server without" in response.json()["error"]["message"]
        assert (await http.post("/v1/rerank", json={"query": "q", "documents": THREE})).status_code == 200
        assert (await http.get("/readyz")).status_code == 200


async def test_what_is_stale_can_be_an_error(make_app: MakeApp) -> None:
    body = {"query": "q", "options": {"on_stale": "raise"}}
    app = make_app()
    async with client(app) as http:
        assert (await http.post("/v1/search", json=body)).status_code == 200
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_service(app).reranker.compressor, "memory_digest", "another")
        async with client(app) as http:
            response = await http.post("/v1/search", json=body)
            assert response.status_code == 409
            await http.post("/v1/search", json={"query": "q"})
            metrics = (await http.get("/metrics")).text
    assert "StaleMemoryError" in response.text
    assert "retrv_stale_memory_total 10.0" in metrics


# -- what fails in the server


async def test_a_store_that_fails_is_503_and_tells_the_log_alone(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    monkeypatch.setattr(app_service(app).whole.store, "_shard", None)
    async with client(app) as http:
        response = await http.post("/v1/search", json={"query": "q"})
        assert response.status_code == 503
        assert "log" in response.json()["error"]["message"]
        assert "index" not in response.json()["error"]["message"]
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/healthz")).status_code == 200
    assert response.json()["id"] in caplog.text


async def test_a_bug_is_500_in_the_same_shape(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()
    monkeypatch.setattr("retrv_r1_retriever.serving.app.to_answer", lambda *a, **k: 1 / 0)
    async with client(app) as http:
        response = await http.post("/v1/rerank", json={"query": "q", "documents": THREE})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "ZeroDivisionError")


async def test_a_model_that_fails_is_no_error(make_app: MakeApp) -> None:
    engine = ScriptedEngine(failing={"open": EngineError("out of memory")})
    async with client(make_app(engine, options=RerankOptions(on_failure="raise"))) as http:
        response = await http.post("/v1/search", json={"query": "q"})
    assert (response.status_code, response.json()["status"]) == (200, "fallback")


# -- what is counted and logged


async def test_metrics_count_decisions(make_app: MakeApp) -> None:
    engine = ScriptedEngine(Thought("red", (), answer=1), slots=FALLING.slots)
    async with client(make_app(engine)) as http:
        for think in ("always", "never", "never"):
            await http.post("/v1/rerank", json={"query": "q", "documents": THREE, "options": {"think": think}})
        await http.post("/v1/rerank", json={"query": "q", "documents": ["", "a"]})
        await http.post("/v1/rerank", json={"query": "q"})
        text = (await http.get("/metrics")).text
    for line in (
        'retrv_results_total{reason="none",route="rerank",status="reranked"} 3.0',
        'retrv_results_total{reason="blank_documents",route="rerank",status="partial"} 1.0',
        "retrv_thoughts_total 1.0", 'retrv_calls_total{code="200",route="rerank"} 4.0', 'retrv_calls_total{code="422",route="none"} 1.0',
        "retrv_running 0.0", "retrv_waiting 0.0", "retrv_stale_memory_total 0.0", 'retrv_stage_seconds_count{stage="think"} 1.0',
        "retrv_queue_seconds_count 4.0",
    ):  # fmt: skip
        assert line in text, line
    assert float(re.search(r'retrv_tokens_total{kind="prompt"} (\S+)', text)[1]) > 0
    assert "process_resident_memory_bytes" in text


PASSED_OVER = Thought("red", (), answer=1)
REASONS: list[tuple[str, ScriptedEngine, dict[str, Any]]] = [
    ("timeout", ScriptedEngine(slots=FALLING.slots, delay_s=1.0), {"timeout_s": 0.2}),
    ("thought_failed", ScriptedEngine([EngineError("gone")], slots=FALLING.slots), {"think": "always"}),
    ("not_named", ScriptedEngine(PASSED_OVER, direct_read=False), {"think": "always"}),
    ("engine", ScriptedEngine(failing={"open": RuntimeError("CUDA error")}), {}),
    ("no_memory", FALLING, {"on_stale": "first_stage"}),
]


@pytest.mark.parametrize(("label", "engine", "options"), REASONS, ids=[label for label, *_ in REASONS])
async def test_reasons_as_the_core_writes_them_have_a_label(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, label: str, engine: ScriptedEngine, options: dict[str, Any]
) -> None:
    app = make_app(engine)
    if label == "no_memory":
        monkeypatch.setattr(app_service(app).whole.retriever.reranker.compressor, "memory_digest", "another")
    async with client(app) as http:
        answer = (await http.post("/v1/search", json={"query": "q", "options": options})).json()
        assert f'reason="{label}",route="search",status="{answer["status"]}"' in (await http.get("/metrics")).text
    assert answer["status"] != "reranked"


async def test_one_line_per_call_with_its_id_and_without_content(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "retrv_r1_retriever")
    secret = {"query": "s3cret query", "documents": ["s3cret text", {"image": "bad s3cret"}], "s3cret": 1}
    async with client(make_app(keys=KEYS), "key-a") as http:
        good = await http.post(
            "/v1/rerank", json={**secret, "documents": ["s3cret text", ""]}, headers={"x-request-id": "mine-1"}
        )
        bad = await http.post("/v1/rerank?s3cret", json=secret, headers={"x-request-id": "a b\n"})
        await http.get("/healthz")
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("retrv_r1_retriever")]
    assert len(lines) == 2
    assert "s3cret" not in caplog.text
    assert good.headers["x-request-id"] == good.json()["id"] == "mine-1"
    assert lines[0].startswith("id=mine-1 route=rerank code=200 seconds=")
    assert re.search(r" status=partial reason=blank_documents candidates=2 opened=0 tokens=\d+ tenant=alpha$", lines[0])
    assert re.fullmatch(r"[0-9a-f]{32}", bad.headers["x-request-id"])
    assert f"id={bad.headers['x-request-id']} route=rerank code=422" in lines[1]


async def test_openapi_describes_both_calls(make_app: MakeApp) -> None:
    async with client(make_app(keys=KEYS)) as http:
        document = (await http.get("/openapi.json")).json()
    assert {"/v1/rerank", "/v1/search", "/healthz", "/readyz"} == set(document["paths"])
    assert "429" in document["paths"]["/v1/rerank"]["post"]["responses"]
    assert document["components"]["securitySchemes"]


def test_a_header_carries_any_reason() -> None:
    assert header_text("a\r\nSet-Cookie: b\x00é" + "x" * 500).isprintable()
    assert len(header_text("x" * 500)) == 200


def app_service(app: Any) -> Any:
    """The service inside an app."""
    route = next(r for r in app.routes if getattr(r, "path", "") == "/v1/search")
    return route.endpoint.__self__._service
