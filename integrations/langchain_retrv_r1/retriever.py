"""`RetrvR1Retriever`: a LangChain retriever around a vector store, another retriever, or this package's own pipeline."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForRetrieverRun,
    CallbackManager,
    CallbackManagerForRetrieverRun,
)
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict, InstanceOf, SkipValidation, model_validator

from langchain_retrv_r1.checks import call_options, check_base, check_count
from langchain_retrv_r1.documents import OWN, TEXT_ONLY, RankedDocuments, check_mapping, picture_key, to_documents
from langchain_retrv_r1.events import reporter
from langchain_retrv_r1.first_stage import DocumentStage
from retrv_r1_retriever import Embedder, ImageSource, LocalImages, PayloadSchema, Query, RerankOptions
from retrv_r1_retriever import RetrvR1Retriever as CoreRetriever
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.options import check_reach
from retrv_r1_retriever.reranker import as_query
from retrv_r1_retriever.retriever import Reranker, as_reranker
from retrv_r1_retriever.types import ImageInput


class RetrvR1Retriever(BaseRetriever):
    """Finds with `base`, decides with `reranker`.

    base: a LangChain vector store or retriever, or a `retrv_r1_retriever.RetrvR1Retriever`, which brings its own reranker
    reranker: a `retrv_r1_retriever.RetrvR1Reranker`
    k: documents returned (`RerankOptions.top_n`); None = all that were ranked
    options: None = those of the reranker, or of our own pipeline
    mapping: where a document's text and picture are: fields `page_content`, `metadata.<key>`, `id`. Default: text only; of
        our own pipeline, whose pictures are written there, `metadata.image`
    embedder: embeds queries in the vector store's place; needed for queries with a picture
    instruction: the task in words, for every query given as text

    `invoke` and `ainvoke` take, per call: `k`; `filter`, of the kind that `base` takes; `image`; `options`. They return
    `RankedDocuments`. Raises what the core raises.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    base: SkipValidation[VectorStore | BaseRetriever | CoreRetriever]
    reranker: SkipValidation[Reranker | None] = None
    k: int | None = None
    options: InstanceOf[RerankOptions] | None = None
    mapping: SkipValidation[PayloadSchema | None] = None
    embedder: SkipValidation[Embedder | None] = None
    instruction: str | None = None

    @model_validator(mode="after")
    def _check(self) -> RetrvR1Retriever:
        check_base(self.base, self.reranker, self.embedder)
        check_mapping(self._mapping)
        if isinstance(self.base, CoreRetriever):
            picture_key(self._mapping)
        else:
            as_reranker(self.reranker)
        check_count("k", self.k)
        return self

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        filter: Any = None,
        image: ImageInput | None = None,
        options: RerankOptions | None = None,
    ) -> RankedDocuments:
        asked, options = as_query(query, image, self.instruction), self._options(k, options)
        return run(self._retrieve(asked, filter, options, run_manager.get_child()))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        filter: Any = None,
        image: ImageInput | None = None,
        options: RerankOptions | None = None,
    ) -> RankedDocuments:
        asked, options = as_query(query, image, self.instruction), self._options(k, options)
        return await self._retrieve(asked, filter, options, run_manager.get_child())

    async def _retrieve(
        self, query: Query, filter: Any, options: RerankOptions, callbacks: AsyncCallbackManager | CallbackManager
    ) -> RankedDocuments:
        progress = reporter(callbacks)
        if isinstance(self.base, CoreRetriever):
            results = await self.base.aretrieve(query, filter=filter, options=options, progress=progress)
            return to_documents(results, None, self._mapping)
        stage = DocumentStage(self.base, self.embedder, self._mapping, callbacks)
        core = CoreRetriever(first_stage=stage, reranker=self.reranker, images=self.images)
        results = await core.aretrieve(query, filter=filter, options=options, progress=progress)
        return to_documents(results, stage.found, self._mapping, options.top_n)

    def _options(self, k: int | None, options: RerankOptions | None) -> RerankOptions:
        default = self.options or getattr(self.base if self.reranker is None else self.reranker, "options", None)
        asked = call_options("k", k, options, self.k, default)
        check_reach("k", asked)
        return asked

    @property
    def images(self) -> ImageSource:
        """Where the pictures of queries and documents are read from."""
        return getattr(self.reranker or self.base, "images", None) or LocalImages()

    @property
    def _mapping(self) -> PayloadSchema:
        return self.mapping or (OWN if isinstance(self.base, CoreRetriever) else TEXT_ONLY)
