"""What happened in one call: the exact segments the model saw and wrote, readable and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.types import Content, StopReason

if TYPE_CHECKING:
    from collections.abc import Iterable

TRACE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Text:
    """Prompt text. `query` marks the tokens the relation token attends to (T_q)."""

    text: str
    query: bool = False


@dataclass(frozen=True, slots=True)
class QueryImage:
    """The query's picture, in full; part of T_q."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """Candidate `index` as its content and relation token."""

    index: int


@dataclass(frozen=True, slots=True)
class Full:
    """Candidate `index` opened in full. The driver fills in `content` with the decoded picture.

    cue: end in the visible words that ask for a check; False only in the uncompressed yardstick prompt
    """

    index: int
    content: Content | None = field(default=None, compare=False, repr=False)
    cue: bool = True


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the model wrote: the only segments that carry loss. `token_ids` is None on engines that return text only."""

    text: str
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Forced:
    """Text put into the model's turn by the session."""

    text: str


Segment: TypeAlias = Text | QueryImage | Compressed | Full | Sampled | Forced
_KINDS = {c.__name__: c for c in (Text, QueryImage, Compressed, Full, Sampled, Forced)}


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one call.

    prompt_tokens: as sent, compressed; uncompressed_tokens: the same prompt with every candidate in full (0 = unknown)
    unknown_labels: verdicts on labels that no candidate has; without_verdict: candidates that a thought passed over
    stale_memories: candidates whose memory was missing or stale, recomputed or not
    """

    prompt_tokens: int = 0
    uncompressed_tokens: int = 0
    sampled_tokens: int = 0
    inspected_tokens: int = 0
    refused_inspections: int = 0
    unknown_labels: int = 0
    without_verdict: int = 0
    stale_memories: int = 0


@dataclass(frozen=True, slots=True)
class ReasoningTrace:
    """One call, replayable: `segments` are exactly what the model saw, in order.

    answer: index of the chosen candidate among those in the prompt; None = none chosen or no answer
    margin: nats between the two best slots of the direct read; None if there was none
    inspected: indices opened in full, in order; unreadable: those whose content could not be loaded
    timings: stage name -> seconds; versions: component -> version or digest; notes: decisions worth saying aloud
    cached: this is the trace of an earlier, equal call, whose answer was taken (docs/config.md); only the timings are this call's
    """

    segments: tuple[Segment, ...] = ()
    candidates: tuple[str, ...] = ()
    answer: int | None = None
    margin: float | None = None
    inspected: tuple[int, ...] = ()
    unreadable: tuple[int, ...] = ()
    stop_reason: StopReason | None = None
    usage: Usage = Usage()
    timings: Mapping[str, float] = field(default_factory=dict, hash=False)
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()
    cached: bool = False

    @property
    def thought(self) -> str:
        """The assistant's turn as text, opened candidates shown as `[candidate 3 in full]`."""
        return render_turn(self.turn)

    @property
    def turn(self) -> tuple[Segment, ...]:
        """The segments after the prompt: from the first forced opener on."""
        start = next((i for i, s in enumerate(self.segments) if isinstance(s, Forced)), len(self.segments))
        return self.segments[start:]

    def redacted(self) -> ReasoningTrace:
        """A copy without any text or picture: kinds, counts, indices, log-probabilities and timings stay; notes go."""
        return replace(self, segments=tuple(_redact(s) for s in self.segments), notes=())

    def to_json(self) -> str:
        """Strict JSON, which has no infinity and no NaN: such numbers are null, and a log-probability of null is read as -inf."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["segments"] = [_segment_to_dict(s) for s in self.segments]
        data |= {"usage": asdict(self.usage), "timings": dict(self.timings), "versions": dict(self.versions)}
        return strict_json({"trace_version": TRACE_VERSION, **data})

    @classmethod
    def from_json(cls, text: str) -> ReasoningTrace:
        try:
            data = json.loads(text)
            version = data.pop("trace_version", None)
        except (ValueError, AttributeError, TypeError) as error:
            raise InputError(
                explain("trace", expected="a trace as JSON", got=error, fix="Pass to_json()'s text.")
            ) from None
        if version != TRACE_VERSION:
            raise InputError(
                explain(
                    "trace_version", expected=TRACE_VERSION, got=version, fix="Read it with the release that wrote it."
                )
            )
        return cls(
            segments=tuple(_segment_from_dict(s) for s in data["segments"]),
            candidates=tuple(data["candidates"]),
            answer=data["answer"],
            margin=data["margin"],
            inspected=tuple(data["inspected"]),
            unreadable=tuple(data["unreadable"]),
            stop_reason=StopReason(data["stop_reason"]) if data["stop_reason"] else None,
            usage=Usage(**data["usage"]),
            timings=data["timings"],
            versions=data["versions"],
            notes=tuple(data["notes"]),
            cached=data.get("cached", False),  # traces written before there was a cache have no such key
        )


def render_turn(segments: Iterable[Segment]) -> str:
    """Text of the model's turn with opened candidates named rather than shown."""
    parts = []
    for segment in segments:
        if isinstance(segment, Full):
            parts.append(f"[candidate {segment.index} in full]")
        elif isinstance(segment, Text | Sampled | Forced):
            parts.append(segment.text)
    return "".join(parts)


def _redact(segment: Segment) -> Segment:
    if isinstance(segment, Sampled):
        return replace(segment, text="", token_ids=None)
    if isinstance(segment, Text | Forced):
        return replace(segment, text="")
    return Full(segment.index) if isinstance(segment, Full) else segment


def _segment_to_dict(segment: Segment) -> dict[str, Any]:
    data = {k: getattr(segment, k) for k in segment.__dataclass_fields__ if k != "content"}
    return {"kind": type(segment).__name__, **data}


def _segment_from_dict(data: dict[str, Any]) -> Segment:
    data = dict(data)
    kind = _KINDS[data.pop("kind")]
    if data.get("token_ids") is not None:
        data["token_ids"] = tuple(data["token_ids"])
    if data.get("logprobs") is not None:
        data["logprobs"] = tuple(-math.inf if value is None else value for value in data["logprobs"])
    return kind(**data)


def strict_json(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """JSON that every reader takes: null for NaN and infinity, half a surrogate pair as its escape. default: as in `json.dumps`"""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent, default=default)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def finite(value: Any) -> Any:
    """The same plain value with null for numbers that JSON does not have, as for the log-probability of what cannot be."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value
