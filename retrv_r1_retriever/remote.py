"""`RemoteReranker`: a client of `retrv-r1 serve` that stands wherever a `RetrvR1Reranker` does, without torch or a model.

reranker = RemoteReranker("http://127.0.0.1:8080", api_key="...")
results = reranker.rerank("a red ring", documents)
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.errors import (
    EngineError,
    ImageError,
    InputError,
    OptionsError,
    RerankTimeout,
    ServerError,
    StaleMemoryError,
)
from retrv_r1_retriever.http import HttpLimits, JsonHttp
from retrv_r1_retriever.images import ImageSource, LocalImages, image_reference, is_data_uri
from retrv_r1_retriever.options import BALANCED, RerankOptions, as_options
from retrv_r1_retriever.progress import Progress, ProgressFn
from retrv_r1_retriever.ranking import score
from retrv_r1_retriever.reranker import Candidates, as_candidates, as_query, bounded, fallback
from retrv_r1_retriever.trace import ReasoningTrace
from retrv_r1_retriever.types import Candidate, Content, Query, RankedResult, RankedResults, Signals, Status

log = logging.getLogger(__name__)

_SENT = (
    "think", "think_margin", "ranking", "max_inspections", "max_new_tokens", "temperature", "seed", "on_stale", "max_recompute",
)  # fmt: skip
_SHARE_FOR_THE_WAY = (
    0.1  # of timeout_s, at most half a second: the server's answer in time has to get here in time, too
)
_SHORTEST_S = 0.05


class RemoteReranker:
    """Reranks on a server. Needs the extra `http` (httpx, which LangChain and LlamaIndex bring along).

    url: of the server, without a path
    by_id: send ids only: the server has the same collection, and reads the memory that was made when it was indexed
    images: reads pictures given as paths or URLs, here and not on the server
    options: as with `RetrvR1Reranker`; `max_think_share` below 1 has no effect here
    trace: fetch the reasoning, too
    """

    compressor = None  # candidates need no memory here

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        by_id: bool = False,
        images: ImageSource | None = None,
        options: RerankOptions = BALANCED,
        trace: bool = True,
        limits: HttpLimits | None = None,
    ) -> None:
        self.http = JsonHttp(url, api_key=api_key, limits=limits)
        self.by_id, self.images, self.options, self.trace = by_id, images or LocalImages(), options, trace

    async def arerank(
        self,
        query: Query | str,
        candidates: Candidates,
        *,
        options: RerankOptions | None = None,
        progress: ProgressFn | None = None,
    ) -> RankedResults:
        """As `RetrvR1Reranker.arerank`. A candidate whose picture cannot be read here is not sent; it is last, and `unranked`.

        A server that fails, is full or cannot be reached is a failure of the model (`options.on_failure`); one that refuses
        the request raises `InputError`, `StaleMemoryError`, or for its API key `OptionsError`.
        """
        options, query = as_options(options, self.options), as_query(query)
        # To the server, the order they come in is the first stage's.
        ranked = tuple(sorted(as_candidates(candidates), key=lambda c: c.rank))
        results = await self._answer(query, ranked, options)
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
        """One result per query, in order; `timeout_s` is per query."""
        if len(queries) != len(candidates):
            raise InputError(f"candidates: expected {len(queries)} lists, got {len(candidates)}. Pass one per query.")
        jobs = list(zip(queries, candidates, strict=True))
        return await bounded(lambda job: self.arerank(*job, options=options), jobs, concurrency)

    def rerank_batch(
        self,
        queries: Sequence[Query | str],
        candidates: Sequence[Candidates],
        *,
        options: RerankOptions | None = None,
        concurrency: int = 8,
    ) -> list[RankedResults]:
        return run(self.arerank_batch(queries, candidates, options=options, concurrency=concurrency))

    async def aclose(self) -> None:
        await self.http.aclose()

    def close(self) -> None:
        run(self.aclose())

    async def _answer(self, query: Query, candidates: tuple[Candidate, ...], options: RerankOptions) -> RankedResults:
        if not candidates:
            return fallback(query, candidates, options, "no candidates to rank: the first stage returned none")
        try:
            try:
                async with asyncio.timeout(options.timeout_s) as limit:
                    results = await self._rerank(query, candidates, options)
            except TimeoutError as error:
                if not limit.expired():
                    raise
                raise RerankTimeout(
                    f"{self.http.base_url} gave no answer within timeout_s={options.timeout_s}."
                ) from error
        except EngineError as error:
            if options.on_failure == "raise":
                raise
            log.warning("falling back to first-stage order: %s", error)
            return fallback(query, candidates, options, str(error))
        if results.status is Status.FALLBACK and options.on_failure == "raise":
            raise EngineError(results.reason or "the server fell back to first-stage order")
        return results

    async def _rerank(self, query: Query, candidates: tuple[Candidate, ...], options: RerankOptions) -> RankedResults:
        parts = await _Parts.of(candidates, self.by_id, self.images)
        if not parts.documents:
            raise EngineError("no candidate could be read: " + "; ".join(parts.notes))
        body = {
            "query": {"instruction": query.instruction, **await _wire(query.content, self.images)},
            "documents": list(parts.documents),
            "options": _options(options),
            "return_trace": self.trace,
        }
        try:
            answer = await self.http.post("v1/rerank", body, idempotent=True)
        except ServerError as error:
            raise _meaning(error) from error
        try:
            return _results(answer, query, parts, options)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"{self.http.base_url}: expected an answer of `retrv-r1 serve`, got another ({type(error).__name__}: {error}). "
                "Is the URL right, and the server of a fitting version?"
            ) from error


@dataclass(frozen=True, slots=True)
class _Parts:
    """sent: the candidates behind `documents`; left_out: those that could not be read, in first-stage order."""

    sent: tuple[Candidate, ...]
    documents: tuple[Mapping[str, Any], ...]
    left_out: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    async def of(cls, candidates: tuple[Candidate, ...], by_id: bool, images: ImageSource) -> _Parts:
        if by_id:
            return cls(candidates, tuple({"id": c.document.id} for c in candidates))
        work = (_wire(c.document.content, images) for c in candidates)
        made = list(zip(candidates, await asyncio.gather(*work, return_exceptions=True), strict=True))
        if others := [d for _, d in made if isinstance(d, BaseException) and not isinstance(d, ImageError)]:
            raise others[0]
        left_out = (c for c, d in made if isinstance(d, BaseException))
        notes = tuple(f"candidate {c.document.id!r} was not sent: {d}" for c, d in made if isinstance(d, BaseException))
        sent = [(c, d) for c, d in made if not isinstance(d, BaseException)]
        return cls(tuple(c for c, _ in sent), tuple(d for _, d in sent), tuple(left_out), notes)


async def _wire(content: Content, images: ImageSource) -> dict[str, str | None]:
    """A document or query as the server takes it. Raises `ImageError`."""
    image = content.image
    if image is None:
        return {"text": content.text}
    if not isinstance(image, bytes) and not (isinstance(image, str) and is_data_uri(image)):
        image = (await images.load(image)).image
    return {"text": content.text, "image": await asyncio.to_thread(image_reference, image)}


def _options(options: RerankOptions) -> dict[str, Any]:
    named: dict[str, Any] = {name: getattr(options, name) for name in _SENT}
    if options.timeout_s is not None:
        way = min(0.5, _SHARE_FOR_THE_WAY * options.timeout_s)
        named["timeout_s"] = max(options.timeout_s - way, _SHORTEST_S)
    return named


def _results(answer: Mapping[str, Any], query: Query, parts: _Parts, options: RerankOptions) -> RankedResults:
    """Raises `LookupError`, `TypeError` or `ValueError` for what is no complete answer: every document once, no other."""
    lines, everything = answer["results"], list(range(len(parts.sent)))
    if sorted(line["index"] for line in lines) != everything or [line["rank"] - 1 for line in lines] != everything:
        raise ValueError("it does not rank every document once")
    if not set(answer["unranked"]) <= set(everything):
        raise ValueError("it names documents that were not sent")
    status = Status(answer["status"])
    count = len(parts.sent) + len(parts.left_out)
    ranked = [_result(line, parts.sent[line["index"]], status, count) for line in lines]
    for candidate in parts.left_out:
        rank = len(ranked) + 1
        ranked.append(RankedResult(candidate, rank, None if status is Status.FALLBACK else score(rank, count)))
    reason = answer["reason"]
    if parts.left_out:
        status = Status.PARTIAL if status is Status.RERANKED else status
        reason = "; ".join(filter(None, (reason, f"{len(parts.left_out)} of {count} candidates could not be read")))
    unranked = [parts.sent[i] for i in answer["unranked"]] + list(parts.left_out)
    if status is Status.FALLBACK:
        in_order = sorted(ranked, key=lambda r: r.candidate.rank)
        ranked = [replace(result, rank=rank) for rank, result in enumerate(in_order, 1)]
    return RankedResults(
        query=query,
        results=tuple(ranked[: options.top_n]),
        status=status,
        none_chosen=bool(answer["none_chosen"]),
        reason=reason,
        unranked=tuple(c.document.id for c in unranked) if status is Status.PARTIAL else (),
        trace=_trace(answer, parts),
    )


def _result(line: Mapping[str, Any], candidate: Candidate, status: Status, count: int) -> RankedResult:
    signals = Signals(line["keep_logprob"], line["slot_logprob"], line["verdict"], line["opened"], line["match"])
    ours = None if status is Status.FALLBACK else score(line["rank"], count)
    return RankedResult(candidate, line["rank"], ours, line["selected"], signals)


def _trace(answer: Mapping[str, Any], parts: _Parts) -> ReasoningTrace | None:
    if answer.get("trace") is None:
        return None
    trace = ReasoningTrace.from_json(json.dumps(answer["trace"]))
    names = {f"#{i}": candidate.document.id for i, candidate in enumerate(parts.sent)}
    return replace(
        trace, candidates=tuple(names.get(n, n) for n in trace.candidates), notes=(*trace.notes, *parts.notes)
    )


def _meaning(error: ServerError) -> Exception:
    """What a refusal says about the call; everything else stays a failure of the model."""
    if error.status in (401, 403):
        return OptionsError(str(error))
    if error.status == 409:
        return StaleMemoryError(error.detail or str(error))
    if error.status in (400, 404, 413, 422):
        return InputError(str(error))
    return error
