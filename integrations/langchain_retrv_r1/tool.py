"""The retriever as an agent's tool: text and pictures for the model, the trace as the message's artifact."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from langchain_core.callbacks import Callbacks  # read at run time: the tool looks at its functions' annotations
from langchain_core.tools import StructuredTool, ToolException
from pydantic import BaseModel, Field

from langchain_retrv_r1.documents import RankedDocuments
from langchain_retrv_r1.retriever import RetrvR1Retriever
from retrv_r1_retriever import InputError
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.shown import PICTURE, PictureOf, for_a_model, named_picture

Answer: TypeAlias = "tuple[str | list[dict[str, Any]], dict[str, Any]]"


class ToolInput(BaseModel):
    query: str = Field(description="what to look for")


class PictureInput(BaseModel):
    query: str = Field("", description="what to look for, in words; with an image, what should differ, or nothing")
    image: str | None = Field(None, description=PICTURE)


def create_retriever_tool(
    retriever: RetrvR1Retriever,
    name: str,
    description: str,
    *,
    image_tokens: int = 0,
    picture_of: PictureOf | None = None,
) -> StructuredTool:
    """As `langchain_core.tools.create_retriever_tool`, with `ToolMessage.artifact` as plain JSON: status, decisions, trace.

    image_tokens: what the pictures of one answer may cost the model that looks at them, an estimate; 0 = text only
    picture_of: gives the tool an argument `image`; from a name that the model says to the picture, None = there is none
    The text says when nothing was reranked or nothing fits: an agent must be able to tell. Wrong input is an answer that
    says so (`ToolMessage.status` "error"), not an exception that ends the agent.
    """

    def search(query: str = "", image: str | None = None, callbacks: Callbacks = None) -> Answer:
        with _told_to_the_model():
            picture = named_picture(image, picture_of)
            found = retriever.invoke(query, config={"callbacks": callbacks}, image=picture)
            return run(_answer(retriever, found, image_tokens))

    async def asearch(query: str = "", image: str | None = None, callbacks: Callbacks = None) -> Answer:
        with _told_to_the_model():
            picture = named_picture(image, picture_of)
            found = await retriever.ainvoke(query, config={"callbacks": callbacks}, image=picture)
            return await _answer(retriever, found, image_tokens)

    return StructuredTool(
        name=name,
        description=description,
        func=search,
        coroutine=asearch,
        args_schema=ToolInput if picture_of is None else PictureInput,
        response_format="content_and_artifact",
        handle_tool_error=True,
    )


@contextmanager
def _told_to_the_model() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise ToolException(str(error)) from error


async def _answer(retriever: RetrvR1Retriever, found: Any, image_tokens: int) -> Answer:
    assert isinstance(found, RankedDocuments)  # what our retriever returns
    text, pictures = await for_a_model(found.results, retriever.images, tokens=image_tokens)
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for picture in pictures:
        encoded = base64.b64encode(picture.data).decode("ascii")
        blocks.append({"type": "text", "text": f"Picture of [{picture.id}]:"})
        blocks.append({"type": "image", "base64": encoded, "mime_type": picture.mime_type})
    return blocks if pictures else text, found.artifact
