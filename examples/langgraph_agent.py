"""An agent in LangGraph that finds a product card, is shown pictures, and cites what it found; its state survives a checkpoint.

    python examples/langgraph_agent.py

Needs the extra `langchain`, and `pip install langgraph`. It runs offline on the miniature checkpoint. `Scripted` stands where your
chat model goes: it calls the tool once, reads the answer, and cites the card whose words are nearest to the question.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import BaseTool
from langchain_retrv_r1 import RetrvR1Retriever, create_retriever_tool
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

import retrv_r1_retriever as rr
from retrv_r1_retriever.config import Config, collection_spec, open_embedder, open_engine
from retrv_r1_retriever.demo.catalogue import SPLITS, TASKS, make_cards, render


class Scripted(BaseChatModel):
    """In place of a chat model with tools."""

    tool: str = ""

    def bind_tools(self, tools: list[BaseTool], **options: Any) -> Scripted:
        return Scripted(tool=tools[0].name)

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **options: Any) -> Any:
        asked = next(message.text for message in reversed(messages) if isinstance(message, HumanMessage))
        last = messages[-1]
        if isinstance(last, ToolMessage):
            words = set(asked.lower().split())
            lines = re.findall(r"^\d+\. \[(.+?)\] (.*)", last.text, re.MULTILINE)
            id, text = max(lines, key=lambda line: len(words & set(line[1].split())))
            answer = AIMessage(f"That is {text.partition(' (')[0]} [{id}].")
        else:
            call = {"name": self.tool, "args": {"query": asked}, "id": "call-1", "type": "tool_call"}
            answer = AIMessage("", tool_calls=[call])
        return ChatResult(generations=[ChatGeneration(message=answer)])

    @property
    def _llm_type(self) -> str:
        return "scripted"


def build_tool(folder: Path) -> tuple[BaseTool, list[str]]:
    """The tool over twenty indexed cards, and what is written about each."""
    engine, embedder = open_engine(Config()), open_embedder(Config())
    cards = [card for card, stratum in make_cards(SPLITS["test"]) if stratum == "coarse"][:20]
    for i, card in enumerate(cards):
        render(card, random.Random(i)).save(folder / f"{i}.png")
    images, texts = rr.LocalImages(folder), [card.coarse_text for card in cards]
    store = rr.EdgeStore(folder / "index", spec=collection_spec(engine, embedder))
    rr.Indexer(store, embedder, engine, images).index(
        [rr.Document(f"card-{i}", rr.Content(text, f"{i}.png")) for i, text in enumerate(texts)]
    )
    pipeline = rr.RetrvR1Retriever(store=store, embedder=embedder, engine=engine, images=images)
    options = rr.RerankOptions(top_k=20, timeout_s=None)
    retriever = RetrvR1Retriever(base=pipeline, options=options, k=10, instruction=TASKS["t2i"])
    words = "Finds product cards by words. Cite the card you use by its id in square brackets."
    return create_retriever_tool(retriever, "find_cards", words, image_tokens=500), texts


def build_agent(model: BaseChatModel, tool: BaseTool, checkpoints: BaseCheckpointSaver[Any]) -> Any:
    asking = model.bind_tools([tool])
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [asking.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([tool]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    return graph.compile(checkpointer=checkpoints)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        tool, texts = build_tool(Path(name))
        checkpoints = InMemorySaver()  # serialises every state; a database in its place keeps it
        thread: Any = {"configurable": {"thread_id": "1"}}
        build_agent(Scripted(), tool, checkpoints).invoke({"messages": [HumanMessage(texts[7])]}, thread)

        again = build_agent(Scripted(), tool, checkpoints)  # as after a restart: all it knows is in the checkpoint
        messages = again.get_state(thread).values["messages"]
        found = next(message for message in messages if isinstance(message, ToolMessage))
        trace = rr.ReasoningTrace.from_json(json.dumps(found.artifact["trace"]))
        print("asked for card-7:", texts[7])
        print("answer:", messages[-1].text)
        print("status:", found.artifact["status"], "| candidates read:", len(trace.candidates))
        print("pictures shown to the model:", sum(block["type"] == "image" for block in found.content_blocks))
        again.invoke({"messages": [HumanMessage(texts[3])]}, thread)
        print("answer to a second question:", again.get_state(thread).values["messages"][-1].text)


if __name__ == "__main__":
    main()
