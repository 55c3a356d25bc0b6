"""The retriever as an agent's tool: text for the model, the trace as the message's artifact."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import Callbacks  # read at run time: the tool looks at its functions' annotations
from langchain_core.tools import StructuredTool
from pydantic import BaseModel, Field

from langchain_retrv_r1.retriever import RetrvR1Retriever
from retrv_r1_retriever import RankedResult, RankedResults, Status


class ToolInput(BaseModel):
    query: str = Field(description="what to look for")


def create_retriever_tool(retriever: RetrvR1Retriever, name: str, description: str) -> StructuredTool:
    """As `langchain_core.tools.create_retriever_tool`, with `ToolMessage.artifact` as plain JSON: status, decisions, trace.

    The text says when nothing was reranked or nothing fits: an agent must be able to tell.
    """

    def search(query: str, callbacks: Callbacks = None) -> tuple[str, dict[str, Any]]:
        return _answer(retriever.invoke(query, config={"callbacks": callbacks}))

    async def asearch(query: str, callbacks: Callbacks = None) -> tuple[str, dict[str, Any]]:
        return _answer(await retriever.ainvoke(query, config={"callbacks": callbacks}))

    return StructuredTool(
        name=name,
        description=description,
        func=search,
        coroutine=asearch,
        args_schema=ToolInput,
        response_format="content_and_artifact",
    )


def _answer(documents: Any) -> tuple[str, dict[str, Any]]:
    results: RankedResults = documents.results
    return "\n".join([*_remarks(results), *map(_line, results)]), documents.artifact


def _remarks(results: RankedResults) -> list[str]:
    if not len(results):
        return ["Nothing found."]
    if results.status is Status.FALLBACK:
        return [f"Not reranked, in the order of the first search: {results.reason}"]
    return ["None of these fits the query; the nearest first:"] if results.none_chosen else []


def _line(result: RankedResult) -> str:
    """Number, id and text; a picture is named, never written out as a data URI."""
    content = result.document.content
    words = " ".join(filter(None, [content.text, None if content.image is None else "(with a picture)"]))
    return f"{result.rank}. [{result.document.id}] {words}"
