"""The chat engine on the real server. The miniature is no chat model: what it says is noise, but it must be asked as vLLM allows,
answer as the grammar forces it to, and end in the right status."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from retrv_r1_retriever.engines.chat import ChatEngine
from retrv_r1_retriever.engines.chat.replies import reading_schema
from retrv_r1_retriever.errors import EngineError
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.types import Content, Document, Query, RankedResults, Status
from tests.tiny import picture
from tests.vllm.server import MODEL, Running

pytestmark = pytest.mark.vllm

NEVER = RerankOptions(think="never", timeout_s=200.0)


@dataclass
class Heard:
    """A transport that keeps what went through it."""

    inner: Any
    bodies: list[Mapping[str, Any]] = field(default_factory=list)
    replies: list[Mapping[str, Any]] = field(default_factory=list)

    async def complete(self, body: dict[str, Any]) -> Any:
        self.bodies.append(body)
        answer = await self.inner.complete(body)
        self.replies.append(answer)
        return answer

    async def models(self) -> list[str]:
        return await self.inner.models()


def listening(engine: ChatEngine) -> Heard:
    heard = Heard(engine._server._transport)
    engine._server._transport = heard
    return heard
