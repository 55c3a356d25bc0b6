"""`RetrvR1Retriever`: a LlamaIndex retriever around whatever finds nodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeAlias

from llama_index.core import Settings
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager
from llama_index.core.embeddings.utils import resolve_embed_model
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, QueryType
from llama_index.core.vector_stores.types import BasePydanticVectorStore, MetadataFilters, VectorStoreQueryMode

from llama_index_retrv_r1.events import AnnouncedReranker, dispatcher
from llama_index_retrv_r1.nodes import NodeCandidate, RerankQuery, options_of, to_nodes, to_query
from llama_index_retrv_r1.sources import RetrieverSource, Source, StoreSource, VectorStoreSource
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.embedders import Embedder
from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.options import RerankOptions, as_options, check_reach
from retrv_r1_retriever.retriever import Reranker
from retrv_r1_retriever.retriever import RetrvR1Retriever as Pipeline
from retrv_r1_retriever.store import Filter
from retrv_r1_retriever.types import Candidate, ImageInput, Query

log = logging.getLogger(__name__)

Wrapped: TypeAlias = "BasePydanticVectorStore | BaseRetriever | Pipeline"


class RetrvR1Retriever(BaseRetriever):
    """Nodes found by `base`, reranked.

    base: a LlamaIndex vector store, any LlamaIndex retriever, or `retrv_r1_retriever.RetrvR1Retriever` (our own store; it
        brings its reranker)
    embed_model: for a vector store: LlamaIndex's (`Settings.embed_model` by default) or our own `Embedder`
    options: None = the reranker's; metadata_mode: which metadata the model reads with a node's text
    instruction: the task in words, for every query that brings none
    """

    def __init__(
        self,
        base: Wrapped,
        *,
        reranker: Reranker | None = None,
        embed_model: BaseEmbedding | Embedder | str | None = None,
        query_mode: VectorStoreQueryMode = VectorStoreQueryMode.DEFAULT,
        options: RerankOptions | None = None,
        metadata_mode: MetadataMode = MetadataMode.EMBED,
        instruction: str | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        super().__init__(callback_manager=callback_manager)
        if isinstance(base, Pipeline):
            _check_none(reranker, "reranker", "a RetrvR1Retriever has its own")
            self._reranker = AnnouncedReranker(
                base.reranker, base.images, as_options(options, base.options), lambda: self.callback_manager
            )
        else:
            self._reranker = AnnouncedReranker.of(reranker, options, lambda: self.callback_manager)
        self._source = _source(base, embed_model, query_mode, metadata_mode)
        self._observers = base.observers if isinstance(base, Pipeline) else self._reranker.observers
        self.options, self.instruction = self._reranker.options, instruction
        found = getattr(base, "similarity_top_k", None)
        if isinstance(found, int) and found < self.options.top_k:
            message = (
                "the wrapped retriever finds at most %d nodes (similarity_top_k), fewer than top_k=%d: raise it there"
            )
            log.warning(message, found, self.options.top_k)

    @property
    def images(self) -> ImageSource:
        """Where the pictures of nodes are read from."""
        return self._reranker.images

    def retrieve(
        self,
        str_or_query_bundle: QueryType,
        *,
        image: ImageInput | None = None,
        filters: MetadataFilters | Filter | None = None,
        options: RerankOptions | None = None,
    ) -> list[NodeWithScore]:
        """As any LlamaIndex retriever; `image`, `filters` and `options` are for this call (see `RerankQuery`)."""
        return super().retrieve(_asked(str_or_query_bundle, image, filters, options))

    async def aretrieve(
        self,
        str_or_query_bundle: QueryType,
        *,
        image: ImageInput | None = None,
        filters: MetadataFilters | Filter | None = None,
        options: RerankOptions | None = None,
    ) -> list[NodeWithScore]:
        return await super().aretrieve(_asked(str_or_query_bundle, image, filters, options))

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return run(self._find_and_rank(query_bundle, sync=True))

    @dispatcher.span
    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await self._find_and_rank(query_bundle, sync=False)

    async def _find_and_rank(self, bundle: QueryBundle, sync: bool) -> list[NodeWithScore]:
        unread: list[NodeCandidate] = []

        async def first_stage(query: Query, *, top_k: int, filter: Filter | None = None) -> Sequence[Candidate]:
            found = await self._source.find(query, bundle, top_k, sync)
            unread.extend(found.unread)
            return found.candidates

        query, options = to_query(bundle, self.instruction), options_of(bundle, self.options)
        check_reach("top_n", options)
        pipeline = Pipeline(
            first_stage=first_stage,
            reranker=self._reranker,
            images=self._reranker.images,
            observers=self._observers,
        )
        return to_nodes(await pipeline.aretrieve(query, options=options), unread, options.top_n)


def _asked(
    query: QueryType,
    image: ImageInput | None,
    filters: MetadataFilters | Filter | None,
    options: RerankOptions | None,
) -> QueryBundle:
    """The query with this call's arguments on it, as a bundle that LlamaIndex hands through unread."""
    given = {"image": image, "filters": filters, "options": options}
    given = {name: value for name, value in given.items() if value is not None}
    if not isinstance(query, QueryBundle):
        query = QueryBundle(query)
    if not given:
        return query
    return RerankQuery(**{**vars(query), **given})


def _source(
    wrapped: Wrapped,
    embed_model: BaseEmbedding | Embedder | str | None,
    mode: VectorStoreQueryMode,
    metadata_mode: MetadataMode,
) -> Source:
    if isinstance(wrapped, BasePydanticVectorStore):
        return VectorStoreSource(wrapped, _embed_model(embed_model), mode, MetadataMode(metadata_mode))
    _check_none(embed_model, "embed_model", "only a vector store needs one")
    if isinstance(wrapped, Pipeline):
        return StoreSource(wrapped.first_stage, wrapped.images)
    if isinstance(wrapped, BaseRetriever):
        return RetrieverSource(wrapped, MetadataMode(metadata_mode))
    expected = "a vector store, a BaseRetriever or a retrv_r1_retriever.RetrvR1Retriever"
    raise OptionsError(explain("base", expected=expected, got=type(wrapped).__name__, fix="Pass one of these."))


def _embed_model(given: BaseEmbedding | Embedder | str | None) -> BaseEmbedding | Embedder:
    """A name, "local:BAAI/bge-small-en", is LlamaIndex's own affair."""
    model = Settings.embed_model if given is None else resolve_embed_model(given) if isinstance(given, str) else given
    if not isinstance(model, BaseEmbedding | Embedder):
        fix = "Pass LlamaIndex's, or TextEmbedder(function)."
        raise OptionsError(
            explain("embed_model", expected="a BaseEmbedding or our Embedder", got=type(model).__name__, fix=fix)
        )
    return model


def _check_none(value: object, name: str, why: str) -> None:
    if value is not None:
        raise OptionsError(explain(name, expected="none", got=type(value).__name__, fix=f"Leave it out: {why}."))
