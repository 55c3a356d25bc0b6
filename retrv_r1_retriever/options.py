"""Options of one rerank call: one frozen value, taken whole by every adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from retrv_r1_retriever.errors import OptionsError, explain
from retrv_r1_retriever.types import MAX_CANDIDATES

Think = Literal["auto", "always", "never"]
Ranking = Literal["hybrid", "logits", "promote"]
OnFailure = Literal["fallback", "raise"]
OnStale = Literal["recompute", "first_stage", "raise"]


@dataclass(frozen=True, slots=True)
class RerankOptions:
    """How one call retrieves and reranks.

    top_k: candidates taken from the first stage (K), 1 to 127
    top_n: results returned, None = all K; cut after ranking
    think: `always` reasons and may inspect; `never` takes the direct read (one token); `auto` thinks only when the
        direct read's margin (nats between the two best slots) is below `think_margin`
    think_margin: threshold for `auto`; None = the checkpoint's calibrated one, and without that `auto` means `always`
    max_think_share: upper bound, in [0, 1], on the share of a batch that `auto` lets think; smallest margins first
    ranking: `hybrid`, `logits` (implies think="never") or `promote`, see docs/concepts.md
    max_inspections: candidates opened in full, at most; a thought with more refused requests than that is ended, too
    max_new_tokens: tokens sampled by the model over the whole thought, at most
    temperature, seed: 0 = greedy; otherwise seeded sampling
    timeout_s: for the whole call, first stage included; None = no limit
    on_failure: `fallback` returns first-stage order with a reason; `raise` raises
    on_stale: what to do with a candidate whose stored memory is missing or does not fit
    max_recompute: candidates whose memory is recomputed within one call, at most
    """

    top_k: int = 50
    top_n: int | None = None
    think: Think = "auto"
    think_margin: float | None = None
    max_think_share: float = 1.0
    ranking: Ranking = "hybrid"
    max_inspections: int = 4
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float | None = 30.0
    on_failure: OnFailure = "fallback"
    on_stale: OnStale = "recompute"
    max_recompute: int = 8

    def __post_init__(self) -> None:
        _check_int("top_k", self.top_k, 1, MAX_CANDIDATES)
        if self.top_n is not None:
            _check_int("top_n", self.top_n, 1, None)
        _check_int("max_inspections", self.max_inspections, 0, MAX_CANDIDATES)
        _check_int("max_new_tokens", self.max_new_tokens, 1, None)
        _check_int("max_recompute", self.max_recompute, 0, MAX_CANDIDATES)
        hints = get_type_hints(type(self))
        for name in ("think", "ranking", "on_failure", "on_stale"):
            if getattr(self, name) not in get_args(hints[name]):
                raise OptionsError(
                    explain(
                        name, expected=get_args(hints[name]), got=repr(getattr(self, name)), fix="Use one of these."
                    )
                )
        if self.timeout_s is not None and not _number(self.timeout_s) > 0:
            raise OptionsError(
                explain("timeout_s", expected="seconds > 0 or None", got=repr(self.timeout_s), fix="Raise it.")
            )
        if not 0.0 <= _number(self.max_think_share) <= 1.0:
            raise OptionsError(
                explain("max_think_share", expected="0 to 1", got=repr(self.max_think_share), fix="Pass a share.")
            )
        if self.think_margin is not None and not _number(self.think_margin) >= 0:
            raise OptionsError(explain("think_margin", expected="nats >= 0 or None", got=repr(self.think_margin),
                                       fix="0 never thinks; None takes the checkpoint's."))  # fmt: skip
        if not 0 <= _number(self.temperature) < math.inf:
            raise OptionsError(explain("temperature", expected=">= 0", got=repr(self.temperature), fix="0 is greedy."))
        _check_int("seed", self.seed, 0, None)

    def with_options(self, **changes: Any) -> RerankOptions:
        """A copy with some fields changed; an unknown name is an error that lists the known ones."""
        known = tuple(f.name for f in fields(self))
        for name in changes:
            if name not in known:
                raise OptionsError(explain("RerankOptions", expected=known, got=repr(name), fix="Fix the name."))
        return replace(self, **changes)


def as_options(options: RerankOptions | None, default: RerankOptions) -> RerankOptions:
    """The options of a call, or the default where it names none."""
    chosen: object = default if options is None else options
    if not isinstance(chosen, RerankOptions):
        fix = "E.g. BALANCED.with_options(think='never')."
        raise OptionsError(explain("options", expected="RerankOptions", got=type(chosen).__name__, fix=fix))
    return chosen


def check_reach(name: str, options: RerankOptions) -> None:
    """For a retriever, which cannot return more than its first stage finds. name: what its framework calls `top_n`"""
    if options.top_n is not None and options.top_n > options.top_k:
        fix = f"Raise options.top_k, to {MAX_CANDIDATES} at most: only what the first stage found can be ranked."
        raise OptionsError(explain(name, expected=f"at most top_k={options.top_k}", got=options.top_n, fix=fix))


def _number(value: object) -> float:
    """NaN, which passes no comparison, for what is no number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    limits = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise OptionsError(explain(name, expected=limits, got=repr(value), fix=f"Pass {limits}."))


#: One token per query: the direct read alone.
FAST = RerankOptions(think="never", ranking="logits", max_inspections=0)
#: Thinks when the direct read is unsure (always, until a checkpoint is calibrated).
BALANCED = RerankOptions()
#: Always thinks, with room to open more candidates.
THOROUGH = RerankOptions(think="always", max_inspections=8, max_new_tokens=1024, timeout_s=120.0)
