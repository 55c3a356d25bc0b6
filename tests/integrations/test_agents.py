"""A scripted chat model drives a whole agent in each framework, over the shipped model: it searches, reads, and cites the right card."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langgraph.checkpoint.memory import InMemorySaver
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index_retrv_r1 import RetrvR1Retriever as LlamaRetriever
from llama_index_retrv_r1 import create_retriever_tool

from retrv_r1_retriever import ReasoningTrace, RerankOptions

EXAMPLE = Path(__file__).parents[2] / "examples" / "langgraph_agent.py"
ASKED = 7


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("langgraph_agent", EXAMPLE)
    assert spec
    assert spec.loader
    module = sys.modules["langgraph_agent"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parts(example: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[str], Any]:
    """LangChain's tool, the cards' texts, and the pipeline beneath the tool."""
    found: list[Any] = []
    original = example.RetrvR1Retriever
    example.RetrvR1Retriever = lambda **given: found.append(given["base"]) or original(**given)
    tool, texts = example.build_tool(tmp_path_factory.mktemp("cards"))
    return tool, texts, found[0]


def check(artifact: dict[str, Any]) -> None:
    """Plain JSON, and the trace in it is whole."""
    assert json.loads(json.dumps(artifact, allow_nan=False)) == artifact
    assert artifact["status"] in ("reranked", "partial")
    trace = ReasoningTrace.from_json(json.dumps(artifact["trace"]))
    assert len(trace.candidates) == 20
    assert f"card-{ASKED}" in trace.candidates


def test_langgraph(example: Any, parts: tuple[Any, list[str], Any]) -> None:
    tool, texts, _ = parts
    checkpoints, thread = InMemorySaver(), {"configurable": {"thread_id": "1"}}
    agent = example.build_agent(example.Scripted(), tool, checkpoints)
    live = agent.invoke({"messages": [HumanMessage(texts[ASKED])]}, thread)["messages"]
    kept = example.build_agent(example.Scripted(), tool, checkpoints).get_state(thread).values["messages"]
    assert kept == live
    assert kept[-1].text == f"That is {texts[ASKED]} [card-{ASKED}]."
    [found] = [message for message in kept if isinstance(message, ToolMessage)]
    check(found.artifact)
    assert sum(block["type"] == "image" for block in found.content_blocks) == 10


async def test_llama_index(parts: tuple[Any, list[str], Any]) -> None:
    _, texts, pipeline = parts
    retriever = LlamaRetriever(pipeline, options=RerankOptions(top_k=20, top_n=10, timeout_s=None))
    tool = create_retriever_tool(retriever, "find_cards", "Finds product cards by words.", image_tokens=500)

    def scripted(messages: Sequence[ChatMessage], **given: Any) -> ChatMessage:  # as the mock calls it
        asked = next(message.content or "" for message in messages if message.role == MessageRole.USER)
        last = messages[-1]
        if last.role != MessageRole.TOOL:
            call = ToolCallBlock(tool_call_id="1", tool_name="find_cards", tool_kwargs={"query": asked})
            return ChatMessage(role=MessageRole.ASSISTANT, blocks=[call])
        text = "\n".join(block.text for block in last.blocks if isinstance(block, TextBlock))
        assert sum(isinstance(block, ImageBlock) for block in last.blocks) == 10
        lines = re.findall(r"^\d+\. \[(.+?)\] (.*)", text, re.MULTILINE)
        id, _ = max(lines, key=lambda line: len(set(asked.split()) & set(line[1].split())))
        return ChatMessage(role=MessageRole.ASSISTANT, content=f"That is [{id}].")

    agent = FunctionAgent(tools=[tool], llm=MockFunctionCallingLLM(response_generator=scripted, is_chat_model=True))
    running = agent.run(texts[ASKED])
    outputs = [event.tool_output async for event in running.stream_events() if isinstance(event, ToolCallResult)]
    assert str(await running) == f"That is [card-{ASKED}]."
    check(outputs[0].raw_output)
