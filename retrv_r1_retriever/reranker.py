"""`RetrvR1Reranker`: orders candidates somebody else found."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

from retrv_r1_retriever import driver, memory
from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cache import ResultCache
from retrv_r1_retriever.driver import Clock, Reading
from retrv_r1_retriever.engines.base import Compressor, Engine, ReadsPictures
from retrv_r1_retriever.errors import EngineError, InputError, RerankTimeout, explain
from retrv_r1_retriever.images import ImageSource, LocalImages, load_query
from retrv_r1_retriever.observe import Observers, Step, observed
from retrv_r1_retriever.options import BALANCED, RerankOptions, as_options
from retrv_r1_retriever.progress import Progress, ProgressFn
from retrv_r1_retriever.prompt import NONE_INDEX, build_prompt
from retrv_r1_retriever.ranking import Order, rank, to_results
from retrv_r1_retriever.session import Outcome
from retrv_r1_retriever.sidecar import Sidecars
from retrv_r1_retriever.types import (
    MAX_CANDIDATES,
    Candidate,
    Document,
    ImageInput,
    Query,
    RankedResult,
    RankedResults,
    Status,
)

log = logging.getLogger(__name__)

Candidates: TypeAlias = "Sequence[Candidate] | Sequence[Document]"
_TOO_SLOW = "timed out before the model had read the candidates. Raise timeout_s."
T = TypeVar("T")
R = TypeVar("R")


class RetrvR1Reranker:
    """Reads all candidates of a list together, thinks, opens the ones it is unsure of, and orders them.

    compressor: makes candidate memory where it is missing; by default the engine itself, if it can. An engine that reads
        candidates without memory (a chat model) needs none
    images: where pictures come from; the default reads bytes, data URIs and Pillow images, never files or networks
    sidecars: of the collection that the candidates are from (`QdrantStore(...).sidecars`): those that come without memory, as
        from a framework's own store, get it from there. Their document ids have to be the collection's point ids
    write_back: is given the candidates whose memory a call had to make, e.g. `lazy.WriteBack`; must return at once
    cache: answers calls that are equal to an earlier one, off by default; observers: watch every call, e.g. `Telemetry()`
    """

    def __init__(
        self,
        engine: Engine,
        *,
        compressor: Compressor | None = None,
        images: ImageSource | None = None,
        options: RerankOptions = BALANCED,
        sidecars: Sidecars | None = None,
        write_back: Callable[[Sequence[Candidate]], None] | None = None,
        cache: ResultCache | None = None,
        observers: Observers = (),
        clock: Clock = time.monotonic,
    ) -> None:
        self.images = images or LocalImages()
        self.engine = engine.with_images(self.images) if isinstance(engine, ReadsPictures) else engine
        self.compressor = compressor or (engine if isinstance(engine, Compressor) else None)
        self.options, self.cache, self.observers = options, cache, observers
        self._clock, self._sidecars, self._write_back = clock, sidecars, write_back

    async def arerank(
        self,
        query: Query | str,
        candidates: Candidates,
        *,
        options: RerankOptions | None = None,
        progress: ProgressFn | None = None,
    ) -> RankedResults:
        """All candidates in a new order (`options.top_k` belongs to a first stage and is not applied here).

        Identity is by position: two candidates with one id stay two results.
        Raises `InputError` for a query or list that cannot be used, `StaleMemoryError` if `on_stale="raise"`; failures of
        the model are raised with `on_failure="raise"` and otherwise give the first-stage order with status `fallback`.
        """
        options, query, ranked = as_options(options, self.options), as_query(query), as_candidates(candidates)
        with observed(self.observers, Step("rerank", query, options, ranked)) as tell:
            results = await self._answer(query, ranked, options, progress)
            tell(results)
        if progress:
            await progress(Progress("answered", results=results))
        return results

    def rerank(
        self,
        query: Query | str,
        candidates: Candidates,
        *,
        options: RerankOptions | None = None,
        progress: ProgressFn | None = None,
    ) -> RankedResults:
        """`arerank` for callers without an event loop; also works inside a running one."""
        return run(self.arerank(query, candidates, options=options, progress=progress))

    async def arerank_batch(
        self,
        queries: Sequence[Query | str],
        candidates: Sequence[Candidates],
        *,
        options: RerankOptions | None = None,
        concurrency: int = 8,
    ) -> list[RankedResults]:
        """One result per query, in order; `timeout_s` is per query. `concurrency`: queries in flight at the same time.

        `max_think_share` below 1 costs a second short prefill for the queries that think: all are read directly first, so
        that the least sure ones can be chosen without holding every query's KV state.
        """
        options = as_options(options, self.options)
        if len(queries) != len(candidates):
            fix = "Pass one list of candidates per query."
            raise InputError(explain("candidates", expected=f"{len(queries)} lists", got=len(candidates), fix=fix))
        jobs = list(zip(map(as_query, queries), map(as_candidates, candidates), strict=True))
        with observed(self.observers, Step("rerank_batch", options=options, queries=len(jobs))) as tell:
            if options.think == "auto" and options.ranking != "logits" and options.max_think_share < 1:
                ranked = await self._share_thinking(jobs, options, concurrency)
            else:
                ranked = await bounded(lambda job: self.arerank(*job, options=options), jobs, concurrency)
            for results in ranked:
                tell(results)
        return ranked

    def rerank_batch(
        self,
        queries: Sequence[Query | str],
        candidates: Sequence[Candidates],
        *,
        options: RerankOptions | None = None,
        concurrency: int = 8,
    ) -> list[RankedResults]:
        return run(self.arerank_batch(queries, candidates, options=options, concurrency=concurrency))

    async def _answer(
        self, query: Query, ranked: tuple[Candidate, ...], options: RerankOptions, progress: ProgressFn | None
    ) -> RankedResults:
        """The model's order, or the first stage's where the model failed and `options` allow it."""
        if not ranked:
            return fallback(query, ranked, options, "no candidates to rank: the first stage returned none")
        try:
            return await self._remembered(query, ranked, options, progress)
        except EngineError as error:
            if options.on_failure == "raise":
                raise
            log.warning("falling back to first-stage order: %s", error)
            return fallback(query, ranked, options, str(error))

    async def _remembered(
        self, query: Query, candidates: tuple[Candidate, ...], options: RerankOptions, progress: ProgressFn | None
    ) -> RankedResults:
        """The answer of an earlier, equal call where the cache has one."""
        if self.cache is None:
            return await self._rerank(query, candidates, options, progress)
        started = self._clock()
        key = await self._key(self.cache, query, candidates, options)
        known = self.cache.get(key, query, candidates) if key else None
        seconds = self._clock() - started
        if known is not None and known.trace is not None:
            return replace(known, trace=replace(known.trace, timings={"cache": seconds, "total": seconds}))
        results = await self._rerank(query, candidates, less_time(options, seconds), progress)
        if key:
            self.cache.put(key, candidates, results)
        return results

    async def _key(
        self, cache: ResultCache, query: Query, candidates: tuple[Candidate, ...], options: RerankOptions
    ) -> str | None:
        """None for what cannot be read or hashed: it is answered, and explained, as without a cache."""
        try:
            async with asyncio.timeout(options.timeout_s):
                asked = await load_query(self.images, query)
            return await asyncio.to_thread(cache.key, asked, candidates, options, self.engine.versions)
        except TimeoutError as error:
            raise RerankTimeout(_TOO_SLOW) from error
        except InputError:
            return None

    async def _rerank(
        self, query: Query, candidates: tuple[Candidate, ...], options: RerankOptions, progress: ProgressFn | None
    ) -> RankedResults:
        started, deadline = self._clock(), _deadline(options)
        try:
            async with asyncio.timeout_at(deadline):
                decoded = await load_query(self.images, query)
                readable = await self._readable(candidates, options)
        except TimeoutError as error:
            raise RerankTimeout(_TOO_SLOW) from error
        if self._write_back is not None and readable.fresh:
            self._write_back(readable.fresh)
        if not readable.candidates:
            raise EngineError("no candidate has usable memory: " + "; ".join(readable.notes))
        prepared = self._clock() - started
        prompt = build_prompt(decoded, readable.candidates)
        reading = await driver.read(
            self.engine, prompt, options, images=self.images, deadline=deadline, clock=self._clock,
            progress=progress, observers=self.observers,
        )  # fmt: skip
        timings = {"memory": prepared, **reading.trace.timings, "total": self._clock() - started}
        return _decide(query, candidates, readable, reading, options, self.engine.none_margin, timings)

    async def _readable(self, candidates: tuple[Candidate, ...], options: RerankOptions) -> memory.Readable:
        if self._sidecars is None or self.compressor is None:
            return await memory.resolve(candidates, self.compressor, self.images, options)
        found, notes = await memory.fetch(candidates, self._sidecars)
        readable = await memory.resolve(found, self.compressor, self.images, options)
        return replace(readable, notes=(*notes, *readable.notes))

    async def _share_thinking(
        self, jobs: Sequence[tuple[Query, tuple[Candidate, ...]]], options: RerankOptions, concurrency: int
    ) -> list[RankedResults]:
        """Direct reads first; then the share with the smallest margins thinks, within what is left of its time."""
        direct = options.with_options(think="never")
        results = await bounded(lambda job: self.arerank(*job, options=direct), jobs, concurrency)
        threshold = options.think_margin if options.think_margin is not None else self.engine.think_margin
        unsure = sorted((r.trace.margin, i) for i, r in enumerate(results) if r.trace and r.trace.margin is not None)
        allowed = math.floor(options.max_think_share * len(jobs) + 1e-9)
        chosen = [i for margin, i in unsure[:allowed] if threshold is None or margin < threshold]

        async def think(index: int) -> RankedResults:
            left = less_time(options, _seconds(results[index]))
            thought = await self.arerank(*jobs[index], options=left.with_options(think="always"))
            if thought.status is not Status.FALLBACK or not self.engine.direct_read:
                return thought
            return replace(results[index], status=Status.PARTIAL, reason=thought.reason)

        for index, result in zip(chosen, await bounded(think, chosen, concurrency), strict=True):
            results[index] = result
        return results


def fallback(query: Query, candidates: Sequence[Candidate], options: RerankOptions, reason: str) -> RankedResults:
    """First-stage order, unscored, with the reason."""
    results = tuple(RankedResult(c, place, None) for place, c in enumerate(_as_retrieved(candidates), 1))
    return RankedResults(query, results[: options.top_n], Status.FALLBACK, reason=reason)


def as_query(query: Query | str, image: ImageInput | None = None, instruction: str | None = None) -> Query:
    """image, instruction: of a query given as text."""
    if isinstance(query, Query):
        if image is not None:
            fix = "Put the picture into the query: Query.of(text, image)."
            raise InputError(explain("image", expected="None beside a Query", got="a picture", fix=fix))
        return query
    if not isinstance(query, str):
        raise InputError(explain("query", expected="str or Query", got=type(query).__name__, fix="Use Query.of(...)."))
    text = query if query.strip() else None
    if text is None and image is None:
        raise InputError(explain("query", expected="a text or an image", got="an empty string", fix="Pass a text."))
    return Query.of(text, image, instruction)


def as_candidates(candidates: Candidates) -> tuple[Candidate, ...]:
    """Candidates as given; documents get their place in the list as first-stage rank."""
    given: tuple[Candidate | Document, ...] = tuple(candidates)
    if len(given) > MAX_CANDIDATES:
        fix = "Pass fewer; the model has one label per candidate."
        raise InputError(explain("candidates", expected=f"at most {MAX_CANDIDATES}", got=len(given), fix=fix))
    for item in given:
        if not isinstance(item, Candidate | Document):
            fix = "Wrap each one: Document(id, Content(text, image))."
            raise InputError(explain("candidates", expected="Candidate or Document", got=type(item).__name__, fix=fix))
    return tuple(c if isinstance(c, Candidate) else Candidate(c, None, i) for i, c in enumerate(given, 1))


async def bounded(function: Callable[[T], Awaitable[R]], items: Sequence[T], concurrency: int) -> list[R]:
    """`function` over all items, in order, a few at a time. The first failure cancels the rest, and waits until they closed."""
    if concurrency < 1:
        raise InputError(explain("concurrency", expected="at least 1", got=concurrency, fix="Raise it."))
    turns = asyncio.Semaphore(concurrency)

    async def one(item: T) -> R:
        async with turns:
            return await function(item)

    tasks = [asyncio.ensure_future(one(item)) for item in items]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _decide(
    query: Query,
    candidates: tuple[Candidate, ...],
    readable: memory.Readable,
    reading: Reading,
    options: RerankOptions,
    none_margin: float | None,
    timings: dict[str, float],
) -> RankedResults:
    """Order what was read; put what was not read last, in first-stage order; say which is which."""
    read = [candidates[i] for i in readable.positions]  # the caller's own objects, not the copies with fresh memory
    skipped = _as_retrieved([c for i, c in enumerate(candidates) if i not in set(readable.positions)])
    order = rank(read, reading.direct, reading.outcome, options.ranking, none_margin)
    half_judged = {*(reading.outcome.unreadable if reading.outcome else ()), *reading.stale}
    passed_over = _passed_over(order, reading.outcome)
    unjudged = [i for i in passed_over if order.signals[i].keep_logprob is None]
    if reading.direct is not None:  # all but these have their place by it
        unjudged = [i for i in reading.direct.unread if i != order.answer and not order.signals[i].opened]
    if options.ranking == "promote":
        unjudged = []  # they have their place by nothing but the answer
    unranked = (*(read[i] for i in sorted({*half_judged, *unjudged})), *skipped)
    reasons = [reading.problem] if reading.problem else []
    if skipped:
        reasons.append(f"{len(skipped)} of {len(candidates)} candidates have no usable memory")
    if half_judged:
        reasons.append(f"{len(half_judged)} could not be opened or changed after indexing")
    if unjudged:
        reasons.append(
            f"{len(unjudged)} of {len(read)} candidates "
            + (
                "were not judged"
                if reading.direct
                else "were not named in the thought, and there is no direct read to place them"
            )
        )
    return RankedResults(
        query=query,
        results=to_results(read, order, skipped)[: options.top_n],
        status=Status.PARTIAL if reasons else Status.RERANKED,
        none_chosen=order.none_chosen,
        reason="; ".join(reasons) or None,
        unranked=tuple(c.document.id for c in unranked),
        trace=replace(
            reading.trace,
            answer=order.answer,
            usage=replace(
                reading.trace.usage,
                unknown_labels=_unknown_labels(len(read), reading.outcome),
                without_verdict=len(passed_over),
                stale_memories=len(readable.fresh) + len(skipped) + len(reading.stale),
            ),
            timings=timings,
            notes=_notes(readable, reading, order, len(passed_over), all_read=not skipped),
        ),
    )


def _notes(
    readable: memory.Readable, reading: Reading, order: Order, passed_over: int, *, all_read: bool
) -> tuple[str, ...]:
    """What weakened the decision without taking it away."""
    notes = [*readable.notes, *reading.trace.notes]
    read = len(readable.positions)
    if 2 * passed_over > read:
        notes.append(f"the thought passed over {passed_over} of {read} candidates: most got no verdict")
    if reading.outcome and (reading.outcome.answer == NONE_INDEX) != order.none_chosen:
        said, is_now = ("none", "a candidate") if reading.outcome.answer == NONE_INDEX else ("a candidate", "none")
        notes.append(f"the thought answered {said}; by the calibrated lead of none the answer is {is_now}")
    if not all_read:
        labels = ", ".join(str(i) for i in readable.positions)
        notes.append(f"labels count only the candidates in the prompt, at these places of the list: {labels}")
    return tuple(notes)


def _passed_over(order: Order, outcome: Outcome | None) -> tuple[int, ...]:
    """Indices of candidates that a thought has no word about, and neither opened nor chose."""
    if outcome is None:
        return ()
    return tuple(i for i, s in enumerate(order.signals) if not s.verdict and not s.opened and i != order.answer)


def _unknown_labels(count: int, outcome: Outcome | None) -> int:
    return sum(verdict.index >= count for verdict in outcome.thought.verdicts) if outcome else 0


def _as_retrieved(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda c: c.rank)


def _deadline(options: RerankOptions) -> float | None:
    return None if options.timeout_s is None else asyncio.get_running_loop().time() + options.timeout_s


def less_time(options: RerankOptions, seconds: float) -> RerankOptions:
    """The options of a call that may only use what `seconds` have left of its timeout."""
    if options.timeout_s is None:
        return options
    return options.with_options(timeout_s=max(options.timeout_s - seconds, 1e-3))


def _seconds(results: RankedResults) -> float:
    return results.trace.timings["total"] if results.trace else 0.0
