"""An engine without a model: it replays what it is told. For tests, examples and fuzzing."""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from retrv_r1_retriever.engines.base import SlotRead
from retrv_r1_retriever.errors import EngineError
from retrv_r1_retriever.parser import Thought, render
from retrv_r1_retriever.prompt import ADDED_TOKENS, INSPECT_END, INSPECT_START, LABELS, SLOTS, Prompt, label_index
from retrv_r1_retriever.session import GenerateParams, Generation
from retrv_r1_retriever.trace import Sampled, Segment

#: One generation: its text, all of it, or an error to raise in its place.
Reply: TypeAlias = str | Generation | Exception
Script: TypeAlias = Thought | Sequence[Reply] | Callable[[Prompt], Iterable[Reply]]

_INSPECTION = re.compile(f"{re.escape(INSPECT_START)}.*?{re.escape(INSPECT_END)}", re.DOTALL)
_LABEL = re.compile("|".join(map(re.escape, LABELS)))


@dataclass(slots=True, eq=False)
class ScriptedHandle:
    """segments: everything this handle has seen and written, in order."""

    prompt: Prompt
    replies: Iterator[Reply]
    prompt_tokens: int
    segments: list[Segment] = field(default_factory=list)


class ScriptedEngine:
    """Replays `script` from its start for every handle.

    script: a `Thought`, or its generations one by one, or a function from the prompt to these
    slots: the direct read as scores, candidates first, none last (normalised here); None = offers no direct read
    keep: log p(keep) reported for a candidate's label where it stands outside an inspection request
    think_margin, none_margin, trained_top_k, trained_min_k, direct_read: as in `Engine`
    failing: step ("open", "probe", "append", "generate", "close") -> the error it raises
    delay_s: seconds every step takes
    """

    def __init__(
        self,
        script: Script = (),
        *,
        slots: Sequence[float] | Callable[[Prompt], Sequence[float]] | None = None,
        keep: Mapping[int, float] | None = None,
        think_margin: float | None = None,
        none_margin: float | None = None,
        max_context: int | None = None,
        trained_top_k: int = 0,
        trained_min_k: int = 0,
        direct_read: bool = True,
        failing: Mapping[str, Exception] | None = None,
        delay_s: float = 0.0,
    ) -> None:
        self.script = script
        self.slots = slots
        self.keep = dict(keep or {})
        self.think_margin = think_margin
        self.none_margin = none_margin
        self.max_context = max_context
        self.trained_top_k, self.trained_min_k = trained_top_k, trained_min_k
        self.direct_read = direct_read
        self.failing = dict(failing or {})
        self.delay_s = delay_s
        self.versions = {"engine": "scripted"}
        self.opened: list[ScriptedHandle] = []
        self.closed: list[ScriptedHandle] = []

    @property
    def leaked(self) -> int:
        """Handles opened and not closed."""
        return len(self.opened) - len(self.closed)

    async def open(self, prompt: Prompt) -> ScriptedHandle:
        await self._step("open")
        script = self.script(prompt) if callable(self.script) else self.script
        replies = [s.text for s in render(script) if isinstance(s, Sampled)] if isinstance(script, Thought) else script
        handle = ScriptedHandle(prompt, iter(replies), len(prompt.segments), list(prompt.segments))
        self.opened.append(handle)
        return handle

    async def append(self, handle: ScriptedHandle, segments: Sequence[Segment]) -> None:
        await self._step("append")
        handle.segments += segments

    async def generate(self, handle: ScriptedHandle, params: GenerateParams) -> Generation:
        await self._step("generate")
        reply = next(handle.replies, None)
        if reply is None:
            raise EngineError("the script has ended, but the session asks for another generation")
        if isinstance(reply, Exception):
            raise reply
        generation = reply if isinstance(reply, Generation) else self._generation(reply, params)
        handle.segments.append(Sampled(generation.text, generation.token_ids, generation.logprobs))
        return generation

    async def probe(self, handle: ScriptedHandle, suffix: str) -> SlotRead | None:
        await self._step("probe")
        scores = self.slots(handle.prompt) if callable(self.slots) else self.slots
        return None if scores is None else SlotRead(log_softmax(scores))

    async def close(self, handle: ScriptedHandle) -> None:
        self.closed.append(handle)
        await self._step("close")

    async def _step(self, name: str) -> None:
        await asyncio.sleep(self.delay_s)
        if name in self.failing:
            raise self.failing[name]

    def _generation(self, text: str, params: GenerateParams) -> Generation:
        outside = _INSPECTION.sub("", text)
        slots = [label_index(found) for found in _LABEL.findall(outside)]
        tracked = tuple((slot, self.keep[slot]) for slot in slots if slot is not None and slot in self.keep)
        stop = next((s for s in params.stop if text.endswith(s)), None)
        return Generation(text, tokens=max(1, len(text.split())), stop=stop, tracked=tracked)


def log_softmax(scores: Sequence[float]) -> tuple[float, ...]:
    top = max(scores)
    total = top + math.log(sum(math.exp(s - top) for s in scores))
    return tuple(s - total for s in scores)


_PIECES = (
    *ADDED_TOKENS, *SLOTS[:8], *SLOTS[:8], INSPECT_START, INSPECT_END, "<|c127|>", "<|c999|>", "<|c-1|>", "<|c٣|>", "<|c", "|>",
    "</", "<inspection-index-", "<|im_end|>", "keep", " keep", " match", " differs", " wrong colour", "\n", " ", "\0", "é", "的", "🦆",
    "\u202e", "‹|c1|›",
)  # fmt: skip


def soup(rng: random.Random) -> str:
    """Text no model should write."""
    if rng.random() < 0.3:
        return f"{INSPECT_START}{rng.choice(LABELS[:16])}{INSPECT_END}"
    return "".join(rng.choices(_PIECES, k=rng.choice((0, 1, 1, 3, 12, 40))))


class FuzzEngine(ScriptedEngine):
    """Answers at random: soup, lies about where it stopped, broken numbers, and now and then an error or a proper answer."""

    def __init__(self, seed: int, *, errors: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.errors = errors
        offers_slots = self.rng.random() < 0.7
        super().__init__(slots=self._scores if offers_slots else None, max_context=self.rng.choice((None, 50, 2000)))

    async def generate(self, handle: ScriptedHandle, params: GenerateParams) -> Generation:
        rng = self.rng
        if rng.random() < self.errors:
            raise rng.choice((EngineError("no answer"), RuntimeError("CUDA error"), TimeoutError(), ValueError()))
        text = rng.choice(params.allowed) if params.allowed and rng.random() < 0.9 else soup(rng)
        if params.stop and rng.random() < 0.5:
            text += rng.choice(params.stop)
        honest = next((tag for tag in params.stop if text.endswith(tag)), None)
        generation = Generation(
            text,
            tokens=rng.choice((0, 1, 5, 50)),
            stop=honest if rng.random() < 0.7 else rng.choice((None, *params.stop, "?")),
            token_ids=rng.choice((None, (), (1, 2, 3))),
            tracked=tuple((rng.randrange(-2, 140), rng.choice(_NUMBERS)) for _ in range(rng.choice((0, 1, 5)))),
        )
        handle.segments.append(Sampled(generation.text, generation.token_ids))
        return generation

    def _scores(self, prompt: Prompt) -> list[float]:
        return [self.rng.gauss(0, 4) for _ in prompt.slots]


_NUMBERS = (0.0, -0.1, -7.0, 1.0, math.inf, -math.inf, math.nan)
