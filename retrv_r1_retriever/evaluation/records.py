"""What a reranking did to each query, small enough to keep for all of them, and what that adds up to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.metrics import Qrels, values
from retrv_r1_retriever.evaluation.significance import PairedTest, paired_test
from retrv_r1_retriever.types import RankedResults, Status, StopReason


@dataclass(frozen=True, slots=True)
class Record:
    """One query reranked, in ids.

    before, after: the K candidates as retrieved and as reranked; rest: what was retrieved beyond them, and stays behind them
    opened: in full, in order; unranked: not judged
    thought: False where the direct read alone decided; cut: a thought was begun and did not come to its end
    selected: the answer, None if none was chosen
    seconds: the whole call, None if nobody measured it; tokens_in, tokens_out: read and written by the model, None = not known
    """

    query: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    status: Status
    thought: bool = False
    cut: bool = False
    selected: str | None = None
    opened: tuple[str, ...] = ()
    unranked: tuple[str, ...] = ()
    seconds: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    rest: tuple[str, ...] = ()

    @property
    def retrieved(self) -> tuple[str, ...]:
        return (*self.before, *self.rest)

    @property
    def reranked(self) -> tuple[str, ...]:
        return (*self.after, *self.rest)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Record:
        """Raises `ValueError`, `KeyError` or `TypeError` for what is no record."""
        lists = {name: tuple(row[name]) for name in ("before", "after", "opened", "unranked", "rest")}
        return cls(**{**row, **lists, "status": Status(row["status"])})


def record_of(ranked: RankedResults, seconds: float | None = None, rest: Sequence[str] = ()) -> Record:
    """`ranked`: a whole list (`top_n=None`), its query with an id; seconds: of all that it took, by default the trace's."""
    if ranked.query.id is None:
        raise InputError(explain("query", expected="an id", got="None", fix="Pass Query.of(..., id=...)."))
    results, trace = ranked.results, ranked.trace
    selected = ranked.selected
    usage = trace.usage if trace else None  # zeros for an empty list would make the others look cheap
    cut = trace is not None and bool(trace.turn) and trace.stop_reason in (None, StopReason.ENGINE_ERROR)
    return Record(
        query=ranked.query.id,
        before=tuple(r.document.id for r in sorted(results, key=lambda r: r.candidate.rank)),
        after=tuple(r.document.id for r in results),
        status=ranked.status,
        thought=trace is not None and trace.stop_reason is not None,
        cut=cut,
        selected=selected.document.id if selected else None,
        opened=tuple(trace.candidates[i] for i in trace.inspected) if trace else (),
        unranked=ranked.unranked,
        seconds=trace.timings.get("total") if trace and seconds is None else seconds,
        tokens_in=usage.prompt_tokens + usage.inspected_tokens if usage else None,
        tokens_out=usage.sampled_tokens if usage and not cut else None,  # what was written last is lost with the cut
        rest=tuple(rest),
    )


class LostBy(StrEnum):
    """The step after which no right answer could be among the first any more."""

    FIRST_STAGE = "first stage"  #: no right answer among the candidates
    UNJUDGED = "not judged"  #: the model did not decide (fallback, a cut thought), or not about the right answer
    DIRECT_READ = "direct read"  #: decided by the direct read, without a thought
    THOUGHT = "thought"  #: eliminated or passed over, and nothing opened could put it right
    INSPECTION = "inspection"  #: opened and rejected, or a wrong one opened and chosen


def lost_by(record: Record, positives: Collection[str], k: int = 1) -> LostBy | None:
    """None if a right answer is among the first k."""
    if any(id in positives for id in record.reranked[:k]):
        return None
    right = {id for id in record.before if id in positives}
    if not right:
        return LostBy.FIRST_STAGE
    if record.status is Status.FALLBACK or record.cut or right <= {*record.unranked}:
        return LostBy.UNJUDGED
    if not record.thought:
        return LostBy.DIRECT_READ
    return LostBy.INSPECTION if {*record.opened} & {*right, record.selected} else LostBy.THOUGHT


@dataclass(frozen=True, slots=True)
class Summary:
    """Quality over all queries of the qrels.

    first_stage, reranked: metric -> mean; gain: of the reranked over the first stage, in the last metric
    ceiling: share of queries with a right answer among the candidates; lost: step -> queries; rescued, spoiled: queries whose
    first place became right, or was right and is not any more
    """

    queries: int
    first_stage: Mapping[str, float]
    reranked: Mapping[str, float]
    gain: PairedTest
    ceiling: float
    lost: Mapping[str, int]
    rescued: int
    spoiled: int


@dataclass(frozen=True, slots=True)
class Effort:
    """What it took, labels or not. None = not measured.

    timed: queries that p50 and p95, seconds per query, are of: all that had candidates; without any, no model is asked
    counted: queries that opened, tokens_in, tokens_out are means of: nobody knows what a fallback or a cut thought took
    cost: per 1,000 queries in the currency of the prices, None without prices
    """

    statuses: Mapping[str, int]
    timed: int
    p50: float | None
    p95: float | None
    counted: int
    opened: float | None
    tokens_in: float | None
    tokens_out: float | None
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class Price:
    """Of a million tokens read, and written."""

    read: float
    written: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(price) and price >= 0 for price in (self.read, self.written)):
            got = f"{self.read} and {self.written}"
            raise InputError(explain("price", expected="numbers of at least 0", got=got, fix="Per million tokens."))

    def per_thousand(self, tokens_in: float, tokens_out: float) -> float:
        """Of 1,000 queries."""
        return (tokens_in * self.read + tokens_out * self.written) / 1_000


def summarise(records: Sequence[Record], qrels: Qrels, metrics: Sequence[str]) -> Summary:
    """`records`: one per query of the qrels. Means of missing queries would be means of other queries, so they raise."""
    known = {record.query for record in records}
    if len(known) != len(records) or known != qrels.keys():
        got = f"{len(records)} records of {len(known)} queries for qrels of {len(qrels)}"
        raise InputError(explain("records", expected="one per query", got=got, fix="Evaluate the queries that miss."))
    before, after = {r.query: r.retrieved for r in records}, {r.query: r.reranked for r in records}
    scored = {name: (values(before, qrels, name), values(after, qrels, name)) for name in metrics}
    was, now = values(before, qrels, "recall@1"), values(after, qrels, "recall@1")
    last = scored[metrics[-1]]
    return Summary(
        queries=len(records),
        first_stage={name: _mean(pair[0].values()) for name, pair in scored.items()},
        reranked={name: _mean(pair[1].values()) for name, pair in scored.items()},
        gain=paired_test(list(last[0].values()), list(last[1].values())),
        ceiling=_mean(not positives(qrels[r.query]).isdisjoint(r.before) for r in records),
        lost=losses(records, qrels),
        rescued=sum(now[query] > was[query] for query in qrels),
        spoiled=sum(now[query] < was[query] for query in qrels),
    )


def effort(records: Sequence[Record], price: Price | None = None) -> Effort:
    seconds = [r.seconds for r in records if r.seconds is not None and r.before]
    p50, p95 = percentiles(seconds)
    statuses = dict(sorted(Counter(r.status.value for r in records).items()))
    known = [(r.tokens_in, r.tokens_out, len(r.opened)) for r in records
             if r.tokens_in is not None and r.tokens_out is not None]  # fmt: skip
    if not known:
        return Effort(statuses, len(seconds), p50, p95, 0, None, None, None)
    read, written, opened = map(_mean, zip(*known, strict=True))
    cost = price.per_thousand(read, written) if price else None
    return Effort(statuses, len(seconds), p50, p95, len(known), opened, read, written, cost)


def losses(records: Sequence[Record], qrels: Qrels, k: int = 1) -> dict[str, int]:
    """Step -> queries it lost, in the order of the steps."""
    found = Counter(lost_by(record, positives(qrels[record.query]), k) for record in records)
    return {step.value: found[step] for step in LostBy}


def positives(grades: Mapping[str, int]) -> set[str]:
    return {id for id, grade in grades.items() if grade > 0}


def percentiles(seconds: Sequence[float]) -> tuple[float | None, float | None]:
    """p50 and p95."""
    if not seconds:
        return None, None
    p50, p95 = np.percentile(seconds, (50, 95))
    return float(p50), float(p95)


def _mean(numbers: Iterable[float]) -> float:
    given = list(numbers)
    return math.fsum(given) / len(given)
