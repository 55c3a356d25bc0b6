"""Retrv-R1 for LangChain: a retriever, a document compressor, and a tool that hands the reasoning trace to an agent."""

from __future__ import annotations

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    from retrv_r1_retriever.errors import missing_extra

    raise missing_extra("langchain-core", "langchain") from error

from langchain_retrv_r1.compressor import RetrvR1Reranker
from langchain_retrv_r1.documents import RankedDocuments
from langchain_retrv_r1.retriever import RetrvR1Retriever
from langchain_retrv_r1.tool import create_retriever_tool

__all__ = ["RankedDocuments", "RetrvR1Reranker", "RetrvR1Retriever", "create_retriever_tool"]
