"""LlamaIndex: `RetrvR1Retriever` wraps what finds nodes, `RetrvR1Rerank` reorders nodes somebody else found,
`create_retriever_tool` hands the first to an agent.

Everything here converts: nodes and query bundles to our values, the call, ranked results back to the same nodes.
"""

from __future__ import annotations

try:
    import llama_index.core as _core
except ImportError as error:
    from retrv_r1_retriever.errors import missing_extra

    raise missing_extra("llama-index-core", "llamaindex") from error

from llama_index_retrv_r1.nodes import RankedNode, RerankQuery
from llama_index_retrv_r1.postprocessor import RetrvR1Rerank
from llama_index_retrv_r1.retriever import RetrvR1Retriever
from llama_index_retrv_r1.tool import create_retriever_tool

del _core

__all__ = ["RankedNode", "RerankQuery", "RetrvR1Rerank", "RetrvR1Retriever", "create_retriever_tool"]
