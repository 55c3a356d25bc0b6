"""The retriever as an agent's tool: text and pictures for the model, decisions and trace as its raw output."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from llama_index.core.base.llms.types import ContentBlock, ImageBlock, TextBlock
from llama_index.core.schema import NodeWithScore
from llama_index.core.tools import FunctionTool, ToolOutput
from pydantic import BaseModel, Field

from llama_index_retrv_r1.nodes import RankedNode
from llama_index_retrv_r1.retriever import RetrvR1Retriever
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.plain import artifact
from retrv_r1_retriever.shown import PICTURE, PictureOf, for_a_model, named_picture


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
) -> FunctionTool:
    """A tool whose `ToolOutput.raw_output` is plain JSON: status, decisions, trace. LlamaIndex's own flattens nodes to text.

    image_tokens: what the pictures of one answer may cost the model that looks at them, an estimate; 0 = text only
    picture_of: gives the tool an argument `image`; from a name that the model says to the picture, None = there is none
    The text says when nothing was reranked or nothing fits: an agent must be able to tell.
    """

    def search(query: str = "", image: str | None = None) -> ToolOutput:
        found = retriever.retrieve(query, image=named_picture(image, picture_of))
        return run(_output(retriever, name, query, found, image_tokens))

    async def asearch(query: str = "", image: str | None = None) -> ToolOutput:
        found = await retriever.aretrieve(query, image=named_picture(image, picture_of))
        return await _output(retriever, name, query, found, image_tokens)

    return FunctionTool.from_defaults(
        fn=search,
        async_fn=asearch,
        name=name,
        description=description,
        fn_schema=ToolInput if picture_of is None else PictureInput,
        callback=lambda output: output,  # or LlamaIndex wraps it into an output of its own, as a string
    )


async def _output(
    retriever: RetrvR1Retriever, name: str, query: str, found: Sequence[NodeWithScore], image_tokens: int
) -> ToolOutput:
    results = found[0].results if found and isinstance(found[0], RankedNode) else None  # None: nothing was found
    if results is None:
        return ToolOutput(content="Nothing found.", tool_name=name, raw_input={"query": query}, raw_output=None)
    text, pictures = await for_a_model(results, retriever.images, tokens=image_tokens)
    blocks: list[ContentBlock] = [TextBlock(text=text)]
    for picture in pictures:
        blocks.append(TextBlock(text=f"Picture of [{picture.id}]:"))
        blocks.append(ImageBlock(image=base64.b64encode(picture.data), image_mimetype=picture.mime_type))
    return ToolOutput(tool_name=name, blocks=blocks, raw_input={"query": query}, raw_output=artifact(results))
