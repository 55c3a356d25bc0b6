"""The local engine: transformers in this process."""

from retrv_r1_retriever.engines.local.engine import LocalEngine

__all__ = ["LocalEngine"]
