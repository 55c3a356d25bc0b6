"""Can this server do what the engine asks of it? A few tiny requests tell; what it refuses says which flag is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from retrv_r1_retriever.engines.vllm.server import Sampling, VllmServer
from retrv_r1_retriever.errors import EngineError, explain
from retrv_r1_retriever.model.wire import Part, TextPart, Wire
from retrv_r1_retriever.prompt import ANSWER_START, LABELS, Prompt
from retrv_r1_retriever.trace import Forced, QueryImage, Segment, Text
from retrv_r1_retriever.types import Content, Query

#: Nats between one prompt sent as text and as rows. Ours: bfloat16 rounding stays below, other weights rarely do.
SAME = 0.25
_LONGEST_BLOCK = 128  # tokens: vLLM caches whole blocks, of 16 on a GPU and of 128 on a CPU


@dataclass(frozen=True, slots=True)
class Found:
    """max_context: tokens that one request can hold, None = not said; difference: see `SAME`"""

    version: str
    max_context: int | None
    difference: float


async def check(server: VllmServer, wire: Wire) -> Found:
    """Raises `ServerError`, or `EngineError` naming what is missing and how to get it."""
    parts = wire.parts(wire.processor.chunk(_SEGMENTS, _PROMPT))
    as_text = await _slots(server, wire, parts)
    as_rows = await _slots(server, wire, [wire.as_rows(p) if isinstance(p, TextPart) else p for p in parts])
    difference = max(abs(a - b) for a, b in zip(as_text, as_rows, strict=True))
    if not difference <= SAME:  # also where it is no number
        got = f"log-probabilities that differ by {difference:.3g} when a prompt comes as rows"
        fix = "Serve the very checkpoint that is read here."
        raise EngineError(explain("the server's weights", expected="those of our checkpoint", got=got, fix=fix))
    models = await server.models()
    return Found(await server.version(), models.get(server.model), difference)


async def cached_share(server: VllmServer, wire: Wire) -> float | None:
    """Share of a prompt, sent twice, that the server had kept; None where it does not say."""
    word = wire.processor.tokenise(LABELS[0])
    part = TextPart(LABELS[0] * 2 * _LONGEST_BLOCK, tuple(word) * 2 * _LONGEST_BLOCK)
    await server.complete([part], Sampling(1))
    again = await server.complete([part], Sampling(1))
    return None if again.cached_tokens is None else again.cached_tokens / again.prompt_tokens


_PROMPT = Prompt(Query(Content(image=Image.new("RGB", (64, 64), "gray"))), (), ())
_SEGMENTS: tuple[Segment, ...] = (
    Text(f"<|im_start|>user\n{LABELS[0]}\nQuery:"), QueryImage(), Text("<|im_end|>\n<|im_start|>assistant\n"), Forced(ANSWER_START),
)  # fmt: skip


async def _slots(server: VllmServer, wire: Wire, parts: Sequence[Part]) -> list[float]:
    """Of one token: log-probabilities of all labels and none, as many as any prompt can ask for."""
    slots = wire.processor.slot_ids
    done = await server.complete(parts, Sampling(1, allowed=slots, read=slots))
    return [done.read[0][slot] for slot in slots]
