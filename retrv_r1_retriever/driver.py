"""The one loop between a session and an engine. Async only; `_sync.run` is the other form.

    open the prompt -> direct read -> think? -> generate, open candidates, generate ... -> answer -> close

The direct read comes first because it costs one token and is what is left when the thought fails or runs out of time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from retrv_r1_retriever import observe
from retrv_r1_retriever.engines.base import Engine, SlotRead
from retrv_r1_retriever.errors import EngineError, RerankTimeout
from retrv_r1_retriever.images import ImageSource, load_content
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.progress import Progress, ProgressFn
from retrv_r1_retriever.prompt import ANSWER_START, Prompt
from retrv_r1_retriever.session import Generation, InspectionSession, Outcome, SessionLimits, Step
from retrv_r1_retriever.trace import Full, ReasoningTrace, Usage

log = logging.getLogger(__name__)

Clock = Callable[[], float]

#: Seconds a result waits for its handle to close; a slower close goes on in the background. Ours, not the paper's.
CLOSE_GRACE_S = 5.0
_UNTRAINED = "the direct read of this checkpoint was not trained"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one pass over a prompt gave. `outcome` is None if the model did not think, or its thought cannot be used.

    problem: why a thought was begun and cannot be used; the direct read decides then
    stale: opened candidates whose picture is no longer the one their memory was made of
    """

    direct: SlotRead | None
    outcome: Outcome | None
    trace: ReasoningTrace
    problem: str | None = None
    stale: tuple[int, ...] = ()


async def read(
    engine: Engine,
    prompt: Prompt,
    options: RerankOptions,
    *,
    images: ImageSource,
    deadline: float | None = None,
    clock: Clock = time.monotonic,
    progress: ProgressFn | None = None,
    observers: observe.Observers = (),
) -> Reading:
    """Run the model over one prompt.

    deadline: on the running loop's clock. Past it the thought is dropped for the direct read; before that: `RerankTimeout`.
    Raises `EngineError` if the model decided nothing at all.
    """
    run = _Run(engine, prompt, options, images, clock, progress, observers)
    try:
        try:
            async with asyncio.timeout_at(deadline):
                await run.open()
                await run.read_directly()
        except TimeoutError as error:
            raise RerankTimeout("timed out before the model had read the candidates. Raise timeout_s.") from error
        if run.should_think():
            await run.think(deadline)
    finally:
        await run.close()
    return run.reading()


def only_direct(options: RerankOptions) -> bool:
    """Whether the caller wants no thought, whatever the direct read is worth."""
    return options.ranking == "logits" or options.think == "never"


def should_think(
    options: RerankOptions, calibrated: float | None, direct: SlotRead | None, trained: bool = True
) -> tuple[bool, str | None]:
    """Whether to think after the direct read, and a note for the trace where that was no free choice."""
    if only_direct(options):
        return False, None if trained else f"{_UNTRAINED}: the order may be no better than chance; use think='always'"
    if options.think == "always":
        return True, None
    threshold = options.think_margin if options.think_margin is not None else calibrated
    if not trained:
        return True, f"think=auto: {_UNTRAINED}, so it always thinks"
    if direct is None:
        return True, "think=auto: this engine offers no direct read, so it always thinks"
    if threshold is None:
        return True, "think=auto: no calibrated margin for this engine, so it always thinks"
    return not direct.margin >= threshold, None  # a margin that is no number is no certainty


def _unlike_training(count: int, engine: Engine) -> str | None:
    """A note on a list of a length it never saw: a miniature trained on lists of 20 went wrong on 16 (docs/experiments.md)."""
    longest = engine.trained_top_k
    shortest = engine.trained_min_k or longest
    if not longest or shortest <= count <= longest:
        return None
    trained = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    return (
        f"this list is {count} long and the model was trained on lists of {trained}: "
        "its order may mean little (`retrv-r1 eval` measures it)"
    )


@dataclass(slots=True)
class _Run:
    """State of one pass; its methods are called once each, in the order of `read`."""

    engine: Engine
    prompt: Prompt
    options: RerankOptions
    images: ImageSource
    clock: Clock
    progress: ProgressFn | None = None
    observers: observe.Observers = ()
    handle: Any = None
    direct: SlotRead | None = None
    session: InspectionSession | None = None
    problem: str | None = None
    timed_out: bool = False
    stale: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    async def open(self) -> None:
        with self._stage("open"), _engine_errors("open"):
            self.handle = await self.engine.open(self.prompt)
        if note := _unlike_training(len(self.prompt.candidates), self.engine):
            self.notes.append(note)

    async def read_directly(self) -> None:
        """Skipped where it was not trained, unless nothing else may decide: it must not stand in for a failed thought."""
        if not (self.engine.direct_read or only_direct(self.options)):
            return
        with self._stage("direct_read"), _engine_errors("direct read"):
            self.direct = await self.engine.probe(self.handle, ANSWER_START)
            if not isinstance(self.direct, SlotRead | None):
                got = type(self.direct).__name__
                raise EngineError(f"direct read: expected SlotRead or None, got {got}. Fix the engine's probe.")
            if self.direct is not None and len(self.direct.logprobs) != len(self.prompt.slots):
                expected, got = len(self.prompt.slots), len(self.direct.logprobs)
                raise EngineError(f"direct read: expected {expected} slots, got {got}. Fix the engine's probe.")
            if self.direct is not None and not any(map(math.isfinite, self.direct.logprobs)):
                raise EngineError(
                    "direct read: expected log-probabilities, got none that is finite. "
                    "The weights are broken, or too large for this dtype: try float32."
                )

    def should_think(self) -> bool:
        think, note = should_think(self.options, self.engine.think_margin, self.direct, self.engine.direct_read)
        if note:
            self.notes.append(note)
        if not think and self.direct is None:
            raise EngineError(
                "this engine offers no direct read. Use think='always' and another ranking than 'logits'."
            )
        return think

    async def think(self, deadline: float | None) -> None:
        """Drive a session to its end. A failure is kept as `problem` if the direct read can stand in, and raised if not."""
        if self.progress:
            await self.progress(Progress("thinking"))
        self.session = self._new_session()
        try:
            async with asyncio.timeout_at(deadline):
                with self._stage("think"):
                    await self._drive(self.session)
            if self.session.outcome().answer is None:
                raise EngineError("the engine answered with none of the allowed labels")
        except TimeoutError as error:
            self.timed_out = True
            self._give_up(
                "timed out while thinking", RerankTimeout("timed out while thinking. Raise timeout_s."), error
            )
        except EngineError as error:
            self._give_up(f"the thought failed: {error}", error, error)

    async def close(self) -> None:
        """Never hangs and never hides the call's own result: a failing close is logged."""
        if self.handle is None:
            return
        task = asyncio.ensure_future(self.engine.close(self.handle))
        task.add_done_callback(_log_failure)
        # `wait`, because cancelling it leaves the task running: a second Ctrl-C must not leak the handle.
        await asyncio.wait({task}, timeout=CLOSE_GRACE_S)

    def reading(self) -> Reading:
        outcome = self.session.outcome() if self.session else None
        usable = outcome if self.problem is None else None
        return Reading(self.direct, usable, self._trace(outcome), self.problem, tuple(self.stale))

    def _new_session(self) -> InspectionSession:
        limits = SessionLimits(
            max_inspections=self.options.max_inspections,
            max_new_tokens=self.options.max_new_tokens,
            max_context=self.engine.max_context,
            temperature=self.options.temperature,
            seed=self.options.seed,
        )
        counts = self._full_tokens()
        return InspectionSession(self.prompt, limits, prompt_tokens=self.handle.prompt_tokens, full_tokens=counts)

    async def _drive(self, session: InspectionSession) -> None:
        step = session.begin()
        while step.generate is not None:
            full = next((s for s in step.append if isinstance(s, Full)), None)
            if full is None:
                step = await self._advance(session, step)
                continue
            opened = observe.Step("inspect", candidates=(self.prompt.candidates[full.index],), index=full.index)
            with observe.observed(self.observers, opened):
                step = await self._advance(session, await self._fill(session, step, full))

    async def _advance(self, session: InspectionSession, step: Step) -> Step:
        assert step.generate is not None  # filling a step never ends a session
        with _engine_errors("thought"):
            if step.append:
                await self.engine.append(self.handle, step.append)
            generation = await self.engine.generate(self.handle, step.generate)
            if not isinstance(generation, Generation):
                got = type(generation).__name__
                raise EngineError(f"thought: expected Generation, got {got}. Fix the engine's generate.")
        return session.receive(generation)

    async def _fill(self, session: InspectionSession, step: Step, full: Full) -> Step:
        """The step with the opened candidate's content loaded; a candidate that cannot be loaded stays closed."""
        candidate = self.prompt.candidates[full.index]
        try:
            with self._stage("load"):
                content, image_hash = await load_content(self.images, candidate.document.content)
        except Exception as error:  # a user's own ImageSource may raise anything; one picture must not cost the ranking
            self.notes.append(f"candidate {full.index} ({candidate.document.id!r}) could not be opened: {error}")
            return session.unreadable(full.index)
        if self.progress:
            await self.progress(Progress("opened", index=full.index, id=candidate.document.id))
        if candidate.memory is not None and candidate.memory.image_hash not in (None, image_hash):
            self.stale.append(full.index)
            name = f"candidate {full.index} ({candidate.document.id!r})"
            self.notes.append(f"{name}: its picture changed after it was indexed; its memory is stale")
        return replace(step, append=tuple(replace(s, content=content) if s is full else s for s in step.append))

    def _give_up(self, problem: str, error: EngineError, cause: BaseException) -> None:
        assert self.session is not None
        self.session.fail()
        if self.direct is None:
            raise error from (None if error is cause else cause)
        self.problem = f"{problem}; this is the direct read's order"
        self.notes.append(self.problem)

    def _trace(self, outcome: Outcome | None) -> ReasoningTrace:
        """Without `answer`: what was chosen is only known once ranked."""
        counts = self._full_tokens()
        prompt_tokens: int = self.handle.prompt_tokens
        usage = Usage(
            prompt_tokens=prompt_tokens,
            uncompressed_tokens=prompt_tokens + sum(n - 2 for n in counts) if all(counts) else 0,
            sampled_tokens=outcome.sampled_tokens if outcome else 0,
            inspected_tokens=sum(counts[i] for i in outcome.inspected) if outcome else 0,
            refused_inspections=outcome.refused if outcome else 0,
        )
        return ReasoningTrace(
            segments=outcome.segments if outcome else self.prompt.segments,
            candidates=tuple(c.document.id for c in self.prompt.candidates),
            margin=self.direct.margin if self.direct else None,
            inspected=outcome.inspected if outcome else (),
            unreadable=outcome.unreadable if outcome else (),
            stop_reason=outcome.stop_reason if outcome and not self.timed_out else None,
            usage=usage,
            timings=dict(self.timings),
            versions=dict(self.engine.versions),
            notes=(*self.notes, *getattr(self.handle, "notes", ())),
        )

    def _full_tokens(self) -> tuple[int, ...]:
        return tuple(c.memory.full_tokens if c.memory else 0 for c in self.prompt.candidates)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = self.clock()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + self.clock() - started


@contextmanager
def _engine_errors(step: str) -> Iterator[None]:
    """Whatever an engine raises becomes an `EngineError`: a CUDA or network error must reach `on_failure` like any other."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"the engine failed at {step}: {type(error).__name__}: {error}") from error


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.warning("closing an engine handle failed: %r", error)
