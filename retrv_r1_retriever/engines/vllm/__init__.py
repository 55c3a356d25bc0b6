"""A stock vLLM server of a Retrv-R1 checkpoint, over HTTP (docs/serving.md)."""

import retrv_r1_retriever.model  # noqa: F401  (first: it names the missing extra)
from retrv_r1_retriever.engines.vllm.engine import VllmEngine
from retrv_r1_retriever.engines.vllm.server import TEMPLATE

__all__ = ["TEMPLATE", "VllmEngine"]
