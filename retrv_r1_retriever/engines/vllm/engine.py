"""`VllmEngine`: the same reading, thinking and opening as the local engine, with the backbone in a stock vLLM server.

    engine = VllmEngine("./checkpoint", base_url="http://127.0.0.1:8000/v1", model="retrv-r1")

Candidates are compressed here and travel as rows of embeddings between text and pictures (`model/wire.py`). Every request carries
the whole sequence so far; the server's prefix cache makes the old part of it free. What was sampled goes back as the very ids.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.engines.base import CompressedContent, SlotRead
from retrv_r1_retriever.engines.scripted import log_softmax
from retrv_r1_retriever.engines.vllm.check import cached_share, check
from retrv_r1_retriever.engines.vllm.server import Completion, Sampling, Traffic, VllmServer
from retrv_r1_retriever.errors import EngineError, InputError, explain
from retrv_r1_retriever.http import HttpLimits, JsonHttp
from retrv_r1_retriever.model.processing import Chunk
from retrv_r1_retriever.model.wire import Part, Wire, text_tail
from retrv_r1_retriever.prompt import INSPECT_START, KEEP, Prompt
from retrv_r1_retriever.session import GenerateParams, Generation
from retrv_r1_retriever.trace import Segment
from retrv_r1_retriever.types import Content


@dataclass(eq=False, slots=True)
class Handle:
    """One sequence. parts: as sent; recent: the last two sampled ids, for verdict positions; session: its name, see `server.SESSION`."""

    prompt: Prompt
    prompt_tokens: int
    parts: list[Part]
    next_position: int
    recent: tuple[int, int] = (-1, -1)
    closed: bool = False
    session: str = field(default_factory=lambda: uuid.uuid4().hex)


class VllmEngine:
    """`Engine` and `Compressor` over HTTP, with `torch` here only for the compression module.

    checkpoint: the folder that the server serves, or a copy of it: tokenizer, embedding table and compression module are read
    model: the server's name for it (`--served-model-name`)
    limits: timeouts and retries of one request; `timeout_s` of the call holds as well
    check: ask the server with a tiny request now, so that a missing flag is an error here and not at the first query
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        base_url: str,
        model: str,
        api_key: str | None = None,
        limits: HttpLimits | None = None,
        check: bool = True,
    ) -> None:
        """Raises `CheckpointError`, and with `check` `ServerError` or `EngineError`."""
        self.wire = Wire.from_pretrained(checkpoint)
        self._processor = self.wire.processor
        self._http = JsonHttp(base_url, api_key=api_key, limits=limits)
        self._server = VllmServer(self._http, model)
        self._keep_id = self._processor.tokenise(f" {KEEP}")[0]
        self._inspect_id = self._processor.token_id(INSPECT_START)
        self._slot_of = {token: slot for slot, token in enumerate(self._processor.slot_ids)}
        manifest = self.wire.manifest
        self.max_context: int | None = self.wire.max_context
        self.trained_top_k, self.trained_min_k = manifest.trained_top_k, manifest.trained_min_k
        self.think_margin, self.none_margin = manifest.think_margin, manifest.none_margin
        self.direct_read = manifest.direct_read
        self.memory_digest, self.memory_shape = manifest.memory_digest, self.wire.memory_shape
        self.versions = {
            "engine": "vllm", "checkpoint": manifest.checkpoint_digest, "memory": manifest.memory_digest, "base": manifest.base,
            "model": model, "server": urlsplit(base_url).netloc.rpartition("@")[2],
        }  # fmt: skip
        if check:
            run(self.check())

    async def check(self) -> None:
        """What the server cannot do, as an `EngineError` that names the flag. Learns the server's version and context."""
        found = await check(self._server, self.wire)
        self.versions["vllm"] = found.version
        if found.max_context is not None:
            self.max_context = min(self.wire.max_context, found.max_context)

    async def cached_share(self) -> float | None:
        """Share of a prompt, sent twice, that the server had kept; None where it does not say."""
        return await cached_share(self._server, self.wire)

    @property
    def traffic(self) -> Traffic:
        return self._server.traffic

    def compress(self, contents: Sequence[Content]) -> list[CompressedContent]:
        """Candidate memory, made here: loads the vision tower at the first picture."""
        return self.wire.compress(contents)

    async def aclose(self) -> None:
        await self._http.aclose()

    # -- the engine --------------------------------------------------------------------------------------------------

    async def open(self, prompt: Prompt) -> Handle:
        """Compresses the candidates; nothing is sent yet."""
        return await asyncio.to_thread(self._opened, prompt)

    async def append(self, handle: Handle, segments: Sequence[Segment]) -> None:
        if segments:
            chunk = await asyncio.to_thread(self._processor.chunk, segments, handle.prompt, handle.next_position)
            await self._extend(handle, chunk)
            handle.recent = (-1, -1)

    async def generate(self, handle: Handle, params: GenerateParams) -> Generation:
        allowed = tuple(map(self._processor.token_id, params.allowed))
        stop = {self._processor.token_id(token): token for token in params.stop}
        done = await self._complete(
            handle,
            handle.parts,
            Sampling(
                params.max_new_tokens,
                tuple(stop),
                allowed,
                allowed or (self._keep_id,),
                params.temperature,
                params.seed,
            ),
        )
        generation = self._generation(handle, done, allowed, stop)
        await self._extend(handle, Chunk.plain(done.ids, handle.next_position))
        handle.recent = (*handle.recent, *done.ids)[-2:]  # type: ignore[assignment]
        return generation

    async def probe(self, handle: Handle, suffix: str) -> SlotRead:
        slots = tuple(map(self._processor.token_id, handle.prompt.slots))
        chunk = Chunk.plain(self._processor.tokenise(suffix), handle.next_position)
        forked = [*handle.parts, *self.wire.parts(chunk, text_tail(handle.parts))]
        done = await self._complete(handle, forked, Sampling(1, allowed=slots, read=slots))
        return SlotRead(log_softmax([done.read[0][slot] for slot in slots]))

    async def close(self, handle: Handle) -> None:
        """Nothing is held on the server."""
        handle.closed = True

    def _opened(self, prompt: Prompt) -> Handle:
        chunk, limit = self._processor.chunk(prompt.segments, prompt), self.max_context
        if limit is not None and len(chunk) >= limit:
            fix = "Shorten the query, or lower top_k."
            raise InputError(explain("prompt", expected=f"fewer than {limit} tokens", got=len(chunk), fix=fix))
        return Handle(prompt, len(chunk), self.wire.parts(chunk), chunk.next_position)

    # -- sending -----------------------------------------------------------------------------------------------------

    async def _extend(self, handle: Handle, chunk: Chunk) -> None:
        handle.parts += await asyncio.to_thread(self.wire.parts, chunk, text_tail(handle.parts))
        handle.next_position = chunk.next_position

    async def _complete(self, handle: Handle, parts: Sequence[Part], sampling: Sampling) -> Completion:
        if handle.closed:
            raise EngineError("handle: expected an open one, got a closed one. Open the prompt again.")
        return await self._server.complete(parts, sampling, handle.session)

    def _generation(
        self, handle: Handle, done: Completion, allowed: Sequence[int], stop: Mapping[int, str]
    ) -> Generation:
        text = str(self._processor.tokenizer.decode(done.ids, skip_special_tokens=False))
        stopped = stop.get(done.ids[-1])
        if not allowed:
            tracked = tuple(self._verdicts(handle, done))
            return Generation(text, len(done.ids), stopped, done.ids, done.logprobs, tracked)
        slots = log_softmax([done.read[0][slot] for slot in allowed])
        picked = slots[allowed.index(done.ids[0])]
        return Generation(text, 1, stopped, done.ids, (picked,), slot_logprobs=slots)

    def _verdicts(self, handle: Handle, done: Completion) -> list[tuple[int, float]]:
        """(slot, log p(keep)) after every label outside an inspection request, as the local engine tracks it."""
        ids = (*handle.recent, *done.ids)
        return [
            (self._slot_of[ids[i + 1]], done.read[i][self._keep_id])
            for i in range(len(done.ids))
            if ids[i + 1] in self._slot_of and ids[i] != self._inspect_id
        ]
