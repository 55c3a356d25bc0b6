"""`RetrvR1Reranker`: reorders documents that something else found, as a LangChain document compressor."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager, Callbacks
from langchain_core.documents import Document
from langchain_core.documents.compressor import BaseDocumentCompressor
from langchain_core.runnables.config import (
    RunnableConfig,
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
)
from pydantic import ConfigDict, InstanceOf, SkipValidation, model_validator

from langchain_retrv_r1.checks import call_options, check_count
from langchain_retrv_r1.documents import TEXT_ONLY, check_mapping, to_candidates, to_documents
from langchain_retrv_r1.events import reporter
from retrv_r1_retriever import PayloadSchema, Query, RerankOptions
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.reranker import as_query
from retrv_r1_retriever.retriever import Reranker, as_reranker


class RetrvR1Reranker(BaseDocumentCompressor):
    """Reorders documents; returns marked copies of them as `RankedDocuments`. No documents, no call: `[]`.

    reranker: a `retrv_r1_retriever.RetrvR1Reranker`
    top_n: documents returned (`RerankOptions.top_n`); None = all
    options: None = the reranker's
    mapping: where a document's text and picture are: fields `page_content`, `metadata.<key>`, `id`; default: text only
    instruction: the task in words, for every query given as text
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    reranker: SkipValidation[Reranker]
    top_n: int | None = None
    options: InstanceOf[RerankOptions] | None = None
    mapping: SkipValidation[PayloadSchema] = TEXT_ONLY
    instruction: str | None = None

    @model_validator(mode="after")
    def _check(self) -> RetrvR1Reranker:
        as_reranker(self.reranker)
        check_mapping(self.mapping)
        check_count("top_n", self.top_n)
        return self

    def compress_documents(
        self, documents: Sequence[Document], query: Query | str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """query: text, or a core `Query` with a picture."""
        return run(self._rerank(documents, query, get_callback_manager_for_config(_config(callbacks))))

    async def acompress_documents(
        self, documents: Sequence[Document], query: Query | str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        return await self._rerank(documents, query, get_async_callback_manager_for_config(_config(callbacks)))

    async def _rerank(
        self, documents: Sequence[Document], query: Query | str, callbacks: AsyncCallbackManager | CallbackManager
    ) -> Sequence[Document]:
        if not documents:
            return []
        found = to_candidates(((document, None) for document in documents), self.mapping)
        default = self.options or getattr(self.reranker, "options", None)
        options = call_options("top_n", None, None, self.top_n, default)
        results = await self.reranker.arerank(
            as_query(query, instruction=self.instruction),
            found.candidates,
            options=options,
            progress=reporter(callbacks),
        )
        return to_documents(results, found, self.mapping, options.top_n)


def _config(callbacks: Callbacks | None) -> RunnableConfig:
    """Without callbacks of its own, a compressor inside a chain reports to the chain's."""
    return ensure_config(None if callbacks is None else {"callbacks": callbacks})
