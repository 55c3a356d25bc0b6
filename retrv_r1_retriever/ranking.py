"""From what the model said to an order over all K candidates. Pure: no engine, no clock.

`hybrid`, best first:

1. the answer (where none is the answer by a calibrated lead: the candidate that would have been);
2. everything not settled below, by one value per candidate:
   - *listed* (it has a verdict in the elimination; opened-and-matching ones included): log p(keep) of that first verdict. On
     engines that write verdicts without probabilities, `keep` counts as 0 and any reason against as -inf;
   - *unlisted*: its log-probability in the direct read, or without one the chance level -log(K + 1);
3. opened and not chosen, because the check said "differs" or did not decide, by the same value.

Listed and unlisted interleave by that value. Both are log-probabilities, and the direct read's mass is shared by all slots while
every listed candidate could be kept, so an unlisted one passes a listed one only when the direct read believes in it more
than the model believes in keeping the other. Ties break by first-stage rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from retrv_r1_retriever.engines.base import SlotRead
from retrv_r1_retriever.options import Ranking
from retrv_r1_retriever.prompt import KEEP, NONE_INDEX
from retrv_r1_retriever.session import Outcome
from retrv_r1_retriever.types import Candidate, Content, RankedResult, RankedResults, Signals, Status


@dataclass(frozen=True, slots=True)
class Order:
    """A full order over the candidates of one prompt.

    indices: candidate indices, best first: a permutation of range(K)
    answer: the index the model chose; None if it chose none or gave no valid answer
    signals: by candidate index
    """

    indices: tuple[int, ...]
    answer: int | None
    none_chosen: bool
    signals: tuple[Signals, ...]


def rank(
    candidates: Sequence[Candidate],
    direct: SlotRead | None,
    outcome: Outcome | None,
    ranking: Ranking = "hybrid",
    none_margin: float | None = None,
) -> Order:
    """Order `candidates`. At least one of `direct` and `outcome` is needed; `logits` needs `direct` and ignores `outcome`.

    none_margin: the answer is none exactly if none leads the best candidate by these nats, in the read that decides (behind a
        thought its own answer, else the direct read); None = as the model said
    """
    if direct is None and (outcome is None or ranking == "logits"):
        raise ValueError(f"ranking={ranking!r}: neither a direct read nor a usable thought to rank by")
    if direct is not None and len(direct.logprobs) != len(candidates) + 1:
        raise ValueError(f"direct read: expected {len(candidates) + 1} slots, got {len(direct.logprobs)}")
    outcome = None if ranking == "logits" else outcome
    signals = _signals(len(candidates), direct, outcome)
    slot = outcome.answer if outcome is not None else _best_slot(direct, candidates)
    first = slot if slot is not None and slot < len(candidates) else None
    none_chosen = slot == NONE_INDEX
    logprobs = outcome.answer_logprobs if outcome is not None else direct.logprobs if direct is not None else None
    if none_margin is not None and logprobs is not None:
        none_chosen = none_lead(logprobs) >= none_margin
        if first is None and not none_chosen:
            first = _best_candidate(logprobs, candidates)
    answer = None if none_chosen else first

    def key(index: int) -> tuple[int, float, int, int]:
        s, candidate = signals[index], candidates[index]
        first_stage = (candidate.rank, index)
        if index == first:  # also where none was chosen over it: it is the next best
            return (0, 0.0, *first_stage)
        if ranking == "promote":
            return (1, 0.0, *first_stage)
        rejected = s.opened and s.match is not True
        return (2 if rejected else 1, -_value(s, len(candidates)), *first_stage)

    indices = tuple(sorted(range(len(candidates)), key=key))
    return Order(indices, answer, none_chosen, signals)


def score(rank: int, count: int) -> float:
    """Strictly falling from 1 with the 1-based rank, always above 0: a later sort or cutoff by score keeps our order.

    Rank-based because the signals of one list mix several scales; comparable within one list only.
    """
    return 1.0 - (rank - 1) / count


def to_results(
    candidates: Sequence[Candidate], order: Order, rest: Sequence[Candidate] = ()
) -> tuple[RankedResult, ...]:
    """The ordered candidates as results, then `rest` (not judged by the model) as given. Nothing is cut here."""
    count = len(candidates) + len(rest)
    ranked = [
        RankedResult(candidates[index], place, score(place, count), index == order.answer, order.signals[index])
        for place, index in enumerate(order.indices, 1)
    ]
    tail = [RankedResult(c, place, score(place, count)) for place, c in enumerate(rest, len(ranked) + 1)]
    return (*ranked, *tail)


def _value(signals: Signals, count: int) -> float:
    if signals.keep_logprob is not None:
        return signals.keep_logprob
    if signals.verdict is not None:
        return 0.0 if signals.verdict == KEEP else -math.inf
    return signals.slot_logprob if signals.slot_logprob is not None else -math.log(count + 1)


def none_lead(logprobs: Sequence[float]) -> float:
    """Nats by which none, the last slot, leads the best candidate; negative = it trails."""
    *slots, none = map(_number, logprobs)
    return none - max(slots)


def _best_slot(direct: SlotRead | None, candidates: Sequence[Candidate]) -> int | None:
    """The arg-max slot of the direct read; between equals a candidate before none, then by first-stage rank."""
    if direct is None:
        return None
    best = _best_candidate(direct.logprobs, candidates)
    return best if _number(direct.logprobs[best]) >= _number(direct.logprobs[-1]) else NONE_INDEX


def _best_candidate(logprobs: Sequence[float], candidates: Sequence[Candidate]) -> int:
    return min(range(len(candidates)), key=lambda i: (-_number(logprobs[i]), candidates[i].rank, i))


def _signals(count: int, direct: SlotRead | None, outcome: Outcome | None) -> tuple[Signals, ...]:
    keep = {i: _number(p) for i, p in outcome.keep_logprobs} if outcome else {}
    verdicts = {v.index: v.text for v in outcome.thought.verdicts} if outcome else {}
    checks = {c.index: c.match for c in outcome.thought.checks} if outcome else {}
    opened = frozenset(outcome.inspected if outcome else ())
    return tuple(
        Signals(
            keep_logprob=keep.get(i),
            slot_logprob=_number(direct.logprobs[i]) if direct else None,
            verdict=verdicts.get(i),
            opened=i in opened,
            match=checks.get(i) if i in opened else None,
        )
        for i in range(count)
    )


def _number(logprob: float) -> float:
    """NaN has no place in an order; a broken probability is an impossible one."""
    return -math.inf if math.isnan(logprob) else logprob


#: Stands for what a framework found and there is nothing to read of, so that a list still holds everything that was found.
NOTHING = Content("(neither text nor picture)")


def with_unreadable(results: RankedResults, unread: Sequence[Candidate], top_n: int | None) -> RankedResults:
    """Candidates that the model was not shown, last with score 0; in their place, where nobody ranked anything."""
    if not unread:
        return results
    fell_back = results.status is Status.FALLBACK
    placed = [*results, *(RankedResult(candidate, 0, None if fell_back else 0.0) for candidate in unread)]
    if fell_back:
        placed.sort(key=lambda result: result.candidate.rank)
    reason = f"nothing to read, neither text nor picture, in {len(unread)} of those found"
    return replace(
        results,
        results=tuple(replace(result, rank=rank) for rank, result in enumerate(placed[:top_n], 1)),
        status=Status.FALLBACK if fell_back else Status.PARTIAL,
        reason=f"{results.reason}; {reason}" if results.reason else reason,
        unranked=(*results.unranked, *(candidate.document.id for candidate in unread)),
    )
