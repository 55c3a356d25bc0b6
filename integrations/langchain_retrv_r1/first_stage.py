"""A LangChain vector store or retriever as a first stage. One object per call: it keeps the documents it found."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore, VectorStoreRetriever

from langchain_retrv_r1.documents import Found, to_candidates
from retrv_r1_retriever import Candidate, Embedder, Filter, InputError, OptionsError, PayloadSchema, Query
from retrv_r1_retriever.embedders import embed_query
from retrv_r1_retriever.errors import explain

BY_VECTOR = "similarity_search_with_score_by_vector"


class DocumentStage:
    """callbacks: of the running call; their kind says whether `base` is used through its async or its sync methods."""

    def __init__(
        self,
        base: VectorStore | BaseRetriever,
        embedder: Embedder | None,
        mapping: PayloadSchema,
        callbacks: AsyncCallbackManager | CallbackManager,
    ) -> None:
        self.base, self.embedder, self.mapping, self.callbacks = base, embedder, mapping, callbacks
        self.found = Found((), {})

    async def __call__(self, query: Query, *, top_k: int, filter: Any = None) -> Sequence[Candidate]:
        """filter: the base's own kind, handed on unread."""
        if isinstance(filter, Filter):
            fix = "Pass the vector store's own kind, e.g. qdrant_client.models.Filter."
            raise InputError(explain("filter", expected=f"what {_name(self.base)} takes", got="our Filter", fix=fix))
        found = await self._find(query, top_k, filter)
        self.found = to_candidates(found[:top_k], self.mapping)
        return self.found.candidates

    async def _find(self, query: Query, top_k: int, filter: Any) -> list[tuple[Document, float | None]]:
        if self.embedder is None and query.content.image is not None:
            fix = "Pass embedder=, the multimodal one that the collection was written with."
            raise InputError(
                explain(f"search in {_name(self.base)}", expected="a text query", got="a query with an image", fix=fix)
            )
        filters = {} if filter is None else {"filter": filter}
        if isinstance(self.base, BaseRetriever):
            arguments = accepted(self.base, {"k": top_k, **filters})
            config = {"callbacks": self.callbacks}
            return [
                (document, None) for document in await self._call("invoke", query.content.text, config, **arguments)
            ]
        if self.embedder is not None:
            vector = (await embed_query(self.embedder, query)).tolist()
            return list(await asyncio.to_thread(getattr(self.base, BY_VECTOR), vector, k=top_k, **filters))
        return list(await self._call("similarity_search_with_score", query.content.text, k=top_k, **filters))

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:  # kwargs: the base's own
        try:
            if isinstance(self.callbacks, AsyncCallbackManager):
                return await getattr(self.base, f"a{method}")(*arguments, **options)
            return await asyncio.to_thread(getattr(self.base, method), *arguments, **options)
        except NotImplementedError as error:
            fix = "Pass base=store.as_retriever()."
            raise OptionsError(explain(_name(self.base), expected=method, got="none", fix=fix)) from error


def accepted(base: BaseRetriever, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that this retriever takes per call. A filter it would not see, or that would take the place of its own,
    say a tenant's, is an error; `k` is its own affair."""
    if isinstance(base, VectorStoreRetriever):
        if "filter" in arguments and base.search_kwargs.get("filter") is not None:
            fix = "Wrap the vector store, and pass both filters as one."
            raise InputError(
                explain(
                    f"filter for {_name(base)}", expected="none beside that of its search_kwargs", got="one", fix=fix
                )
            )
        return arguments
    names = inspect.signature(base._get_relevant_documents).parameters
    if "filter" in arguments and "filter" not in names:
        fix = "Filter where it is made, or wrap its vector store."
        raise InputError(
            explain(f"filter for {_name(base)}", expected="none", got="one it takes no account of", fix=fix)
        )
    return {name: value for name, value in arguments.items() if name in names}


def _name(base: object) -> str:
    return type(base).__name__
