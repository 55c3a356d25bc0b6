"""`RetrvR1Rerank`: reorders the nodes a query engine's retriever found."""

from __future__ import annotations

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from llama_index_retrv_r1.events import AnnouncedReranker, dispatcher
from llama_index_retrv_r1.nodes import find_readable, options_of, to_nodes, to_query
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.options import BALANCED, RerankOptions
from retrv_r1_retriever.retriever import Reranker


class RetrvR1Rerank(BaseNodePostprocessor):
    """All nodes in a new order, cut to `options.top_n`; the node objects are the caller's own and are not changed.

    reranker: decides. options: None = the reranker's own; `RerankQuery.options` goes before both
    metadata_mode: which metadata the model reads with a node's text; as embedded, by default
    instruction: the task in words, for every query that brings none
    """

    options: RerankOptions = BALANCED
    metadata_mode: MetadataMode = MetadataMode.EMBED
    instruction: str | None = None
    _reranker: AnnouncedReranker = PrivateAttr()

    def __init__(
        self,
        reranker: Reranker,
        *,
        options: RerankOptions | None = None,
        metadata_mode: MetadataMode = MetadataMode.EMBED,
        instruction: str | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        announced = AnnouncedReranker.of(reranker, options, lambda: self.callback_manager)
        super().__init__(callback_manager=callback_manager or CallbackManager())
        self.options, self.metadata_mode, self.instruction = announced.options, MetadataMode(metadata_mode), instruction
        self._reranker = announced

    @classmethod
    def class_name(cls) -> str:
        return "RetrvR1Rerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return run(self._rerank(nodes, query_bundle))

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return await self._rerank(nodes, query_bundle)

    async def _rerank(self, nodes: list[NodeWithScore], bundle: QueryBundle | None) -> list[NodeWithScore]:
        query, options = to_query(bundle, self.instruction), options_of(bundle, self.options)
        if not nodes:
            return []
        found = find_readable(nodes, self.metadata_mode)
        results = await self._reranker.arerank(query, found.candidates, options=options)
        return to_nodes(results, found.unread, options.top_n)
