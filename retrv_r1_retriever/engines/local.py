"""The local engine: transformers in this process, one worker thread, continuous batching over a pooled KV cache.

Every handle owns one row of the pool; its length is a pointer. A probe writes past the pointer and leaves it where it was, so a fork
costs nothing and nothing is computed twice. Handles of different queries, at different lengths, share each forward pass.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from retrv_r1_retriever.engines.base import CompressedContent, SlotRead
from retrv_r1_retriever.engines.kv import KvPool, StepCache
from retrv_r1_retriever.errors import EngineError, InputError, explain
from retrv_r1_retriever.model.checkpoint import Checkpoint, load_checkpoint
from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.processing import Chunk, collate
from retrv_r1_retriever.prompt import INSPECT_START, KEEP, Prompt
from retrv_r1_retriever.session import GenerateParams, Generation
from retrv_r1_retriever.trace import Segment
from retrv_r1_retriever.types import Content

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Handle:
    """One prompt's state. pending: appended but not yet read; recent: the last two sampled ids, for verdict positions."""

    prompt: Prompt
    prompt_tokens: int
    pending: list[Chunk]
    next_position: int
    row: int | None = None  # taken by the worker at the first read: only the worker resizes the pool
    length: int = 0
    recent: tuple[int, int] = (-1, -1)
    generator: torch.Generator | None = None
    closed: bool = False


@dataclass(eq=False, slots=True)
class _Job:
    """One generate or probe call in flight."""

    handle: Handle
    future: Future[Any]
    params: GenerateParams | None  # None: a probe
    allowed: Tensor | None
    suffix: Chunk | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tracked: list[tuple[int, float]] = field(default_factory=list)
    slot_logprobs: tuple[float, ...] | None = None


class LocalEngine:
    """`Engine` and `Compressor` on one model in this process. CPU or CUDA; bfloat16 on CUDA, float32 on CPU by default.

    max_batch_tokens: most prompt tokens read in one forward pass
    forward_tokens: tokens read so far over all handles (tests count them)
    encoded_pictures: pictures passed through the tower at query time so far
    """

    def __init__(self, checkpoint: Checkpoint, *, max_batch_tokens: int = 8192) -> None:
        self._checkpoint = checkpoint
        self._model = checkpoint.model.eval()
        self._processor = checkpoint.processor
        self._max_batch_tokens = max_batch_tokens
        self._pool = KvPool(self._model.config.text_config, self._model.device, self._model.dtype)
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed: list[Handle] = []
        self._slot_of = {token: slot for slot, token in enumerate(self._processor.slot_ids)}
        self._keep_id = self._processor.tokenise(f" {KEEP}")[0]
        self._inspect_id = self._processor.token_id(INSPECT_START)
        self._eos_id = self._model.config.text_config.eos_token_id
        self.forward_tokens = 0
        self.encoded_pictures = 0

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | None = None, dtype: str | None = None, max_batch_tokens: int = 8192
    ) -> LocalEngine:
        """path: a checkpoint directory (`retrv/` inside). device None = CUDA if there is one."""
        return cls(load_checkpoint(path, device=device, dtype=dtype), max_batch_tokens=max_batch_tokens)

    @property
    def max_context(self) -> int | None:
        return int(self._model.config.text_config.max_position_embeddings)

    @property
    def think_margin(self) -> float | None:
        return self._checkpoint.manifest.think_margin

    @property
    def versions(self) -> dict[str, str]:
        manifest = self._checkpoint.manifest
        return {
            "engine": "local", "checkpoint": manifest.checkpoint_digest, "memory": manifest.memory_digest,
            "base": manifest.base, "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip

    @property
    def memory_digest(self) -> str:
        return self._checkpoint.manifest.memory_digest

    @property
    def memory_shape(self) -> tuple[int, int]:
        icm = self._model.config.icm_config
        return icm.memory_rows or int(self._model.config.text_config.max_position_embeddings), icm.width

    def compress(self, contents: Sequence[Content], batch_size: int = 64) -> list[CompressedContent]:
        """Candidate memory, exactly `pool(in_proj(T_c) + P)`; pictures must be decoded."""
        out: list[CompressedContent] = []
        for start in range(0, len(contents), batch_size):
            part = contents[start : start + batch_size]
            with torch.inference_mode():
                chunks = [self._processor.content_chunk(c) for c in part]
                embeds = self._embed(chunks)
                rows = [self._model.model.icm.memory(e[: len(c)]) for c, e in zip(chunks, embeds, strict=True)]
            out += [
                CompressedContent(r.to(torch.float16).cpu().numpy(), self._processor.full_tokens(c))
                for c, r in zip(part, rows, strict=True)
            ]
        return out

    async def open(self, prompt: Prompt) -> Handle:
        chunk = await asyncio.to_thread(self._processor.chunk, prompt.segments, prompt)
        limit = self.max_context
        if limit is not None and len(chunk) >= limit:
            raise InputError(
                explain("prompt", expected=f"fewer than {limit} tokens", got=len(chunk), fix="Lower top_k.")
            )
        return Handle(prompt, len(chunk), [chunk], chunk.next_position)

    async def append(self, handle: Handle, segments: Sequence[Segment]) -> None:
        if segments:
            chunk = await asyncio.to_thread(self._processor.chunk, segments, handle.prompt, handle.next_position)
            handle.pending.append(chunk)
            handle.next_position = chunk.next_position
            handle.recent = (-1, -1)

    async def generate(self, handle: Handle, params: GenerateParams) -> Generation:
        allowed = self._token_ids(params.allowed) if params.allowed else None
        if params.temperature > 0 and handle.generator is None:
            handle.generator = torch.Generator().manual_seed(params.seed)
        result: Generation = await self._submit(_Job(handle, Future(), params, allowed))
        return result

    async def probe(self, handle: Handle, suffix: str) -> SlotRead:
        ids = self._processor.tokenise(suffix)
        chunk = self._plain_chunk(ids, handle.next_position)
        job = _Job(handle, Future(), None, self._token_ids(handle.prompt.slots), chunk)
        result: SlotRead = await self._submit(job)
        return result

    async def close(self, handle: Handle) -> None:
        with self._lock:
            handle.closed = True
            self._closed.append(handle)

    # -- the worker ----------------------------------------------------------------------------------------------------

    async def _submit(self, job: _Job) -> Any:
        if job.handle.closed:
            raise EngineError("handle: expected an open one, got a closed one. Open the prompt again.")
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="retrv-r1-local-engine", daemon=True)
                self._thread.start()
        self._jobs.put(job)
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            job.future.cancel()  # the worker drops it before its next step
            raise

    def _work(self) -> None:
        active: list[_Job] = []
        while True:
            try:
                active += self._collect(block=not active)
                active = [j for j in active if not (j.future.cancelled() or j.handle.closed)]
                self._free_rows()
                if active:
                    active = self._step(active)
            except Exception as error:
                log.exception("local engine step failed")
                for job in active:
                    if not job.future.done():
                        job.future.set_exception(EngineError(f"local engine: {type(error).__name__}: {error}"))
                active = []

    def _collect(self, *, block: bool) -> list[_Job]:
        jobs = [self._jobs.get()] if block else []
        while True:
            try:
                jobs.append(self._jobs.get_nowait())
            except queue.Empty:
                return jobs

    @torch.inference_mode()
    def _step(self, jobs: list[_Job]) -> list[_Job]:
        """Advance every job by one forward pass; returns those that go on. One-token rows are batched apart from long ones."""
        going: list[_Job] = []
        for group in self._groups(jobs):
            logits = self._read([(j.handle, self._take_pending(j)) for j in group])
            for job, row in zip(group, logits, strict=True):
                if job.params is None:
                    job.handle.length -= len(job.suffix or ())  # drop the fork
                    self._finish(job, SlotRead(_log_softmax(row[job.allowed])))
                elif not self._advance(job, row):
                    going.append(job)
        return going

    def _groups(self, jobs: list[_Job]) -> list[list[_Job]]:
        short = [j for j in jobs if _pending_tokens(j) == 1]
        groups = [short] if short else []
        budget = 0
        for job in sorted((j for j in jobs if _pending_tokens(j) > 1), key=_pending_tokens):
            tokens = _pending_tokens(job)
            if budget < tokens or not groups or groups[-1] is short:
                groups.append([])
                budget = self._max_batch_tokens
            groups[-1].append(job)
            budget -= tokens
        return groups

    def _take_pending(self, job: _Job) -> Chunk:
        chunks = [*job.handle.pending, *([job.suffix] if job.suffix else [])]
        job.handle.pending = []
        if not chunks:
            raise EngineError("generate: expected something to read, got an empty append. Append a segment first.")
        return Chunk.join(chunks)

    def _read(self, work: list[tuple[Handle, Chunk]]) -> Tensor:
        """Forward one chunk per handle; logits (B, V) float32 after the last token of each."""
        chunks = [chunk for _, chunk in work]
        batch = collate(chunks, self._processor, self._model.device)
        features = encode_pictures(self._model.model, self._processor, batch.pictures)
        embeds = self._model.model.embed(batch.input_ids, features, batch.image_mask, batch.compressed)
        lengths = [handle.length for handle, _ in work]
        cache = StepCache(self._pool, [self._row(h) for h, _ in work], lengths, [len(c) for c in chunks])
        hidden = self._model.model.language_model(
            inputs_embeds=embeds, position_ids=batch.positions, past_key_values=cache, use_cache=True,
            attention_mask={"full_attention": cache.mask(embeds.shape[1])},
        ).last_hidden_state  # fmt: skip
        for handle, chunk in work:
            handle.length += len(chunk)
            self.forward_tokens += len(chunk)
        self.encoded_pictures += len(batch.pictures)
        last = torch.tensor([len(c) - 1 for c in chunks], device=hidden.device)
        logits: Tensor = self._model.lm_head(hidden[torch.arange(len(chunks), device=hidden.device), last])
        return logits.float()

    def _row(self, handle: Handle) -> int:
        if handle.row is None:
            handle.row = self._pool.take()
        return handle.row

    def _free_rows(self) -> None:
        """Rows of closed handles go back between steps, never while a pass may still write to them."""
        with self._lock:
            closed, self._closed = self._closed, []
        for row in {h.row for h in closed if h.row is not None}:
            self._pool.give_back(row)
        for handle in closed:
            handle.row = None

    def _advance(self, job: _Job, logits: Tensor) -> bool:
        """Sample one token; True when the job is finished."""
        params, handle = job.params, job.handle
        assert params is not None
        before, previous = handle.recent
        if previous in self._slot_of and before != self._inspect_id and job.allowed is None:
            keep = torch.log_softmax(logits, -1)[self._keep_id].item()
            job.tracked.append((self._slot_of[previous], keep))
        token, logprob = self._sample(job, logits)
        job.ids.append(token)
        job.logprobs.append(logprob)
        handle.recent = (previous, token)
        handle.pending.append(self._plain_chunk([token], handle.next_position))
        handle.next_position += 1
        stop = next((s for s in params.stop if self._processor.token_id(s) == token), None)
        if stop is None and token != self._eos_id and len(job.ids) < params.max_new_tokens:
            return False
        text = self._processor.tokenizer.decode(job.ids, skip_special_tokens=False)
        generation = Generation(
            text, len(job.ids), stop, tuple(job.ids), tuple(job.logprobs), tuple(job.tracked), job.slot_logprobs
        )
        self._finish(job, generation)
        return True

    def _sample(self, job: _Job, logits: Tensor) -> tuple[int, float]:
        params = job.params
        assert params is not None
        choices = logits if job.allowed is None else logits[job.allowed]
        logprobs = torch.log_softmax(choices / params.temperature if params.temperature > 0 else choices, -1)
        if params.temperature > 0:
            noise = torch.rand(len(logprobs), generator=job.handle.generator).clamp_(min=1e-20)
            picked = int((logprobs.cpu() - torch.log(-torch.log(noise))).argmax())  # Gumbel: one draw, any device
        else:
            picked = int(logprobs.argmax())
        if job.allowed is not None:
            job.slot_logprobs = _log_softmax(choices)
        token = picked if job.allowed is None else int(job.allowed[picked])
        return token, float(logprobs[picked])

    @staticmethod
    def _finish(job: _Job, result: object) -> None:
        if not job.future.cancelled():
            job.future.set_result(result)

    def _embed(self, chunks: Sequence[Chunk]) -> Tensor:
        batch = collate(chunks, self._processor, self._model.device)
        features = encode_pictures(self._model.model, self._processor, batch.pictures)
        return self._model.model.embed(batch.input_ids, features, batch.image_mask, None)

    def _token_ids(self, tokens: Sequence[str]) -> Tensor:
        return torch.tensor([self._processor.token_id(t) for t in tokens], device=self._model.device)

    def _plain_chunk(self, ids: Sequence[int], start: int) -> Chunk:
        return Chunk.plain(ids, start)


def _pending_tokens(job: _Job) -> int:
    return sum(map(len, job.handle.pending)) + (len(job.suffix) if job.suffix else 0)


def _log_softmax(logits: Tensor) -> tuple[float, ...]:
    return tuple(torch.log_softmax(logits, -1).tolist())
