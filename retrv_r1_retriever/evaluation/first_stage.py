"""An existing run as the first stage: what somebody else's search found, with this store's documents and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.store import Filter, Store
from retrv_r1_retriever.types import Candidate, Query


@dataclass(frozen=True, slots=True)
class RunFirstStage:
    """run: query id -> (document id, score), best first. Raises `InputError` for a document that the store does not have.

    A query that is not in the run has no candidates.
    """

    store: Store
    run: Mapping[str, Sequence[tuple[str, float]]]
    with_memory: bool = True

    async def __call__(self, query: Query, *, top_k: int, filter: Filter | None = None) -> list[Candidate]:
        ranked = self.run.get(query.id or "", ())[:top_k]
        stored = await self.store.get([id for id, _ in ranked], with_memory=self.with_memory)
        found = {candidate.document.id: candidate for candidate in stored}
        missing = [id for id, _ in ranked if id not in found]
        if missing:
            got = f"{len(missing)} of {len(ranked)} that are not in it (first: {missing[0]!r})"
            fix = "The run is of another pool: name its own, or index these documents."
            raise InputError(
                explain(f"run of query {query.id!r}", expected="documents of this store", got=got, fix=fix)
            )
        return [replace(found[id], retrieval_score=score, rank=rank) for rank, (id, score) in enumerate(ranked, 1)]
