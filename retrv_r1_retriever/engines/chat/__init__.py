"""Any vision-language model behind an OpenAI-compatible server, without training (docs/hosted-vlm.md)."""

from retrv_r1_retriever.engines.chat.engine import ChatEngine
from retrv_r1_retriever.engines.chat.messages import Display

__all__ = ["ChatEngine", "Display"]
