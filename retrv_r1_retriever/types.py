"""The values that travel: immutable, framework-free, torch-free.

Ranks are 1-based. `retrieval_score` is the first stage's and is never overwritten; `score` is ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from retrv_r1_retriever.errors import InputError, explain

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from retrv_r1_retriever.trace import ReasoningTrace

#: A picture: encoded bytes, a path, a data URI or URL (resolved by an `ImageSource`), or a decoded Pillow image.
ImageInput: TypeAlias = "bytes | str | os.PathLike[str] | Image"

#: Most candidates one call can rank: the number of slot labels in the vocabulary, `<|c0|>` to `<|c126|>`.
MAX_CANDIDATES = 127


class Status(StrEnum):
    """Who decided the order. See `RankedResults.status`."""

    RERANKED = "reranked"  #: the model decided (a forced answer counts; see the trace's stop_reason)
    PARTIAL = "partial"  #: the model decided, but `RankedResults.unranked` names candidates it did not judge
    FALLBACK = "fallback"  #: no model decision: first-stage order, `RankedResults.reason` says why


class StopReason(StrEnum):
    """How a thought ended."""

    ANSWERED = "answered"  #: the model closed its own thought
    FORCED_BY_BUDGET = "forced_by_budget"  #: inspections or new tokens were spent; the arg-max slot was taken
    CONTEXT_OVERFLOW = "context_overflow"  #: a full candidate no longer fitted; the arg-max slot was taken
    ENGINE_ERROR = "engine_error"  #: the engine failed in the middle of the thought


@dataclass(frozen=True, slots=True)
class Content:
    """Text, a picture, or both."""

    text: str | None = None
    image: ImageInput | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.text is not None and not isinstance(self.text, str):
            fix = "Convert it to str first."
            raise InputError(explain("Content.text", expected="str or None", got=type(self.text).__name__, fix=fix))
        if not (self.text and self.text.strip()) and self.image is None:
            fix = "Pass text=... or image=..."
            raise InputError(explain("Content", expected="a text, an image or both", got="neither", fix=fix))


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for. `instruction` is the task in words, as in M-BEIR ("Find the product after this change.")."""

    content: Content
    instruction: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        _check_content("Query", self.content, "Use Query.of(text, image).")

    @classmethod
    def of(
        cls,
        text: str | None = None,
        image: ImageInput | None = None,
        instruction: str | None = None,
        id: str | None = None,
    ) -> Query:
        return cls(Content(text, image), instruction, id)


@dataclass(frozen=True, slots=True)
class Document:
    """One thing that can be found. `id` is the caller's own id, whatever form it has in the store."""

    id: str
    content: Content
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_content("Document", self.content, "Wrap it: Document(id, Content(text, image)).")


def _check_content(kind: str, content: object, fix: str) -> None:
    if not isinstance(content, Content):
        raise InputError(explain(f"{kind}.content", expected="Content", got=type(content).__name__, fix=fix))


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """What the compression module reads of one candidate instead of its tokens, made at index time.

    rows: (m, width) float16, m at most `IcmConfig.memory_rows`
    digest: `memory_digest` of the model that made it
    content_hash: hash of the mapped content it was made from (`images.content_hash`)
    full_tokens: LM tokens of the candidate opened in full, for the context budget
    image_hash: hash of the picture's bytes, checked when the candidate is opened; None without a picture
    """

    rows: np.ndarray
    digest: str
    content_hash: str
    full_tokens: int
    image_hash: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document as the first stage returned it. `rank` is its first-stage rank, 1-based."""

    document: Document
    retrieval_score: float | None
    rank: int
    memory: Memory | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Signals:
    """The raw parts an order was made of. Natural-log probabilities; None where the mode never measured one.

    keep_logprob: log p(keep) at the candidate's first verdict in the elimination phase
    slot_logprob: log p(label) in the direct read over the K slots and none
        (both from the grades a chat model states, where such an engine runs: docs/hosted-vlm.md)
    verdict: the model's own words for the candidate: "keep", or the first reason against it
    opened: the candidate was inspected in full
    match: what the check after the inspection said; None if unopened or undecided
    """

    keep_logprob: float | None = None
    slot_logprob: float | None = None
    verdict: str | None = None
    opened: bool = False
    match: bool | None = None


@dataclass(frozen=True, slots=True)
class RankedResult:
    """One candidate with its new place.

    score: in [0, 1], strictly falling with rank, comparable within one result list only; None on fallback
    """

    candidate: Candidate
    rank: int
    score: float | None
    selected: bool = False
    signals: Signals = Signals()

    @property
    def document(self) -> Document:
        return self.candidate.document

    @property
    def retrieval_score(self) -> float | None:
        return self.candidate.retrieval_score


@dataclass(frozen=True, slots=True)
class RankedResults:
    """A ranked list that says who ranked it.

    none_chosen: the model answered that no candidate fits; the order below is its next-best
    unranked: ids of candidates the model did not judge (status `partial`)
    reason: why the status is not `reranked`; None when it is
    """

    query: Query
    results: tuple[RankedResult, ...]
    status: Status
    none_chosen: bool = False
    reason: str | None = None
    unranked: tuple[str, ...] = ()
    trace: ReasoningTrace | None = field(default=None, repr=False)

    @property
    def selected(self) -> RankedResult | None:
        """The candidate the model answered with, or None (none chosen, fallback, or cut by `top_n`)."""
        return next((r for r in self.results if r.selected), None)

    def __iter__(self) -> Iterator[RankedResult]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, index: int) -> RankedResult:
        return self.results[index]
