"""`RetrvR1Retriever`: the whole pipeline, from a question to a ranked list."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.cache import ResultCache
from retrv_r1_retriever.embedders import Embedder
from retrv_r1_retriever.engines.base import Compressor, Engine
from retrv_r1_retriever.errors import OptionsError, RerankTimeout, explain
from retrv_r1_retriever.images import ImageSource, LocalImages, load_query
from retrv_r1_retriever.lazy import WriteBack
from retrv_r1_retriever.observe import Observers, Step, observed
from retrv_r1_retriever.options import BALANCED, RerankOptions, as_options
from retrv_r1_retriever.progress import Progress, ProgressFn
from retrv_r1_retriever.reranker import Candidates, RetrvR1Reranker, as_candidates, as_query, bounded, less_time
from retrv_r1_retriever.sidecar import Sidecars
from retrv_r1_retriever.store import Filter, FirstStage, Store, VectorFirstStage
from retrv_r1_retriever.types import Candidate, ImageInput, Query, RankedResults


class Reranker(Protocol):
    """What the retriever needs of a reranker: ours, or a client of a served one."""

    async def arerank(
        self,
        query: Query | str,
        candidates: Candidates,
        *,
        options: RerankOptions | None = None,
        progress: ProgressFn | None = None,
    ) -> RankedResults: ...

    async def arerank_batch(
        self,
        queries: Sequence[Query | str],
        candidates: Sequence[Candidates],
        *,
        options: RerankOptions | None = None,
        concurrency: int = 8,
    ) -> list[RankedResults]: ...


class Closable(Protocol):
    async def aclose(self) -> None: ...


class RetrvR1Retriever:
    """A first stage finds candidates, a reranker decides.

    First stage: `store` and `embedder`, or `first_stage`, any async callable `(query, *, top_k, filter) -> candidates`.
    Reranker: an `engine` (with `compressor` as in `RetrvR1Reranker`), or a ready `reranker`.
    images: where pictures of queries and candidates come from; the default reads bytes, data URIs and Pillow images only
    memory: "lazy" keeps memory that a call had to make in a sidecar of the store, written in the background (docs/memory.md);
        needs `store` and `engine`. Call `aclose()` at the end, or the last of it is lost
    closes: what `aclose()` closes beside the store. An engine is not: it may be shared, unless `from_config` opened it
    cache: answers calls that are equal to an earlier one; needs `engine`
    observers: watch every call, e.g. `Telemetry()` (docs/observability.md); by default those of a ready `reranker`
    """

    def __init__(
        self,
        *,
        store: Store | None = None,
        embedder: Embedder | None = None,
        first_stage: FirstStage | None = None,
        engine: Engine | None = None,
        compressor: Compressor | None = None,
        reranker: Reranker | None = None,
        images: ImageSource | None = None,
        memory: Literal["stored", "lazy"] = "stored",
        options: RerankOptions = BALANCED,
        closes: Sequence[Closable] = (),
        cache: ResultCache | None = None,
        observers: Observers = (),
    ) -> None:
        self.images, self._closes = images or LocalImages(), tuple(closes)
        self.observers: Observers = observers or getattr(reranker, "observers", ())
        self._write_back = None if memory == "stored" else _write_back(memory, store, engine)
        if engine is not None and reranker is None:
            self.reranker: Reranker = RetrvR1Reranker(
                engine, compressor=compressor, images=self.images, options=options,
                write_back=self._write_back, cache=cache, observers=observers,
            )  # fmt: skip
        else:
            self.reranker = _ready(reranker, engine=engine, compressor=compressor, cache=cache)
        reads_memory = getattr(self.reranker, "compressor", True) is not None
        self.first_stage = _first_stage(store, embedder, first_stage, reads_memory, self.observers)
        self.options = options

    @classmethod
    def from_config(cls, path: str | os.PathLike[str] = "retrv.toml") -> RetrvR1Retriever:
        """Store, model, pictures and options as a `retrv.toml` says (docs/config.md)."""
        from retrv_r1_retriever import config

        return config.open_retriever(config.read_config(path))

    async def aretrieve(
        self,
        query: Query | str,
        *,
        image: ImageInput | None = None,
        filter: Filter | None = None,
        options: RerankOptions | None = None,
        progress: ProgressFn | None = None,
    ) -> RankedResults:
        """The `top_k` candidates of the first stage, reranked. `image` is added to a query given as text.

        `options.timeout_s` covers everything. First-stage failures are always raised: without candidates there is nothing
        to fall back to. `progress` is awaited at each step: retrieved, thinking, opened, answered.
        """
        options, query = as_options(options, self.options), as_query(query, image)
        with observed(self.observers, Step("retrieve", query, options)) as tell:
            found = await self._find(query, filter, options)
            remaining = less_time(options, found.seconds)
            if progress:
                await progress(Progress("retrieved", candidates=len(found.candidates)))
            results = await self.reranker.arerank(found.query, found.candidates, options=remaining, progress=progress)
            results = _finished(results, query, found.seconds)
            tell(results)
        return results

    def retrieve(
        self,
        query: Query | str,
        *,
        image: ImageInput | None = None,
        filter: Filter | None = None,
        options: RerankOptions | None = None,
        progress: ProgressFn | None = None,
    ) -> RankedResults:
        """`aretrieve` for callers without an event loop; also works inside a running one."""
        return run(self.aretrieve(query, image=image, filter=filter, options=options, progress=progress))

    async def aretrieve_batch(
        self,
        queries: Sequence[Query | str],
        *,
        filter: Filter | None = None,
        options: RerankOptions | None = None,
        concurrency: int = 8,
    ) -> list[RankedResults]:
        """One result per query, in order; `options.max_think_share` holds over the batch, `timeout_s` per query."""
        options, asked = as_options(options, self.options), [as_query(query) for query in queries]
        with observed(self.observers, Step("retrieve_batch", options=options, queries=len(asked))) as tell:
            found = await bounded(lambda query: self._find(query, filter, options), asked, concurrency)
            remaining = less_time(options, max((f.seconds for f in found), default=0.0))
            ranked = await self.reranker.arerank_batch(
                [f.query for f in found], [f.candidates for f in found], options=remaining, concurrency=concurrency
            )
            finished = [_finished(r, q, f.seconds) for r, q, f in zip(ranked, asked, found, strict=True)]
            for results in finished:
                tell(results)
        return finished

    def retrieve_batch(
        self,
        queries: Sequence[Query | str],
        *,
        filter: Filter | None = None,
        options: RerankOptions | None = None,
        concurrency: int = 8,
    ) -> list[RankedResults]:
        return run(self.aretrieve_batch(queries, filter=filter, options=options, concurrency=concurrency))

    async def aclose(self) -> None:
        """Finish what is written in the background, close the store, and what is in `closes`."""
        if self._write_back is not None:
            await self._write_back.flush()
        if isinstance(self.first_stage, VectorFirstStage):
            await self.first_stage.store.close()
        for one in self._closes:
            await one.aclose()

    def close(self) -> None:
        run(self.aclose())

    async def _find(self, query: Query, filter: Filter | None, options: RerankOptions) -> _Found:
        started = time.monotonic()
        try:
            async with asyncio.timeout(options.timeout_s) as limit:
                decoded = await load_query(self.images, query)
                found = await self._search(decoded, options.top_k, filter)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise RerankTimeout(f"the first stage took longer than timeout_s={options.timeout_s}. Raise it.") from error
        return _Found(decoded, as_candidates(tuple(found)[: options.top_k]), time.monotonic() - started)

    async def _search(self, query: Query, top_k: int, filter: Filter | None) -> Sequence[Candidate]:
        if isinstance(self.first_stage, VectorFirstStage):  # tells its two steps itself
            return await self.first_stage(query, top_k=top_k, filter=filter)
        with observed(self.observers, Step("search", query)) as tell:
            found = await self.first_stage(query, top_k=top_k, filter=filter)
            tell(found)
        return found


@dataclass(frozen=True, slots=True)
class _Found:
    """query: with its picture decoded; seconds: what decoding and searching took of the call's timeout"""

    query: Query
    candidates: tuple[Candidate, ...]
    seconds: float


def _first_stage(
    store: Store | None,
    embedder: Embedder | None,
    first_stage: FirstStage | None,
    with_memory: bool,
    observers: Observers,
) -> FirstStage:
    if first_stage is not None and store is None and embedder is None:
        return first_stage
    if first_stage is None and store is not None and embedder is not None:
        return VectorFirstStage(store, embedder, with_memory, observers)
    given = [n for n, v in (("store", store), ("embedder", embedder), ("first_stage", first_stage)) if v is not None]
    fix = "Pass one or the other."
    raise OptionsError(explain("first stage", expected="store and embedder, or first_stage", got=given, fix=fix))


def _write_back(memory: str, store: Store | None, engine: Engine | None) -> WriteBack:
    sidecars = getattr(store, "sidecars", None)
    if memory != "lazy" or not isinstance(sidecars, Sidecars) or engine is None:
        fix = "Pass store=EdgeStore(...) or QdrantStore(...) and engine=..., or leave memory out."
        got = f"{memory!r} with store {type(store).__name__} and engine {type(engine).__name__}"
        raise OptionsError(explain("memory", expected='"stored", or "lazy" with store and engine', got=got, fix=fix))
    return WriteBack(sidecars)


def _ready(
    reranker: Reranker | None, *, engine: Engine | None, compressor: Compressor | None, cache: ResultCache | None
) -> Reranker:
    """A reranker that comes with its own parts, so that none of them may be given beside it."""
    named = (("engine", engine), ("compressor", compressor), ("reranker", reranker), ("cache", cache))
    given = [name for name, value in named if value is not None]
    if reranker is None or given != ["reranker"]:
        fix = "A reranker brings its own engine, compressor and cache."
        raise OptionsError(explain("model", expected="engine, or reranker alone", got=given, fix=fix))
    return as_reranker(reranker)


def as_reranker(given: Any) -> Reranker:
    """Raises `OptionsError` for what is none, with what to do about it."""
    if not callable(getattr(given, "arerank", None)):
        fix = "Wrap it: retrv_r1_retriever.RetrvR1Reranker(engine)." if isinstance(given, Engine) else "Pass one."
        got = type(given).__name__
        raise OptionsError(explain("reranker", expected="retrv_r1_retriever.RetrvR1Reranker", got=got, fix=fix))
    reranker: Reranker = given
    return reranker


def _finished(results: RankedResults, query: Query, seconds: float) -> RankedResults:
    """The results under the caller's own query, with the first stage in the timings."""
    if results.trace is None:
        return replace(results, query=query)
    timings = dict(results.trace.timings)
    timings |= {"first_stage": seconds, "total": timings.get("total", 0.0) + seconds}
    return replace(results, query=query, trace=replace(results.trace, timings=timings))
