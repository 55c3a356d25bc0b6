"""Answers of earlier, equal calls, kept for a while. What is kept is the decision; the documents stay the caller's own."""

from __future__ import annotations

import copy
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.images import content_hash
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.types import Candidate, Content, Document, Query, RankedResults, Status

#: What may differ between two calls that have the same answer.
_WITHOUT_EFFECT = ("timeout_s", "on_failure", "max_think_share")
#: Stand where the caller's own objects were, so that a cache keeps no document and no query alive.
_NOBODY, _NO_QUERY = Candidate(Document("", Content("-")), None, 1), Query.of("-")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """max_entries: 0 = no cache; ttl_s: seconds for which an answer is good"""

    max_entries: int = 0
    ttl_s: float = 300.0

    def __post_init__(self) -> None:
        if self.max_entries < 0 or not self.ttl_s > 0:
            got = f"max_entries {self.max_entries}, ttl_s {self.ttl_s}"
            fix = "max_entries = 0 switches the cache off."
            raise OptionsError(explain("cache", expected="max_entries >= 0 and ttl_s > 0", got=got, fix=fix))

    def make(self) -> ResultCache | None:
        return ResultCache(self.max_entries, self.ttl_s) if self.max_entries else None


class ResultCache:
    """For `RetrvR1Reranker(cache=...)` and `RetrvR1Retriever(cache=...)`; in memory, for any number of threads and event loops.

    Two calls are equal if query, tenant, candidates (ids in order, contents), model and options are; a picture named by a path
    counts by its path. Only `reranked` answers are kept: what failed or is incomplete may do better next time.
    max_entries: the least recently used goes first; ttl_s: seconds for which an answer is good
    """

    def __init__(self, max_entries: int = 1000, ttl_s: float = 300.0, *, clock: Callable[[], float] = time.monotonic):
        CacheConfig(max_entries, ttl_s)  # raises
        self._max_entries, self._ttl_s, self._clock = max_entries, ttl_s, clock
        self._entries: OrderedDict[str, tuple[float, RankedResults, tuple[int, ...]]] = OrderedDict()
        self._lock, self._tenant = threading.Lock(), ""

    def for_tenant(self, tenant: object) -> ResultCache:
        """The same memory; no answer of another tenant is found in it."""
        view = copy.copy(self)
        view._tenant = repr(tenant)
        return view

    def key(
        self, query: Query, candidates: Sequence[Candidate], options: RerankOptions, versions: Mapping[str, str]
    ) -> str:
        """query: with its picture decoded. Raises `InputError` for a candidate's picture of a kind that cannot be hashed."""
        chosen = {name: value for name, value in asdict(options).items() if name not in _WITHOUT_EFFECT}
        listed = [(c.document.id, content_hash(c.document.content), c.rank) for c in candidates]
        asked = (content_hash(query.content), query.instruction)
        parts = (self._tenant, asked, listed, sorted(versions.items()), sorted(chosen.items()))
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, key: str, query: Query, candidates: Sequence[Candidate]) -> RankedResults | None:
        """The answer to an equal call, over these candidates, marked as `trace.cached`."""
        with self._lock:
            until, kept, places = self._entries.get(key, (0.0, None, ()))
            if kept is None or self._clock() >= until:
                self._entries.pop(key, None)
                return None
            self._entries.move_to_end(key)
        results = tuple(replace(r, candidate=candidates[p]) for r, p in zip(kept.results, places, strict=True))
        trace = replace(kept.trace, cached=True) if kept.trace else None
        return replace(kept, query=query, results=results, trace=trace)

    def put(self, key: str, candidates: Sequence[Candidate], results: RankedResults) -> None:
        if results.status is not Status.RERANKED:
            return
        place = {id(candidate): index for index, candidate in enumerate(candidates)}
        places = tuple(place[id(result.candidate)] for result in results.results)
        bare = tuple(replace(result, candidate=_NOBODY) for result in results.results)
        with self._lock:
            self._entries[key] = self._clock() + self._ttl_s, replace(results, query=_NO_QUERY, results=bare), places
            self._entries.move_to_end(key)
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)
