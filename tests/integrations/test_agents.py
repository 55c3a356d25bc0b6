"""A scripted chat model drives a whole agent in each framework, over the shipped model: it searches, reads, and cites the right card."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_retrv_r1 import RetrvR1Retriever as LangRetriever
from langchain_retrv_r1 import create_retriever_tool as create_langchain_tool
from langgraph.checkpoint.memory import InMemorySaver
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ImageBlock,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index_retrv_r1 import RetrvR1Retriever as LlamaRetriever
from llama_index_retrv_r1 import create_retriever_tool

from retrv_r1_retriever import InputError, ReasoningTrace, RerankOptions
from retrv_r1_retriever.demo.catalogue import TASKS

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


class Scripted(FunctionCallingLLM, CustomLLM):
    """Calls the first tool with the question, then cites the line whose words are nearest to it."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(is_function_calling_model=True)

    def complete(self, prompt: str, **given: Any) -> CompletionResponse:  # the framework's own
        raise NotImplementedError

    def stream_complete(self, prompt: str, **given: Any) -> Any:  # the framework's own
        raise NotImplementedError

    def _prepare_chat_with_tools(self, tools: Any, chat_history: Any = None, **given: Any) -> dict[str, Any]:  # its own
        return {"messages": chat_history, "tool": tools[0].metadata.name}

    async def astream_chat(self, messages: Sequence[ChatMessage], tool: str = "", **given: Any) -> Any:  # its own
        async def once() -> AsyncIterator[ChatResponse]:
            yield ChatResponse(message=self.answer(messages), delta="", raw={"tool": tool})

        return once()

    def answer(self, messages: Sequence[ChatMessage]) -> ChatMessage:
        asked = next(message.content or "" for message in messages if message.role == MessageRole.USER)
        last = messages[-1]
        if last.role != MessageRole.TOOL:
            return ChatMessage(role=MessageRole.ASSISTANT, content="", additional_kwargs={"query": asked})
        assert sum(isinstance(block, ImageBlock) for block in last.blocks) == 10
        text = "\n".join(block.text for block in last.blocks if isinstance(block, TextBlock))
        lines = re.findall(r"^\d+\. \[(.+?)\] (.*)", text, re.MULTILINE)
        id, _ = max(lines, key=lambda line: len(set(asked.split()) & set(line[1].split())))
        return ChatMessage(role=MessageRole.ASSISTANT, content=f"That is [{id}].")

    def get_tool_calls_from_response(self, response: ChatResponse, **given: Any) -> list[ToolSelection]:  # its own
        query = response.message.additional_kwargs.get("query")
        if query is None:
            return []
        assert isinstance(response.raw, dict)
        return [ToolSelection(tool_id="1", tool_name=response.raw["tool"], tool_kwargs={"query": query})]


async def test_llama_index(parts: tuple[Any, list[str], Any]) -> None:
    _, texts, pipeline = parts
    options = RerankOptions(top_k=20, top_n=10, timeout_s=None)
    retriever = LlamaRetriever(pipeline, options=options, instruction=TASKS["t2i"])
    tool = create_retriever_tool(retriever, "find_cards", "Finds product cards by words.", image_tokens=500)
    running = FunctionAgent(tools=[tool], llm=Scripted()).run(texts[ASKED])
    outputs = [event.tool_output async for event in running.stream_events() if isinstance(event, ToolCallResult)]
    assert str(await running) == f"That is [card-{ASKED}]."
    check(outputs[0].raw_output)


def test_a_picture_is_searched_with_by_its_name_and_a_wrong_name_is_told_to_the_model(
    parts: tuple[Any, list[str], Any],
) -> None:
    _, texts, pipeline = parts
    given: dict[str, Any] = {
        "picture_of": {"upload-1": f"{ASKED}.png"}.get
    }  # as `LocalImages` of the pipeline reads it
    options = RerankOptions(top_k=20, timeout_s=None)
    lang = create_langchain_tool(LangRetriever(base=pipeline, options=options), "find_cards", "Finds cards.", **given)
    llama = create_retriever_tool(LlamaRetriever(pipeline, options=options), "find_cards", "Finds cards.", **given)

    def ask(**arguments: str) -> ToolMessage:
        message = lang.invoke({"type": "tool_call", "id": "1", "name": "find_cards", "args": arguments})
        assert isinstance(message, ToolMessage)
        return message

    for arguments in ({"image": "upload-1"}, {"image": "upload-1", "query": texts[ASKED]}):
        for asked in (ask(**arguments).artifact, llama.call(**arguments).raw_output):
            assert asked["query"]["image"] == f"{ASKED}.png"
            assert asked["query"]["text"] == arguments.get("query")
            check(asked)
    for wrong, message in (({"image": "upload-2"}, "got 'upload-2'. Use a name"), ({}, "expected a text")):
        told = ask(**wrong)
        assert (told.status, message in told.text) == ("error", True), told.text
        with pytest.raises(InputError, match=re.escape(message)):  # LlamaIndex's agents tell it to the model themselves
            llama.call(**wrong)
    plain = create_langchain_tool(LangRetriever(base=pipeline), "find_cards", "Finds cards.")
    assert set(plain.args) == {"query"}
