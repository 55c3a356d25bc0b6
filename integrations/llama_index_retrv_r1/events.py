"""The rerank call as LlamaIndex sees it: a span of its own with a start and an end event, and an event of its older callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core import instrumentation
from llama_index.core.callbacks import CallbackManager, CBEventType
from llama_index.core.callbacks import EventPayload as _Of
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent

from llama_index_retrv_r1.nodes import NodeCandidate, to_nodes
from retrv_r1_retriever.images import ImageSource, LocalImages
from retrv_r1_retriever.observe import Observers
from retrv_r1_retriever.options import BALANCED, RerankOptions, as_options
from retrv_r1_retriever.progress import ProgressFn
from retrv_r1_retriever.remote import RemoteReranker
from retrv_r1_retriever.reranker import Candidates, RetrvR1Reranker
from retrv_r1_retriever.retriever import Reranker, as_reranker
from retrv_r1_retriever.types import Query, RankedResults

dispatcher = instrumentation.get_dispatcher(__package__)  # type: ignore[attr-defined]  # re-exported without __all__


@dataclass(frozen=True)
class AnnouncedReranker:
    """A reranker of `NodeCandidate`s that announces what it does.

    images, options: where a call names none; callbacks: asked at each call, since query engines put in their own
    """

    reranker: Reranker
    images: ImageSource
    options: RerankOptions
    callbacks: Callable[[], CallbackManager]

    @classmethod
    def of(
        cls, reranker: Reranker | None, options: RerankOptions | None, callbacks: Callable[[], CallbackManager]
    ) -> AnnouncedReranker:
        """With the pictures and options of the reranker itself, as far as it has any."""
        if isinstance(reranker, RetrvR1Reranker | RemoteReranker):
            return cls(reranker, reranker.images, as_options(options, reranker.options), callbacks)
        return cls(as_reranker(reranker), LocalImages(), as_options(options, BALANCED), callbacks)

    @property
    def observers(self) -> Observers:
        """Those of the reranker itself, so that they also watch the search around it."""
        found: Observers = getattr(self.reranker, "observers", ())
        return found

    @dispatcher.span
    async def arerank(
        self,
        query: Query | str,
        candidates: Candidates,
        *,
        options: RerankOptions | None = None,
        progress: ProgressFn | None = None,
    ) -> RankedResults:
        nodes = [c.item for c in candidates if isinstance(c, NodeCandidate)]
        text = query if isinstance(query, str) else query.content.text or ""
        options = options or self.options
        top_n, model = min(options.top_n or len(nodes), len(nodes)), model_name(self.reranker)
        asked: dict[str, Any] = {_Of.NODES: nodes, _Of.MODEL_NAME: model, _Of.QUERY_STR: text, _Of.TOP_K: top_n}
        dispatcher.event(ReRankStartEvent(query=text, nodes=nodes, top_n=top_n, model_name=model))
        with self.callbacks().event(CBEventType.RERANKING, payload=asked) as event:
            results = await self.reranker.arerank(query, candidates, options=options, progress=progress)
            ranked = to_nodes(results)
            event.on_end(payload={_Of.NODES: ranked})
        dispatcher.event(ReRankEndEvent(nodes=ranked))
        return results

    async def arerank_batch(
        self,
        queries: Sequence[Query | str],
        candidates: Sequence[Candidates],
        *,
        options: RerankOptions | None = None,
        concurrency: int = 8,
    ) -> list[RankedResults]:
        return await self.reranker.arerank_batch(queries, candidates, options=options, concurrency=concurrency)


def model_name(reranker: Reranker) -> str:
    versions = reranker.engine.versions if isinstance(reranker, RetrvR1Reranker) else {}
    return " ".join(["retrv-r1", *(versions[key] for key in ("engine", "checkpoint") if key in versions)])
