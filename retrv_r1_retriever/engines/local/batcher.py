"""One worker thread that advances every running call by one forward pass at a time: continuous batching.

Every handle owns one row of a KV pool; its length is a pointer. A probe writes past the pointer and leaves it where it was, so a fork
costs nothing and nothing is computed twice. Handles of different queries, at different lengths, share each pass.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retrv_r1_retriever.engines.base import SlotRead
from retrv_r1_retriever.engines.local.kv import KvPool, StepCache
from retrv_r1_retriever.errors import EngineError, explain
from retrv_r1_retriever.model.checkpoint import Checkpoint
from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.modeling import CACHE
from retrv_r1_retriever.model.processing import Chunk, collate
from retrv_r1_retriever.prompt import INSPECT_START, KEEP, Prompt
from retrv_r1_retriever.session import GenerateParams, Generation

log = logging.getLogger(__name__)

#: Longest that closing, or the interpreter's exit, waits for a pass to end. Ours, not the paper's.
_LAST_PASS_S = 30.0


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
class Job:
    """One generate call in flight, or, with a `suffix` and without `params`, one probe."""

    handle: Handle
    params: GenerateParams | None
    allowed: Tensor | None
    suffix: Chunk | None = None
    future: Future[Any] = field(default_factory=Future)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tracked: list[tuple[int, float]] = field(default_factory=list)
    slot_logprobs: tuple[float, ...] | None = None

    @property
    def unread(self) -> int:
        """Tokens its next pass must read."""
        return sum(map(len, self.handle.pending)) + (len(self.suffix) if self.suffix else 0)

    def chunk(self) -> Chunk:
        chunks = [*self.handle.pending, *([self.suffix] if self.suffix else [])]
        if not chunks:
            raise EngineError("generate: expected something to read, got nothing. Append a segment first.")
        return Chunk.join(chunks)


class Batcher:
    """max_batch_tokens: most prompt tokens read in one pass; autocast: see `LocalEngine`, and so are the counters."""

    def __init__(self, checkpoint: Checkpoint, max_batch_tokens: int, autocast: torch.dtype | None = None) -> None:
        self._model, self._processor = checkpoint.model, checkpoint.processor
        if (kind := self._model.config._attn_implementation) == "eager":  # which takes no mask for no limits at all
            fix = "Load the model without attn_implementation."
            raise EngineError(explain("attention", expected="sdpa", got=kind, fix=fix))
        self._max_batch_tokens, self._autocast = max_batch_tokens, autocast
        self._pool = KvPool(self._model.config.text_config, self._model.device, autocast or self._model.dtype)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # None: there are no more
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._lock = threading.Lock()
        self._closed: list[Handle] = []
        self._slot_of = {token: slot for slot, token in enumerate(self._processor.slot_ids)}
        self._keep_id = self._processor.tokenise(f" {KEEP}")[0]
        self._inspect_id = self._processor.token_id(INSPECT_START)
        self._eos_id = self._model.config.text_config.eos_token_id
        self.forward_tokens = 0
        self.forward_seconds = 0.0
        self.step_seconds = self._counted_to = 0.0
        self.encoded_pictures = 0

    async def run(self, job: Job) -> Any:
        if job.handle.closed:
            raise EngineError("handle: expected an open one, got a closed one. Open the prompt again.")
        self._submit(job)
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            job.future.cancel()  # the worker drops it before its next pass
            raise

    def close(self, handle: Handle) -> None:
        with self._lock:
            handle.closed = True
            self._closed.append(handle)

    def stop(self) -> None:
        """End the worker after its present pass; calls in flight fail. Also at exit: a thread that is in the middle of a pass
        when the interpreter is gone aborts the whole process."""
        with self._lock:
            self._stopped = True
            self._jobs.put(None)
        atexit.unregister(self.stop)  # which would keep the model in memory
        if self._thread is not None:
            self._thread.join(_LAST_PASS_S)

    def _submit(self, job: Job) -> None:
        with self._lock:
            if self._stopped:
                raise _closed()
            if self._thread is None or not self._thread.is_alive():  # none yet, or left behind by a fork
                self._thread = threading.Thread(target=self._work, name="retrv-r1-local-engine", daemon=True)
                self._thread.start()
                atexit.register(self.stop)
            self._jobs.put(job)

    def _work(self) -> None:
        active: list[Job] = []
        while not self._stopped:
            try:
                active += self._collect(block=not active)
                self._free_rows()  # before looking who is closed: whoever closes later gets no new row that nobody frees
                active = [job for job in active if not _is_over(job)]
                active = self._step(active)
            except Exception as error:
                for job in active:
                    _fail(job, error)
                active = []
        for job in active + self._collect(block=False):
            _refuse(job, _closed())

    def _collect(self, *, block: bool) -> list[Job]:
        jobs = [self._jobs.get()] if block else []
        while True:
            try:
                jobs.append(self._jobs.get_nowait())
            except queue.Empty:
                return [job for job in jobs if job is not None]

    def _free_rows(self) -> None:
        """Rows of closed handles go back between passes, never while one may still write to them."""
        with self._lock:
            closed, self._closed = self._closed, []
        for handle in closed:
            if handle.row is not None:
                self._pool.give_back(handle.row)
                handle.row = None

    @torch.inference_mode()
    def _step(self, jobs: list[Job]) -> list[Job]:
        """Advance every job by one pass; returns those that go on."""
        self._counted_to = time.perf_counter()
        try:
            with torch.autocast(self._model.device.type, self._autocast, enabled=self._autocast is not None):
                return [job for group in self._groups(jobs) for job in self._pass(group)]
        finally:
            self._count()

    def _count(self) -> None:
        now = time.perf_counter()
        self.step_seconds += now - self._counted_to
        self._counted_to = now

    def _pass(self, group: list[Job]) -> list[Job]:
        """One pass for a group. Where it fails every job is tried alone, so that a bad one takes no other with it."""
        try:
            logits = self._read([(job.handle, job.chunk()) for job in group])
        except Exception as error:
            if len(group) > 1:  # nothing has moved yet: lengths and pending chunks change only after a whole pass
                return [job for one in group for job in self._pass([one])]
            _fail(group[0], error)
            return []
        answers = [self._answer(job, row) for job, row in zip(group, logits, strict=True)]
        self._count()  # before anybody is told, who may look at it
        for job, answer in zip(group, answers, strict=True):
            if answer is not None:
                _finish(job, answer)
        return [job for job, answer in zip(group, answers, strict=True) if answer is None]

    def _answer(self, job: Job, row: Tensor) -> SlotRead | Generation | None:
        """After its pass; None: the job goes on."""
        job.handle.pending = []
        if job.suffix is None:
            return self._advance(job, row)
        job.handle.length -= len(job.suffix)  # drop the fork
        return SlotRead(log_softmax(row[job.allowed]))

    def _groups(self, jobs: list[Job]) -> list[list[Job]]:
        """Rows that read one token are batched apart from long ones, which would pad them.

        A job with nothing to read goes with the short ones: its pass says so, and nobody waits for ever.
        """
        groups = [short] if (short := [j for j in jobs if j.unread <= 1]) else []
        budget = 0
        for job in sorted((j for j in jobs if j.unread > 1), key=lambda j: j.unread):
            if budget < job.unread:
                groups.append([])
                budget = self._max_batch_tokens
            groups[-1].append(job)
            budget -= job.unread
        return groups

    def _read(self, work: list[tuple[Handle, Chunk]]) -> Tensor:
        """One pass over one chunk per handle; logits (B, V) float32 after the last token of each."""
        chunks = [chunk for _, chunk in work]
        batch = collate(chunks, self._processor, self._model.device)
        started = time.perf_counter()
        features = encode_pictures(self._model.model, self._processor, batch.pictures)
        embeds = self._model.model.embed(batch.input_ids, features, batch.image_mask, batch.compressed)
        rows = [self._row(handle) for handle, _ in work]
        cache = StepCache(self._pool, rows, [handle.length for handle, _ in work], [len(c) for c in chunks])
        hidden = self._model.model.language_model(
            inputs_embeds=embeds, position_ids=batch.positions, use_cache=True,
            attention_mask={"full_attention": cache.mask(embeds.shape[1])}, **{CACHE: cache},
        ).last_hidden_state  # fmt: skip
        last = torch.tensor([len(c) - 1 for c in chunks], device=hidden.device)
        picked = hidden[torch.arange(len(chunks), device=hidden.device), last]
        logits: Tensor = self._model.lm_head(picked).float()
        for handle, chunk in work:
            handle.length += len(chunk)
            self.forward_tokens += len(chunk)
        self.encoded_pictures += len(batch.pictures)
        self.forward_seconds += time.perf_counter() - started
        return logits

    def _row(self, handle: Handle) -> int:
        if handle.row is None:
            handle.row = self._pool.take()
        return handle.row

    def _advance(self, job: Job, logits: Tensor) -> Generation | None:
        """Sample one token; what was generated, once that is finished."""
        params, handle = job.params, job.handle
        assert params is not None
        before, previous = handle.recent
        if previous in self._slot_of and before != self._inspect_id and job.allowed is None:
            keep = torch.log_softmax(logits, -1)[self._keep_id].item()
            job.tracked.append((self._slot_of[previous], keep))
        token, logprob = _sample(job, logits, params.temperature)
        job.ids.append(token)
        job.logprobs.append(logprob)
        handle.recent = (previous, token)
        handle.pending.append(Chunk.plain([token], handle.next_position))
        handle.next_position += 1
        stop = next((s for s in params.stop if self._processor.token_id(s) == token), None)
        if stop is None and token != self._eos_id and len(job.ids) < params.max_new_tokens:
            return None
        text = str(self._processor.tokenizer.decode(job.ids, skip_special_tokens=False))
        return Generation(
            text, len(job.ids), stop, tuple(job.ids), tuple(job.logprobs), tuple(job.tracked), job.slot_logprobs
        )


def log_softmax(logits: Tensor) -> tuple[float, ...]:
    return tuple(torch.log_softmax(logits, -1).tolist())


def _sample(job: Job, logits: Tensor, temperature: float) -> tuple[int, float]:
    """Greedy at temperature 0, else one seeded Gumbel draw on the CPU: the same sample on any device and in any batch."""
    choices = logits if job.allowed is None else logits[job.allowed]
    logprobs = torch.log_softmax(choices / temperature if temperature > 0 else choices, -1)
    if temperature > 0:
        noise = torch.rand(len(logprobs), generator=job.handle.generator).clamp_(min=1e-20)
        picked = int((logprobs.cpu() - torch.log(-torch.log(noise))).argmax())
    else:
        picked = int(logprobs.argmax())
    if job.allowed is not None:
        job.slot_logprobs = log_softmax(choices)
    return (picked if job.allowed is None else int(job.allowed[picked])), float(logprobs[picked])


def _is_over(job: Job) -> bool:
    """Cancelled, or its handle was closed under it: then its caller is told, or would wait for ever."""
    if job.handle.closed:
        _refuse(job, EngineError("handle: closed while it was in use."))
    return job.future.done()


def _finish(job: Job, result: object) -> None:
    _settle(job, lambda: job.future.set_result(result))


def _fail(job: Job, error: Exception) -> None:
    log.error("local engine pass failed", exc_info=error)
    wrapped = error if isinstance(error, EngineError) else EngineError(f"local engine: {type(error).__name__}: {error}")
    _refuse(job, wrapped)


def _refuse(job: Job, error: EngineError) -> None:
    _settle(job, lambda: job.future.set_exception(error))


def _closed() -> EngineError:
    return EngineError("local engine: expected an open one, got a closed one. Open another.")


def _settle(job: Job, settle: Callable[[], None]) -> None:
    with contextlib.suppress(InvalidStateError):  # cancelled, perhaps this very moment
        settle()
