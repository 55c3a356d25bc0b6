"""One thought as a pure state machine: no model, tokenizer, socket, clock or randomness.

It hands out segments to append and asks for a generation; the driver feeds the generation back until the session is done.
Serving engines, SFT replay and the GRPO rollout all drive this object, so training and serving cannot drift apart.

    step = session.begin()
    while step.generate is not None:
        await engine.append(handle, step.append)
        step = session.receive(await engine.generate(handle, step.generate))
    outcome = session.outcome()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from retrv_r1_retriever.parser import Thought, parse, requested_inspection
from retrv_r1_retriever.prompt import (
    ANSWER_END,
    ANSWER_START,
    INSPECT_END,
    THINK_END,
    THINK_START,
    Prompt,
    label_index,
)  # fmt: skip
from retrv_r1_retriever.trace import Forced, Full, Sampled, Segment
from retrv_r1_retriever.types import StopReason

#: Tokens kept free for `</think><answer><|c0|></answer>` when the context budget is checked.
ANSWER_RESERVE = 8


@dataclass(frozen=True, slots=True)
class GenerateParams:
    """What to sample next.

    stop: generation ends after any of these token texts, which are included in the result
    allowed: if not empty, the only token texts that may be sampled (a one-token choice among the slots)
    """

    stop: tuple[str, ...]
    max_new_tokens: int
    allowed: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What was sampled.

    stop: the member of `GenerateParams.stop` that ended it, or None (length limit, end of turn)
    tokens: number of sampled tokens, also on engines that return no ids
    tracked: (slot, log p(keep)) at each verdict position: after every label outside an inspection request
    slot_logprobs: log p over K labels + none at the sampled position, when `allowed` was given
    """

    text: str
    tokens: int
    stop: str | None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    tracked: tuple[tuple[int, float], ...] = ()
    slot_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """max_inspections: opened candidates; one refused request more than that ends the thought as well
    max_context: tokens the engine can hold (prompt included); None = unlimited
    """

    max_inspections: int = 4
    max_new_tokens: int = 512
    max_context: int | None = None
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """Append these segments, then generate; `generate` None means the session is over."""

    append: tuple[Segment, ...]
    generate: GenerateParams | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a session. `answer` is an index, `NONE_INDEX`, or None when the engine failed or answered with no slot."""

    segments: tuple[Segment, ...]
    thought: Thought
    answer: int | None
    stop_reason: StopReason
    inspected: tuple[int, ...]
    unreadable: tuple[int, ...]
    refused: int
    sampled_tokens: int
    keep_logprobs: tuple[tuple[int, float], ...]
    answer_logprobs: tuple[float, ...] | None


class _State(Enum):
    NEW = auto()
    THINKING = auto()
    ANSWERING = auto()
    DONE = auto()


class InspectionSession:
    """Single use. `full_tokens[i]` is what opening candidate i costs; `prompt_tokens` what the prompt already holds."""

    def __init__(
        self, prompt: Prompt, limits: SessionLimits, *, prompt_tokens: int = 0, full_tokens: Sequence[int] = ()
    ) -> None:
        if full_tokens and len(full_tokens) != len(prompt.candidates):
            raise ValueError(f"full_tokens: expected {len(prompt.candidates)} counts, got {len(full_tokens)}")
        self._prompt = prompt
        self._limits = limits
        self._full_tokens = tuple(full_tokens) or (0,) * len(prompt.candidates)
        self._context = prompt_tokens
        self._turn: list[Segment] = []
        self._state = _State.NEW
        self._stop_reason = StopReason.ANSWERED
        self._inspected: list[int] = []
        self._unreadable: list[int] = []
        self._refused = 0
        self._sampled_tokens = 0
        self._keep: dict[int, float] = {}
        self._answer: int | None = None
        self._answer_logprobs: tuple[float, ...] | None = None

    def begin(self) -> Step:
        self._expect(_State.NEW)
        self._state = _State.THINKING
        return self._think(Forced(THINK_START))

    def receive(self, generation: Generation) -> Step:
        """Take a generation back; the next step, or one without `generate` when the session is over."""
        if self._state is _State.ANSWERING:
            return self._finish(generation)
        self._expect(_State.THINKING)
        self._record(generation)
        if generation.stop == INSPECT_END:
            return self._inspect(requested_inspection(generation.text))
        if generation.stop == THINK_END:
            return self._ask_answer(Forced(ANSWER_START))
        return self._close(StopReason.FORCED_BY_BUDGET)

    def unreadable(self, index: int) -> Step:
        """The driver could not load candidate `index`, whose `Full` was just handed out: the thought goes on without it."""
        self._expect(_State.THINKING)
        if not self._turn or self._turn[-1] != Full(index):
            raise RuntimeError(f"candidate {index} was not just opened")
        self._turn.pop()
        self._inspected.remove(index)
        self._context -= self._full_tokens[index]
        self._unreadable.append(index)
        return self._think()

    def fail(self) -> None:
        """The engine is gone: keep what is known."""
        self._state = _State.DONE
        self._stop_reason = StopReason.ENGINE_ERROR

    def outcome(self) -> Outcome:
        self._expect(_State.DONE)
        return Outcome(
            segments=(*self._prompt.segments, *self._turn),
            thought=replace(parse(self._turn), answer=self._answer),
            answer=self._answer,
            stop_reason=self._stop_reason,
            inspected=tuple(self._inspected),
            unreadable=tuple(self._unreadable),
            refused=self._refused,
            sampled_tokens=self._sampled_tokens,
            keep_logprobs=tuple(self._keep.items()),
            answer_logprobs=self._answer_logprobs,
        )

    def _inspect(self, index: int | None) -> Step:
        closed = index is None or index >= len(self._prompt.candidates)
        if closed or index in self._inspected or index in self._unreadable:
            self._refused += 1
            if self._refused > self._limits.max_inspections:
                return self._close(StopReason.FORCED_BY_BUDGET)  # a model in a loop would spend every token it has
            return self._think()
        assert index is not None
        if len(self._inspected) >= self._limits.max_inspections or self._tokens_left < 1:
            return self._close(StopReason.FORCED_BY_BUDGET)  # a candidate is never opened without room for its check
        if not self._fits(self._full_tokens[index]):
            return self._close(StopReason.CONTEXT_OVERFLOW)
        self._inspected.append(index)
        self._context += self._full_tokens[index]
        return self._think(Full(index))

    def _think(self, *segments: Segment) -> Step:
        self._turn += segments
        left = self._tokens_left
        if left < 1:
            return self._close(StopReason.FORCED_BY_BUDGET, *segments)
        if self._limits.max_context is not None:
            room = self._limits.max_context - self._context - ANSWER_RESERVE
            if room < 1:
                return self._close(StopReason.CONTEXT_OVERFLOW, *segments)
            left = min(left, room)
        return Step(segments, self._params((INSPECT_END, THINK_END), left))

    def _close(self, reason: StopReason, *pending: Segment) -> Step:
        self._stop_reason = reason
        return self._ask_answer(Forced(THINK_END + ANSWER_START), *pending)

    def _ask_answer(self, opener: Forced, *pending: Segment) -> Step:
        self._turn.append(opener)
        self._state = _State.ANSWERING
        temperature = self._limits.temperature if self._stop_reason is StopReason.ANSWERED else 0.0
        params = GenerateParams((), 1, self._prompt.slots, temperature, self._limits.seed)
        return Step((*pending, opener), params)

    def _finish(self, generation: Generation) -> Step:
        self._record(generation)
        text = generation.text.strip()
        self._answer = label_index(text) if text in self._prompt.slots else None
        self._answer_logprobs = generation.slot_logprobs
        self._turn.append(Forced(ANSWER_END))
        self._state = _State.DONE
        return Step((), None)

    def _record(self, generation: Generation) -> None:
        self._turn.append(Sampled(generation.text, generation.token_ids, generation.logprobs))
        tokens = max(1, generation.tokens)  # an engine that reports none must still run out of budget
        self._sampled_tokens += tokens
        self._context += tokens
        if self._inspected:
            return  # the elimination is over: a label inside a check is no verdict
        for slot, logprob in generation.tracked:
            if 0 <= slot < len(self._prompt.candidates):
                self._keep.setdefault(slot, logprob)

    @property
    def _tokens_left(self) -> int:
        return self._limits.max_new_tokens - self._sampled_tokens

    def _fits(self, tokens: int) -> bool:
        limit = self._limits.max_context
        return limit is None or self._context + tokens + ANSWER_RESERVE < limit

    def _params(self, stop: tuple[str, ...], tokens: int) -> GenerateParams:
        return GenerateParams(stop, tokens, (), self._limits.temperature, self._limits.seed)

    def _expect(self, state: _State) -> None:
        if self._state is not state:
            raise RuntimeError(
                f"session is {self._state.name.lower()}, not {state.name.lower()}; sessions are single-use"
            )
