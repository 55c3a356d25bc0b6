"""Which candidates the model can read: stored memory is found, checked, and recomputed where allowed, before the prompt is built."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from retrv_r1_retriever.engines.base import CompressedContent, Compressor
from retrv_r1_retriever.errors import EngineError, InputError, StaleMemoryError, StoreError, explain
from retrv_r1_retriever.images import ImageSource, content_hash, load_content
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.points import native_id
from retrv_r1_retriever.sidecar import Sidecars
from retrv_r1_retriever.types import Candidate, Content, Memory

log = logging.getLogger(__name__)

#: Characters and bytes that are hashed in under a millisecond. Ours, not the paper's.
_MUCH = 200_000


@dataclass(frozen=True, slots=True)
class Readable:
    """positions: which of the given candidates the model can read; candidates: the same ones, each with fitting memory.

    notes: why the others were left out, for the trace; fresh: those of `candidates` whose memory was made now
    """

    positions: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    fresh: tuple[Candidate, ...] = ()


async def fetch(candidates: Sequence[Candidate], sidecars: Sidecars) -> tuple[list[Candidate], tuple[str, ...]]:
    """Candidates that came without memory, with that of the sidecar in use; their document ids are its point ids.

    Also a note, if it could not be read, or not be looked for: a call does not fail for what it can make itself.
    """
    ids = {c.document.id for c in candidates if c.memory is None}
    points = sorted(id for id in ids if native_id(id) is not None)
    try:
        in_use = bool(ids) and await sidecars.ready()
        found = await sidecars.fetch(points) if points and in_use else {}
    except StoreError as error:
        log.warning("memory beside the collection could not be read: %s", error)
        return list(candidates), (f"memory beside the collection could not be read: {error}",)
    memories = {_bare(point): memory for point, memory in found.items()}
    strange = len(ids) - len(points) if in_use else 0
    note = f"{strange} candidates have ids that no point can have; memory beside the collection is found by point ids"
    return [
        candidate
        if candidate.memory is not None
        else replace(candidate, memory=memories.get(_bare(candidate.document.id)))
        for candidate in candidates
    ], (note,) if strange else ()


def _bare(point_id: str) -> str:
    """A UUID may be written with hyphens or without."""
    return point_id.replace("-", "").lower()


async def resolve(
    candidates: Sequence[Candidate], compressor: Compressor | None, images: ImageSource, options: RerankOptions
) -> Readable:
    """Check every candidate's memory; what to do with a miss is `options.on_stale` and `options.max_recompute`.

    `compressor=None`: the engine reads candidates without memory, so all are readable as they are.
    Raises `StaleMemoryError` if asked to, `EngineError` if the compressor fails.
    """
    if compressor is None:
        return Readable(tuple(range(len(candidates))), tuple(candidates))
    digest = compressor.memory_digest
    hashes = await _hashes([c.document.content for c in candidates])
    misses = [i for i, c in enumerate(candidates) if not _fits(c.memory, digest, hashes[i])]
    if not misses:
        return Readable(tuple(range(len(candidates))), tuple(candidates))
    if options.on_stale == "raise":
        raise _stale(candidates, misses, digest)
    allowed = misses[: options.max_recompute] if options.on_stale == "recompute" else []
    made, notes = await _recompute([candidates[i] for i in allowed], compressor, images)
    fresh = {i: memory for i, memory in zip(allowed, made, strict=True) if memory is not None}
    if len(misses) > len(allowed):
        notes.append(f"memory of {len(misses) - len(allowed)} candidates is missing or stale and was not recomputed")
    if changed := sum(_digest(candidates[i]) == digest for i in misses):
        notes.append(
            f"stored memory of {changed} candidates is of other content: it changed since, or memory was built from other fields"
        )
    if fresh:
        notes.append(f"memory of {len(fresh)} candidates was recomputed; index them again to save this time")
    renewed = {i: replace(candidates[i], memory=made_now) for i, made_now in fresh.items()}
    positions = tuple(i for i in range(len(candidates)) if i in fresh or i not in misses)
    readable = tuple(renewed.get(i, candidates[i]) for i in positions)
    return Readable(positions, readable, tuple(notes), tuple(renewed.values()))


async def _hashes(contents: Sequence[Content]) -> list[str | None]:
    """In a thread only where there is much to hash: texts and paths take less time than a thread takes to begin."""
    if sum(map(_size, contents)) >= _MUCH:
        return await asyncio.to_thread(lambda: [_hash(content) for content in contents])
    return [_hash(content) for content in contents]


def _size(content: Content) -> int:
    """Characters and bytes to hash; a picture in memory is always much."""
    image = content.image
    reference = len(os.fspath(image)) if isinstance(image, str | bytes | os.PathLike) else 0 if image is None else _MUCH
    return len(content.text or "") + reference


def _hash(content: Content) -> str | None:
    """None for a picture of a kind that cannot even be hashed: that candidate is a miss, and loading it says why."""
    try:
        return content_hash(content)
    except InputError:
        return None


def _digest(candidate: Candidate) -> str | None:
    return None if candidate.memory is None else candidate.memory.digest


def _fits(memory: Memory | None, digest: str, hash_now: str | None) -> bool:
    return memory is not None and memory.digest == digest and memory.content_hash == hash_now


def _stale(candidates: Sequence[Candidate], misses: Sequence[int], digest: str) -> StaleMemoryError:
    first = candidates[misses[0]]
    if first.memory is None:
        found = "no memory"
    elif first.memory.digest != digest:
        found = f"memory {first.memory.digest[:12]}, of another model"
    else:
        found = "its content changed after it was indexed"
    return StaleMemoryError(
        explain(
            "candidate memory",
            expected=f"memory {digest[:12]} of the present content",
            got=f"{len(misses)} of {len(candidates)} without it (the first, {first.document.id!r}: {found})",
            fix="Index them again, or pass on_stale='recompute'.",
        )
    )


async def _recompute(
    candidates: Sequence[Candidate], compressor: Compressor, images: ImageSource
) -> tuple[list[Memory | None], list[str]]:
    """Memory per candidate, None where its picture could not be loaded or read, and a note for each of these."""
    loads = (load_content(images, c.document.content) for c in candidates)
    loaded = await asyncio.gather(*loads, return_exceptions=True)
    contents = [result[0] for result in loaded if not isinstance(result, BaseException)]
    made_in_order = iter(await asyncio.to_thread(_compress, compressor, contents))
    memories: list[Memory | None] = []
    notes = []
    for candidate, result in zip(candidates, loaded, strict=True):
        made = result if isinstance(result, BaseException) else next(made_in_order)
        if isinstance(result, BaseException) or isinstance(made, BaseException):
            memories.append(None)
            notes.append(f"memory of candidate {candidate.document.id!r} could not be recomputed: {made}")
            continue
        hash_now = content_hash(candidate.document.content)
        memories.append(Memory(made.rows, compressor.memory_digest, hash_now, made.full_tokens, result[1]))
    return memories, notes


def _compress(compressor: Compressor, contents: Sequence[Content]) -> list[CompressedContent | InputError]:
    """All at once, or, where one of them cannot be read, one by one: it must not cost the others.

    Raises `EngineError` for everything that is not a content's own fault.
    """
    if not contents:
        return []
    try:
        compressed = compressor.compress(contents)
    except EngineError:
        raise
    except InputError as error:
        if len(contents) == 1:
            return [error]
        return [one for content in contents for one in _compress(compressor, [content])]
    except Exception as error:
        raise EngineError(f"the compressor failed: {type(error).__name__}: {error}") from error
    if len(compressed) != len(contents):
        raise EngineError(f"the compressor failed: expected {len(contents)} memories, got {len(compressed)}.")
    return list(compressed)
