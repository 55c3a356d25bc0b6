"""What finds candidates: a LlamaIndex vector store, any LlamaIndex retriever, or our own first stage."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llama_index.core.base.base_multi_modal_retriever import MultiModalRetriever
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.embeddings.base import BaseEmbedding, mean_agg
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.retrievers import VectorIndexRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from PIL.Image import Image

from llama_index_retrv_r1.filters import to_filter
from llama_index_retrv_r1.nodes import Found, NodeCandidate, RerankQuery, find_readable, to_node
from retrv_r1_retriever.embedders import Embedder, embed_query
from retrv_r1_retriever.errors import InputError, StoreError, explain
from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.reranker import as_candidates
from retrv_r1_retriever.store import Filter, FirstStage
from retrv_r1_retriever.types import Query


class Source(Protocol):
    """query: with its picture decoded; bundle: as the caller gave it; sync: use the framework's sync forms, in a thread."""

    async def find(self, query: Query, bundle: QueryBundle, top_k: int, sync: bool) -> Found: ...


@dataclass(frozen=True, slots=True)
class RetrieverSource:
    """Any LlamaIndex retriever; how many nodes it returns is its own business, more than `top_k` are cut."""

    retriever: BaseRetriever
    metadata_mode: MetadataMode

    async def find(self, query: Query, bundle: QueryBundle, top_k: int, sync: bool) -> Found:
        if _filters(bundle) is not None:
            fix = "Wrap the vector store itself, or give the retriever its filters."
            raise InputError(explain("filters", expected="none beside a wrapped retriever", got="some", fix=fix))
        pictured = query.content.image is not None and bundle.embedding is None
        method = self._by_picture(query, bundle) if pictured else "retrieve"
        plain = QueryBundle(bundle.query_str or "", bundle.image_path, bundle.custom_embedding_strs, bundle.embedding)
        blocks = type(self.retriever)._aretrieve is BaseRetriever._aretrieve
        nodes = await _call(self.retriever, method, plain, sync=sync or blocks)
        return find_readable(nodes[:top_k], self.metadata_mode)

    def _by_picture(self, query: Query, bundle: QueryBundle) -> str:
        """The method that searches with the query's picture. An error where that would be a search without it."""
        kind = type(self.retriever).__name__
        if isinstance(self.retriever, VectorIndexRetriever):
            got = f"{kind}, which searches by text only"
        elif bundle.image_path is None:
            got = "a picture that is no image_path, the one kind that retrievers are handed"
        elif not isinstance(self.retriever, MultiModalRetriever):
            return "retrieve"
        elif query.content.text is None:
            return "image_to_image_retrieve"
        else:
            got = f"{kind}, which searches by text or by a picture, not by both"
        fix = "Wrap the vector store itself, with a multimodal embed_model, or set QueryBundle.embedding."
        raise InputError(explain("image query", expected="a retriever that reads pictures", got=got, fix=fix))


@dataclass(frozen=True, slots=True)
class VectorStoreSource:
    """A LlamaIndex vector store, as it is: nothing is indexed again or written."""

    store: BasePydanticVectorStore
    embed_model: BaseEmbedding | Embedder
    query_mode: VectorStoreQueryMode
    metadata_mode: MetadataMode

    async def find(self, query: Query, bundle: QueryBundle, top_k: int, sync: bool) -> Found:
        filters = _filters(bundle)
        if isinstance(filters, Filter):
            fix = "Our own Filter is for our own stores."
            raise InputError(explain("filters", expected="MetadataFilters", got="Filter", fix=fix))
        asked = VectorStoreQuery(
            query_embedding=await self._embedding(query, bundle, sync),
            query_str=bundle.query_str,
            similarity_top_k=top_k,
            sparse_top_k=top_k,
            hybrid_top_k=top_k,
            mode=self.query_mode,
            filters=filters,
        )
        found = await self._query(asked, sync)
        scores: Sequence[float | None] = found.similarities or [None] * len(found.nodes or ())
        nodes = [NodeWithScore(node=n, score=s) for n, s in zip(found.nodes or (), scores, strict=True)]
        return find_readable(nodes[:top_k], self.metadata_mode)

    async def _query(self, asked: VectorStoreQuery, sync: bool) -> VectorStoreQueryResult:
        store = self.store
        blocks = type(store).aquery is BasePydanticVectorStore.aquery or getattr(store, "_aclient", store) is None
        only_async = getattr(store, "_client", store) is None
        try:
            answer: VectorStoreQueryResult = await _call(
                store, "query", asked, sync=blocks or (sync and not only_async)
            )
        except Exception as error:
            raise StoreError(
                explain(
                    type(store).__name__, expected="an answer", got=f"{type(error).__name__}: {error}",
                    fix="Check that it runs, that embed_model is the one the collection was written with, and, where LlamaIndex "
                        "did not write it, that text_key names the payload's text.",
                )
            ) from error  # fmt: skip
        if answer.nodes is None:
            fix = "Wrap index.as_retriever() instead, which reads the nodes from the docstore."
            raise StoreError(explain(type(store).__name__, expected="nodes", got="only their ids", fix=fix))
        return answer

    async def _embedding(self, query: Query, bundle: QueryBundle, sync: bool) -> list[float]:
        """The bundle's own, or the model's; text and picture are averaged, as LlamaIndex does with several texts."""
        if bundle.embedding is not None:
            return bundle.embedding
        model, image = self.embed_model, query.content.image
        if not isinstance(model, BaseEmbedding):
            vector: list[float] = (await embed_query(model, query)).tolist()
            return vector
        parts: list[Any] = []
        if texts := [text for text in bundle.embedding_strs if text.strip()]:
            parts.append(await _call(model, "get_agg_embedding_from_queries", texts, sync=sync))
        if image is not None:
            if not isinstance(model, MultiModalEmbedding):
                fix = "Pass a MultiModalEmbedding, our own embedder, or QueryBundle.embedding; or drop the image."
                got = f"{type(model).__name__}, which reads text only"
                raise InputError(explain("image query", expected="a multimodal embed_model", got=got, fix=fix))
            parts.append(await _call(model, "get_image_embedding", _png(image), sync=sync))
        return parts[0] if len(parts) == 1 else mean_agg(parts)


@dataclass(frozen=True, slots=True)
class StoreSource:
    """Our own first stage; its documents become nodes, and keep their memory."""

    first_stage: FirstStage
    images: ImageSource

    async def find(self, query: Query, bundle: QueryBundle, top_k: int, sync: bool) -> Found:
        found = await self.first_stage(query, top_k=top_k, filter=to_filter(_filters(bundle)))
        return Found(
            tuple(
                NodeCandidate(
                    document=c.document, retrieval_score=c.retrieval_score, rank=c.rank, memory=c.memory,
                    item=NodeWithScore(node=to_node(c.document, self.images), score=c.retrieval_score),
                )
                for c in as_candidates(tuple(found)[:top_k])
            )
        )  # fmt: skip


def _filters(bundle: QueryBundle) -> MetadataFilters | Filter | None:
    filters = bundle.filters if isinstance(bundle, RerankQuery) else None
    if not isinstance(filters, MetadataFilters | Filter | None):
        fix = "E.g. MetadataFilters(filters=[MetadataFilter(key='shop', value=1)])."
        raise InputError(explain("filters", expected="MetadataFilters", got=type(filters).__name__, fix=fix))
    return filters


async def _call(owner: object, method: str, *arguments: object, sync: bool) -> Any:
    """A method of the framework in its sync form, off the event loop, or in its async form, named with an `a`."""
    if sync:
        return await asyncio.to_thread(getattr(owner, method), *arguments)
    return await getattr(owner, f"a{method}")(*arguments)


def _png(image: object) -> io.BytesIO:
    """LlamaIndex's embedders take a path or a buffer; the picture was decoded before the first stage."""
    assert isinstance(image, Image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    buffer.seek(0)
    return buffer
