"""The three tools: arguments to the service's values, the call, and its results as a tool's answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from mcp_types import CallToolResult, ContentBlock, TextContent

from retrv_r1_mcp import schema
from retrv_r1_mcp.pictures import ClientPictures, blocks, document_of, handle, links
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.progress import Progress, ProgressFn
from retrv_r1_retriever.reranker import less_time
from retrv_r1_retriever.serving import schema as wire
from retrv_r1_retriever.serving.queue import Queue
from retrv_r1_retriever.serving.requests import ToImage, to_documents, to_filter, to_options, to_query
from retrv_r1_retriever.serving.service import Service
from retrv_r1_retriever.serving.settings import McpConfig, ServeConfig
from retrv_r1_retriever.shown import FULL_SIDE, LIST_SIDE, TEXT_CHARS, Pictures, clipped, in_words, pictures_of
from retrv_r1_retriever.store import Store
from retrv_r1_retriever.trace import finite
from retrv_r1_retriever.types import Document, ImageInput, RankedResult, RankedResults

#: Told to the client while a call runs: a number that rises, and what is being done.
Report = Callable[[float, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Calls:
    """limits: [serve]'s; shown: [mcp]'s; queue: bounds the calls in the model, of all sessions together."""

    service: Service
    limits: ServeConfig
    shown: McpConfig
    pictures: ClientPictures
    queue: Queue

    async def search(self, tenant: str | None, asked: schema.SearchArguments, report: Report) -> CallToolResult:
        to_image = _resolved(await self.pictures.resolve([asked.image], self.store(tenant)))
        query, only = to_query(_query(asked), self.limits, to_image), to_filter(wire.FilterIn(must=asked.where))
        async with self._turn(asked) as options:
            results = await self.service.search(tenant, query, options, filter=only, progress=_progress(report))
        return await self._ranked(results, asked)

    async def rerank(self, tenant: str | None, asked: schema.RerankArguments, report: Report) -> CallToolResult:
        named = [asked.image, *(document.image for document in asked.documents)]
        to_image = _resolved(await self.pictures.resolve(named, self.store(tenant)))
        query = to_query(_query(asked), self.limits, to_image)
        documents = to_documents(asked.documents, self.limits, to_image)
        if documents.blank:
            first = f"documents[{documents.blank[0]}]"
            raise InputError(explain(first, expected="text, image or id", got="none", fix="Give it one, or drop it."))
        async with self._turn(asked) as options:
            results = await self.service.rerank(tenant, query, documents, options, progress=_progress(report))
        return await self._ranked(results, asked)

    async def inspect(self, tenant: str | None, asked: schema.InspectArguments, report: Report) -> CallToolResult:
        document = await document_of(self.store(tenant), asked.id)
        facts = schema.Inspected(
            id=document.id, text=document.content.text, picture=handle(document), metadata=_metadata(document)
        )
        words = f"[{document.id}] {document.content.text or '(no text)'}\nmetadata: {json.dumps(facts.metadata)}"
        return await self._result(words, facts, [document], FULL_SIDE)

    async def picture(self, document: Document) -> Pictures:
        """Of a document whose link the client reads."""
        images, tokens = self.service.reranker.images, self.shown.image_tokens
        return await pictures_of([document], images, tokens=tokens, side=FULL_SIDE)

    def store(self, tenant: str | None) -> Store | None:
        """What this tenant may see of the collection; None on a server without one."""
        return self.service.collection(tenant).store if self.service.whole is not None else None

    @asynccontextmanager
    async def _turn(self, asked: schema.Asking) -> AsyncIterator[RerankOptions]:
        """A place in the model; gives the options with what is left of the time."""
        given = wire.OptionsIn() if asked.think is None else wire.OptionsIn(think=asked.think)
        options = to_options(wire.Request(query="", options=given), self.service.options, self.limits)
        assert options.timeout_s is not None  # `to_options`
        with self.queue.admitted():
            async with self.queue.turn(options.timeout_s) as waited:
                yield less_time(options, waited)

    async def _ranked(self, ranked: RankedResults, asked: schema.Asking) -> CallToolResult:
        """The best of them; how many there are beside is said."""
        most = self.shown.max_results
        results = replace(ranked, results=ranked.results[: min(asked.top_n or most, most)])
        left_out = len(ranked) - len(results)
        facts = schema.Answer(
            status=results.status,
            reason=results.reason,
            none_fits=results.none_chosen,
            results=[_result(result) for result in results],
            left_out=left_out,
        )
        words = in_words(results) + (f"\nRanked lower and not shown: {left_out} more." if left_out else "")
        return await self._result(words, facts, [result.document for result in results], LIST_SIDE)

    async def _result(
        self, words: str, facts: schema.Answer | schema.Inspected, documents: Sequence[Document], side: int
    ) -> CallToolResult:
        pictures, linked = Pictures(), documents if self.shown.images == "link" else []
        if self.shown.images == "inline":
            images, tokens = self.service.reranker.images, self.shown.image_tokens
            pictures = await pictures_of(documents, images, tokens=tokens, side=side)
            linked = [document for document in documents if document.id in pictures.left_out]
        content: list[ContentBlock] = [TextContent(text="\n".join([words, *pictures.remarks]))]
        content += [*blocks(pictures), *links(linked)]
        return CallToolResult(content=content, structured_content=facts.model_dump(mode="json"))


def _query(asked: schema.Asking) -> wire.QueryIn:
    return wire.QueryIn(text=asked.query, image=asked.image, instruction=asked.instruction)


def _resolved(images: Mapping[str, ImageInput]) -> ToImage:
    return lambda _, named: images[named]


def _progress(report: Report) -> ProgressFn:
    """Steps counted up: how many there will be depends on what the model opens."""
    step = 0

    async def tell(progress: Progress) -> None:
        nonlocal step
        step += 1
        words = {
            "retrieved": f"{progress.candidates} candidates found",
            "thinking": "thinking",
            "opened": f"looked at [{progress.id}]",
            "answered": "decided",
        }
        await report(step, words[progress.stage])

    return tell


def _result(result: RankedResult) -> schema.ResultOut:
    document, text = result.document, result.document.content.text
    metadata = _metadata(document)
    return schema.ResultOut(
        rank=result.rank,
        id=document.id,
        text=None if text is None else clipped(text),
        picture=handle(document),
        metadata=metadata if len(json.dumps(metadata)) <= TEXT_CHARS else None,
        score=result.score,
        chosen=result.selected,
        opened=result.signals.opened,
        verdict=result.signals.verdict,
    )


def _metadata(document: Document) -> dict[str, Any]:
    """What is not JSON as a string."""
    plain: dict[str, Any] = json.loads(json.dumps(finite(dict(document.metadata)), default=str))
    return plain
