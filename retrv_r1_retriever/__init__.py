"""A drop-in reranking retriever: Qdrant finds candidates, a Retrv-R1 model reads, reasons, inspects and decides.

Names are imported when first used, so that `import retrv_r1_retriever` costs nothing and needs no optional dependency.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrv_r1_retriever.edge import EdgeStore
    from retrv_r1_retriever.embedders import Embedder, TextEmbedder
    from retrv_r1_retriever.engines.base import CompressedContent, Compressor, Engine, SlotRead
    from retrv_r1_retriever.errors import (
        CheckpointError,
        EngineError,
        ImageError,
        InputError,
        MissingExtraError,
        NotIndexedError,
        OptionsError,
        RerankTimeout,
        RetrvR1Error,
        SchemaError,
        StaleMemoryError,
        StoreError,
    )
    from retrv_r1_retriever.images import ImageSource, LocalImages
    from retrv_r1_retriever.indexing import Indexer, IndexReport
    from retrv_r1_retriever.options import BALANCED, FAST, THOROUGH, RerankOptions
    from retrv_r1_retriever.points import CollectionSpec
    from retrv_r1_retriever.progress import Progress, ProgressFn
    from retrv_r1_retriever.qdrant import QdrantStore
    from retrv_r1_retriever.remote import RemoteReranker
    from retrv_r1_retriever.reranker import RetrvR1Reranker
    from retrv_r1_retriever.retriever import RetrvR1Retriever
    from retrv_r1_retriever.schema import PayloadSchema
    from retrv_r1_retriever.store import Equals, Filter, FirstStage, OneOf, Range, Store, VectorFirstStage
    from retrv_r1_retriever.trace import ReasoningTrace
    from retrv_r1_retriever.types import (
        Candidate,
        Content,
        Document,
        Memory,
        Query,
        RankedResult,
        RankedResults,
        Signals,
        Status,
        StopReason,
    )

__version__ = "0.1.0"

__all__ = [
    "BALANCED",
    "FAST",
    "THOROUGH",
    "Candidate",
    "CheckpointError",
    "CollectionSpec",
    "CompressedContent",
    "Compressor",
    "Content",
    "Document",
    "EdgeStore",
    "Embedder",
    "Engine",
    "EngineError",
    "Equals",
    "Filter",
    "FirstStage",
    "ImageError",
    "ImageSource",
    "IndexReport",
    "Indexer",
    "InputError",
    "LocalImages",
    "Memory",
    "MissingExtraError",
    "NotIndexedError",
    "OneOf",
    "OptionsError",
    "PayloadSchema",
    "Progress",
    "ProgressFn",
    "QdrantStore",
    "Query",
    "Range",
    "RankedResult",
    "RankedResults",
    "ReasoningTrace",
    "RemoteReranker",
    "RerankOptions",
    "RerankTimeout",
    "RetrvR1Error",
    "RetrvR1Reranker",
    "RetrvR1Retriever",
    "SchemaError",
    "Signals",
    "SlotRead",
    "StaleMemoryError",
    "Status",
    "StopReason",
    "Store",
    "StoreError",
    "TextEmbedder",
    "VectorFirstStage",
]

#: Where the names above are defined, looked through in this order. None of these modules imports an optional dependency.
_MODULES = (
    "errors",
    "types",
    "options",
    "trace",
    "progress",
    "engines.base",
    "images",
    "embedders",
    "store",
    "reranker",
    "retriever",
    "remote",
    "schema",
    "points",
    "edge",
    "qdrant",
    "indexing",
)


def __getattr__(name: str) -> object:
    if name in __all__:
        for module in _MODULES:
            found = import_module(f"{__name__}.{module}")
            if hasattr(found, name):
                globals()[name] = getattr(found, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
