"""The chat engine on the real server. The miniature is no chat model: what it says is noise, but it is asked as vLLM allows,
answers as the grammar makes it, and every list ends in the right status."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from retrv_r1_retriever.engines.chat import ChatEngine
from retrv_r1_retriever.errors import EngineError
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.types import Content, Document, RankedResults, Status
from tests.tiny import picture
from tests.vllm.server import MODEL, Running

pytestmark = pytest.mark.vllm

NEVER = RerankOptions(think="never", timeout_s=300.0)
MIXED = [Content("a red ring"), Content("two blue dots", picture(1)), Content(image=picture(2))]


class Bounded:
    """A transport that keeps noise short: strings of a few characters, and always one candidate that is to be seen in full."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.bodies: list[dict[str, Any]] = []
        self.texts: list[str] = []

    async def complete(self, body: dict[str, Any]) -> Any:
        self.bodies.append(body)
        body = copy.deepcopy(body)
        _bound(body.get("response_format", {}).get("json_schema", {}).get("schema", {}))
        answer = await self.inner.complete(body)
        self.texts.append(answer["choices"][0]["message"]["content"])
        return answer

    async def models(self) -> list[str]:
        return await self.inner.models()  # type: ignore[no-any-return]


def _bound(schema: dict[str, Any]) -> None:
    if schema.get("type") == "string" and "enum" not in schema:
        schema["maxLength"] = 8
    if schema.get("type") == "array":
        schema |= {"minItems": 1, "maxItems": 1}
    for inner in schema.get("properties", {}).values():
        _bound(inner)


def bounded(engine: ChatEngine) -> Bounded:
    transport = Bounded(engine._server._transport)
    engine._server._transport = transport
    return transport


async def rerank(engine: ChatEngine, contents: Sequence[Content], options: RerankOptions = NEVER) -> RankedResults:
    documents = [Document(str(i), content) for i, content in enumerate(contents)]
    results = await RetrvR1Reranker(engine, options=options).arerank("a red ring", documents)
    assert sorted(r.document.id for r in results) == sorted(d.id for d in documents)
    return results


@pytest.mark.parametrize("client", [False, True], ids=["http", "openai"])
async def test_a_list_is_judged_under_the_grammar_and_one_is_opened(server: Running, client: bool) -> None:
    if client:
        engine = ChatEngine(MODEL, client=openai.AsyncOpenAI(base_url=server.base_url, api_key="any"))
    else:
        engine = ChatEngine(MODEL, base_url=server.base_url)
    heard = bounded(engine)
    results = await rerank(engine, MIXED, NEVER.with_options(think="always", max_inspections=1))
    assert results.status is Status.RERANKED, results.reason
    assert (engine.known.format, engine.known.dropped, engine.known.pictures) == ("json_schema", set(), True)
    judged, checked = (json.loads(text) for text in heard.texts)
    assert set(judged["candidates"]) == {"c0", "c1", "c2"}
    assert set(checked) == {"check", "match", "answer", "open"}
    assert [r.document.id for r in results if r.signals.opened] == [judged["open"][0][1:]]
    assert heard.bodies[1]["messages"][:2] == heard.bodies[0]["messages"]
    grades = [entry["grade"] for entry in judged["candidates"].values()]
    assert all(r.signals.keep_logprob is not None for r in results)
    assert len(grades) == 3


async def test_more_pictures_than_the_server_takes_are_read_in_parts(server: Running) -> None:
    engine = ChatEngine(MODEL, base_url=server.base_url)
    bounded(engine)
    results = await rerank(engine, [Content("x", picture(i)) for i in range(10)])
    assert results.status is Status.RERANKED, results.reason
    assert engine.known.images == 8
    assert results.trace is not None
    assert any("read in 2 requests" in note for note in results.trace.notes)


async def test_more_text_than_the_context_holds_is_read_in_parts(server: Running) -> None:
    """One token a character, nearly: eight of these are more than 4,096."""
    engine = ChatEngine(MODEL, base_url=server.base_url)
    bounded(engine)
    results = await rerank(engine, [Content("zq" * 400) for _ in range(8)])
    assert results.status is Status.RERANKED, results.reason
    assert engine.known.most is not None
    assert engine.known.most < 8


async def test_noise_ends_in_time_with_a_reason(server: Running) -> None:
    """Nothing bounds it here but the grammar: it may be readable or not, and may take all its room."""
    started = time.monotonic()
    options = NEVER.with_options(timeout_s=20.0)
    results = await rerank(ChatEngine(MODEL, base_url=server.base_url), MIXED, options)
    assert time.monotonic() - started < 40
    assert (results.reason is None) == (results.status is Status.RERANKED)
    if results.status is Status.FALLBACK:
        assert [r.score for r in results] == [None] * 3


async def test_a_wrong_name_is_told_with_the_right_one(server: Running) -> None:
    engine = ChatEngine("gpt-nothing", base_url=server.base_url)
    with pytest.raises(EngineError, match=f"model: expected one of {MODEL}, got 'gpt-nothing'"):
        await rerank(engine, MIXED, NEVER.with_options(on_failure="raise"))
