"""Behind a real uvicorn: overload, callers that hang up or stall, and stopping."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from retrv_r1_retriever import RemoteReranker, RerankOptions
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from tests.helpers import documents
from tests.serving.conftest import FALLING, MakeApp, limits, running

CALL: dict[str, Any] = {"query": "q", "documents": ["a", "b"]}


def slow(seconds: float) -> ScriptedEngine:
    """Every step takes so long; a call has three."""
    return ScriptedEngine(slots=FALLING.slots, delay_s=seconds)


async def wait_for(condition: Any, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        await asyncio.sleep(0.01)


async def test_above_the_bound_429_and_below_it_no_error(make_app: MakeApp) -> None:
    app = make_app(slow(0.1), limits(max_running=2, max_waiting=4))
    with running(app) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            answers = await asyncio.gather(*(http.post("/v1/rerank", json=CALL) for _ in range(40)))
            codes = [answer.status_code for answer in answers]
            assert set(codes) == {200, 429}
            assert codes.count(200) >= 6
            refused = next(answer for answer in answers if answer.status_code == 429)
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "TooManyRequests"
            metrics = (await http.get("/metrics")).text
            assert f'retrv_calls_total{{code="429",route="none"}} {codes.count(429)}.0' in metrics
            assert "retrv_running 0.0" in metrics
            assert "retrv_waiting 0.0" in metrics
            assert (await http.post("/v1/rerank", json=CALL)).status_code == 200


async def test_64_searches_at_a_time_are_all_answered(make_app: MakeApp) -> None:
    with running(make_app(slow(0.01), limits(max_running=16, max_waiting=64))) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=64)) as http:
            bodies = [{"query": f"alpha text {i % 5}", "top_k": 1 + i % 5} for i in range(64)]
            answers = await asyncio.gather(*(http.post("/v1/search", json=body) for body in bodies))
    assert {answer.status_code for answer in answers} == {200}
    assert [len(answer.json()["results"]) for answer in answers] == [body["top_k"] for body in bodies]


async def test_waiting_too_long_is_429_and_leaves_no_trace(make_app: MakeApp) -> None:
    engine = slow(0.3)
    with running(make_app(engine, limits(max_running=1))) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            first = asyncio.ensure_future(http.post("/v1/rerank", json=CALL))
            await wait_for(lambda: engine.opened)
            late = await http.post("/v1/rerank", json={**CALL, "options": {"timeout_s": 0.05}})
            assert (late.status_code, "no turn within" in late.json()["error"]["message"]) == (429, True)
            assert (await first).status_code == 200
            assert (await http.post("/v1/rerank", json=CALL)).status_code == 200


async def test_a_caller_that_hangs_up_ends_its_call_in_the_model(make_app: MakeApp) -> None:
    engine = ScriptedEngine(slots=FALLING.slots, delay_s=1.0)
    with running(make_app(engine, limits(max_running=1))) as server:
        async with httpx.AsyncClient(base_url=server.url) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/v1/rerank", json={**CALL, "options": {"think": "always"}}, timeout=1.5)
            await wait_for(lambda: engine.opened and not engine.leaked)
            await asyncio.sleep(1.5)  # closing takes a step, too
            metrics = (await http.get("/metrics")).text
    assert 'retrv_calls_total{code="499",route="rerank"} 1.0' in metrics
    assert "retrv_running 0.0" in metrics


@pytest.mark.parametrize("named", [True, False])
def test_a_body_over_the_limit_is_413_whether_its_length_is_named_or_not(make_app: MakeApp, named: bool) -> None:
    body = b'{"query": "' + b"q" * 3_000_000 + b'"}'
    content = body if named else (body[i : i + 50_000] for i in range(0, len(body), 50_000))
    with running(make_app()) as server:
        response = httpx.post(f"{server.url}/v1/rerank", content=content)
    assert response.status_code == 413
    assert "expected at most 100,000 bytes" in response.json()["error"]["message"]


def test_a_body_that_never_ends_is_408(make_app: MakeApp) -> None:
    with (
        running(make_app()) as server,
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as line,
    ):
        line.settimeout(20)
        line.sendall(b"POST /v1/rerank HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert line.recv(1000).startswith(b"HTTP/1.1 408 ")


async def test_stopping_lets_running_calls_end_and_takes_no_new_ones(make_app: MakeApp) -> None:
    engine = slow(0.3)
    with running(make_app(engine)) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            call = asyncio.ensure_future(http.post("/v1/rerank", json=CALL))
            await wait_for(lambda: engine.opened)
            threading.Thread(target=server.stop).start()
            assert (await call).status_code == 200
        await asyncio.to_thread(server.stop)
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient() as http:
                await http.post(f"{server.url}/v1/rerank", json=CALL)


async def test_a_call_that_outlasts_the_stop_is_503_in_our_shape(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    engine = slow(1.5)
    with caplog.at_level("INFO"), running(make_app(engine), shutdown_s=1) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            call = asyncio.ensure_future(http.post("/v1/rerank", json=CALL))
            await wait_for(lambda: engine.opened)
            await asyncio.to_thread(server.stop)
            answer = await call
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "ShuttingDown")
    lines = [record.getMessage() for record in caplog.records if record.name == "retrv_r1_retriever.serving"]
    assert [f"id={answer.headers['x-request-id']} route=rerank code=503" in line for line in lines] == [True]
    assert not any(record.exc_info for record in caplog.records)


async def test_a_full_server_is_tried_again_and_then_a_fallback(make_app: MakeApp) -> None:
    engine = slow(0.3)
    with running(make_app(engine, limits(max_running=1, max_waiting=0))) as server:
        remote = RemoteReranker(server.url, options=RerankOptions(think="never"))
        both = await asyncio.gather(*(remote.arerank("q", documents(3)) for _ in range(2)))
        await remote.aclose()
    assert [results.status for results in both] == ["reranked", "reranked"]  # the second one after a pause
