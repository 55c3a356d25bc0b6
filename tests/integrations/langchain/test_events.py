"""What a call tells while it runs, and what it leaves behind: custom events, the artifact, the agent's tool."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_retrv_r1 import RankedDocuments, RetrvR1Retriever, create_retriever_tool

from retrv_r1_retriever import PayloadSchema, ReasoningTrace
from retrv_r1_retriever import RetrvR1Reranker as CoreReranker
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.errors import EngineError
from retrv_r1_retriever.parser import Check, Thought, Verdict
from retrv_r1_retriever.prompt import NONE_INDEX
from tests.integrations.langchain.parts import OPTIONS, TEXTS, THINKING, Fixed, documents, png, reranker

THOUGHT = Thought(
    "a square", (Verdict(0, "wrong"), Verdict(1, "keep")), (Check(3, "no", False), Check(1, "yes", True)), 1
)
STEPS = ["retrieved", "thinking", "opened", "opened", "answered"]


def thinking(thought: Thought = THOUGHT, **options: Any) -> RetrvR1Retriever:
    engine = ScriptedEngine(thought, slots=[0.0] * 5 + [-9.0])
    given = [Document(text, id=f"doc-{i}") for i, text in enumerate(TEXTS)]
    return RetrvR1Retriever(base=Fixed(found=given), reranker=CoreReranker(engine, options=THINKING), **options)


async def test_every_step_is_an_event_of_the_stream_in_order() -> None:
    chain = thinking() | RunnableLambda(lambda found: found[0].page_content)
    events = [e async for e in chain.astream_events("q", version="v2")]
    custom = [e for e in events if e["event"] == "on_custom_event"]
    assert [e["name"] for e in custom] == [f"retrv_r1.{step}" for step in STEPS]
    data = [e["data"] for e in custom]
    assert data[:4] == [{"candidates": 5}, {}, {"index": 3, "id": "doc-3"}, {"index": 1, "id": "doc-1"}]
    assert data[4]["status"] == "reranked"
    json.dumps(data, allow_nan=False)
    started = next(e for e in events if e["event"] == "on_retriever_start" and e["name"] == "RetrvR1Retriever")
    assert {e["run_id"] for e in custom} == {started["run_id"]}
    inner = next(e for e in events if e["event"] == "on_retriever_start" and e["name"] == "Fixed")
    assert inner["parent_ids"][-1] == started["run_id"], "the wrapped retriever is a child of ours"
    assert events[-1]["data"]["output"] == "one blue square"


async def test_handlers_of_both_kinds_hear_both_kinds_of_calls() -> None:
    heard: list[str] = []

    class Sync(BaseCallbackHandler):
        def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:  # theirs
            heard.append(name.removeprefix("retrv_r1."))

    class Async(AsyncCallbackHandler):
        async def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:  # theirs
            heard.append(name.removeprefix("retrv_r1."))

    for handler in (Sync(), Async()):
        await thinking().ainvoke("q", config={"callbacks": [handler]})
        assert heard == STEPS
        heard.clear()
        thinking().invoke("q", config={"callbacks": [handler]})
        assert heard == STEPS
        heard.clear()


async def test_a_fallback_is_answered_too() -> None:
    retriever = RetrvR1Retriever(
        base=Fixed(found=documents()), reranker=reranker(failing={"open": EngineError("down")})
    )
    custom = [e async for e in retriever.astream_events("q", version="v2") if e["event"] == "on_custom_event"]
    assert [e["name"] for e in custom] == ["retrv_r1.retrieved", "retrv_r1.answered"]
    assert (custom[1]["data"]["status"], custom[1]["data"]["reason"]) == ("fallback", "down")


def test_the_trace_is_a_plain_json_artifact() -> None:
    found = thinking().invoke("q")
    assert isinstance(found, RankedDocuments)
    artifact = json.loads(json.dumps(found.artifact, allow_nan=False))
    assert artifact == found.artifact
    assert [r["id"] for r in artifact["results"]] == [d.id for d in found]
    trace = ReasoningTrace.from_json(json.dumps(artifact["trace"]))
    assert trace.inspected == (3, 1)
    assert trace.thought == found.results.trace.thought


def test_the_artifact_is_json_where_log_probabilities_are_not() -> None:
    engine = ScriptedEngine(slots=[0.0, float("-inf"), -9.0])
    retriever = RetrvR1Retriever(base=Fixed(found=documents()[:2]), reranker=CoreReranker(engine, options=OPTIONS))
    found = retriever.invoke("q")
    assert found[1].metadata["retrv_r1"]["slot_logprob"] is None
    json.dumps([found.artifact, found[1].metadata], allow_nan=False)


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_tool_gives_text_to_the_model_and_the_trace_to_the_program(is_async: bool) -> None:
    tool = create_retriever_tool(thinking(k=2), "shapes", "Finds shapes.")
    call = {"type": "tool_call", "id": "1", "name": "shapes", "args": {"query": "q"}}
    message = await tool.ainvoke(call) if is_async else tool.invoke(call)
    assert isinstance(message, ToolMessage)
    assert str(message.content).splitlines()[0] == "1. [doc-1] one blue square"
    assert len(str(message.content).splitlines()) == 2
    assert message.artifact["trace"]["inspected"] == [3, 1]
    assert json.loads(json.dumps(message.artifact)) == message.artifact
    assert tool.args == {"query": {"description": "what to look for", "title": "Query", "type": "string"}}


def test_the_tool_says_when_nothing_fits_or_nothing_was_reranked() -> None:
    def text(retriever: RetrvR1Retriever) -> str:
        return str(create_retriever_tool(retriever, "t", "d").invoke({"query": "q"}))

    nothing = Thought("x", (), (), NONE_INDEX)
    assert text(thinking(nothing)).startswith("None of these fits the query; the nearest first:\n1. [")
    down = reranker(failing={"open": EngineError("down")})
    base = Fixed(found=documents())
    assert text(RetrvR1Retriever(base=base, reranker=down)).startswith(
        "Not reranked, in the order of the first search: d"
    )
    assert text(RetrvR1Retriever(base=Fixed(found=[]), reranker=down)) == "Nothing found."


def test_the_tool_names_pictures_and_never_writes_them_out() -> None:
    given = [Document("a caption", metadata={"image": png()}, id="x")]
    mapping = PayloadSchema(text="page_content", image="metadata.image")
    core = CoreReranker(ScriptedEngine(slots=[0.0, -9.0]), options=OPTIONS)
    tool = create_retriever_tool(RetrvR1Retriever(base=Fixed(found=given), reranker=core, mapping=mapping), "t", "d")
    assert tool.invoke({"query": "q"}) == "1. [x] a caption (with a picture)"
