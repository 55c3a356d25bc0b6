"""The local engine: transformers in this process."""

import retrv_r1_retriever.model  # noqa: F401  (first: it names the missing extra)
from retrv_r1_retriever.engines.local.engine import LocalEngine

__all__ = ["LocalEngine"]
