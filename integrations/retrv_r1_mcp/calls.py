"""The three tools: arguments to the service's values, the call, and its results as a tool's answer."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from mcp_types import CallToolResult, ContentBlock, TextContent

from retrv_r1_mcp import schema
from retrv_r1_mcp.pictures import ClientPictures, blocks, document_of, handle, links
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.plain import finite
from retrv_r1_retriever.progress import Progress, ProgressFn
from retrv_r1_retriever.reranker import less_time
from retrv_r1_retriever.serving import schema as wire
from retrv_r1_retriever.serving.queue import Queue
from retrv_r1_retriever.serving.requests import ToImage, to_documents, to_filter, to_options, to_query
from retrv_r1_retriever.serving.service import Service
from retrv_r1_retriever.serving.settings import McpConfig, ServeConfig
from retrv_r1_retriever.shown import FULL_SIDE, TEXT_CHARS, Pictures, clipped, in_words, pictures_of
from retrv_r1_retriever.store import Store
from retrv_r1_retriever.types import Document, ImageInput, RankedResult, RankedResults

#: Told to the client while a call runs: how far, and in words.
Report = Callable[[float, str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Calls:
    """limits: [serve]'s; shown: [mcp]'s; queue: calls in the model at the same time, of all sessions"""

    service: Service
    limits: ServeConfig
    shown: McpConfig
    pictures: ClientPictures
    queue: Queue

    async def search(self, tenant: str | None, asked: schema.SearchArguments, report: Report) -> CallToolResult:
        self.service.collection(tenant)
        images = await self.pictures.resolve([asked.image], self._store(tenant))
        query = to_query(_query(asked), self.limits, _as_resolved(images))
        only, options = to_filter(wire.FilterIn(must=asked.where)), self._options(asked)
        with self.queue.admitted():
            async with self.queue.turn(options.timeout_s or self.limits.max_timeout_s) as waited:
                results = await self.service.search(
                    tenant, query, less_time(options, waited), filter=only, progress=_progress(report)
                )
        return await self._answer(results)

    async def rerank(self, tenant: str | None, asked: schema.RerankArguments, report: Report) -> CallToolResult:
        named = [asked.image, *(document.image for document in asked.documents)]
        to_image = _as_resolved(await self.pictures.resolve(named, self._store(tenant)))
        query = to_query(_query(asked), self.limits, to_image)
        documents, options = to_documents(asked.documents, self.limits, to_image), self._options(asked)
        if documents.blank:
            blank = f"documents[{documents.blank[0]}]"
            raise InputError(explain(blank, expected="text, image or id", got="none", fix="Give it one, or drop it."))
        with self.queue.admitted():
            async with self.queue.turn(options.timeout_s or self.limits.max_timeout_s) as waited:
                results = await self.service.rerank(
                    tenant, query, documents, less_time(options, waited), progress=_progress(report)
                )
        return await self._answer(results)

    async def inspect(self, tenant: str | None, asked: schema.InspectArguments, report: Report) -> CallToolResult:
        document = await document_of(self._store(tenant), asked.id)
        facts = schema.Inspected(
            id=document.id, text=document.content.text, picture=handle(document), metadata=_plain(document)
        )
        lines = [f"[{document.id}] {document.content.text or '(no text)'}", f"metadata: {json.dumps(facts.metadata)}"]
        pictures = await self.pictures_of([document], FULL_SIDE)
        return self._result("\n".join(lines), facts, [document], pictures)

    async def pictures_of(self, documents: Sequence[Document], side: int) -> Pictures:
        if self.shown.images != "inline":
            return Pictures()
        return await self.opened(documents, side)

    async def opened(self, documents: Sequence[Document], side: int) -> Pictures:
        """Whatever [mcp] images says: a client that reads a link wants to see it."""
        images, tokens = self.service.reranker.images, self.shown.image_tokens
        return await pictures_of(documents, images, tokens=tokens, side=side)

    def _store(self, tenant: str | None) -> Store | None:
        return self.service.collection(tenant).store if self.service.whole is not None else None

    def _options(self, asked: schema.Asking) -> RerankOptions:
        top_n = min(asked.top_n or self.shown.max_results, self.shown.max_results)
        given = wire.OptionsIn() if asked.think is None else wire.OptionsIn(think=asked.think)
        options = to_options(wire.Request(query="", options=given), self.service.options, self.limits)
        return options.with_options(top_n=min(top_n, options.top_k))

    async def _answer(self, results: RankedResults) -> CallToolResult:
        facts = schema.Answer(
            status=results.status,
            reason=results.reason,
            none_fits=results.none_chosen,
            results=[_result(result) for result in results],
        )
        documents = [result.document for result in results]
        side = 512
        return self._result(in_words(results), facts, documents, await self.pictures_of(documents, side))

    def _result(
        self, text: str, facts: schema.Answer | schema.Inspected, documents: Sequence[Document], pictures: Pictures
    ) -> CallToolResult:
        content: list[ContentBlock] = [TextContent(text="\n".join([text, *pictures.remarks])), *blocks(pictures)]
        if self.shown.images == "link":
            content += links(documents)
        else:
            content += links(document for document in documents if document.id in pictures.left_out)
        return CallToolResult(content=content, structured_content=facts.model_dump(mode="json"))
