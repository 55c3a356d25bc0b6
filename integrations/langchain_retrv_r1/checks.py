"""What is wrong with a construction or a call, said before any work is done."""

from __future__ import annotations

import logging

from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore

from langchain_retrv_r1.first_stage import BY_VECTOR
from retrv_r1_retriever import BALANCED, Embedder, OptionsError, RerankOptions
from retrv_r1_retriever import RetrvR1Retriever as CoreRetriever
from retrv_r1_retriever.errors import explain
from retrv_r1_retriever.options import as_options

log = logging.getLogger(__name__)


def check_base(base: object, reranker: object, embedder: object) -> None:
    if not isinstance(base, VectorStore | BaseRetriever | CoreRetriever):
        raise OptionsError(
            explain("base", expected="a LangChain VectorStore or BaseRetriever, or retrv_r1_retriever.RetrvR1Retriever",
                    got=type(base).__name__, fix="Put any other first stage into retrv_r1_retriever.RetrvR1Retriever.")
        )  # fmt: skip
    if isinstance(base, CoreRetriever) and (reranker is not None or embedder is not None):
        fix = "Leave them out, or pass a LangChain vector store as base."
        raise OptionsError(
            explain("base", expected="our own pipeline alone", got="a reranker or embedder beside it", fix=fix)
        )
    if embedder is not None and not hasattr(base, BY_VECTOR):
        fix = "Pass its vector store, or leave embedder out."
        raise OptionsError(
            explain("base", expected=f"a vector store with {BY_VECTOR}", got=type(base).__name__, fix=fix)
        )
    if embedder is not None and not isinstance(embedder, Embedder):
        fix = "Leave it out: the store embeds texts itself. It is for queries with a picture."
        raise OptionsError(
            explain("embedder", expected="a retrv_r1_retriever.Embedder", got=type(embedder).__name__, fix=fix)
        )
    mode = getattr(getattr(base, "retrieval_mode", None), "value", "dense")
    if embedder is not None and mode != "dense":
        log.warning("embedder= searches the dense vectors alone: the sparse half of this %s store is not used", mode)


def check_count(name: str, count: object) -> None:
    """0 documents are never meant."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        fix = "None returns all that were ranked."
        raise OptionsError(explain(name, expected="an integer >= 1 or None", got=repr(count), fix=fix))


def call_options(
    name: str,
    count: int | None,
    options: RerankOptions | None,
    default_count: int | None,
    default: RerankOptions | None,
) -> RerankOptions:
    """The options of one call. The number of documents: the call's own, else its options', else the constructor's."""
    check_count(name, count)
    asked = as_options(options, default or BALANCED)
    if count is None and (options is None or options.top_n is None):
        count = default_count
    return asked if count is None else asked.with_options(top_n=count)
