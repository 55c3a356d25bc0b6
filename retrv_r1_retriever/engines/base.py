"""What an engine must do. The handle owns the KV state; the session and the driver never see a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from retrv_r1_retriever.prompt import Prompt
from retrv_r1_retriever.session import GenerateParams, Generation
from retrv_r1_retriever.trace import Segment
from retrv_r1_retriever.types import Content

if TYPE_CHECKING:
    from retrv_r1_retriever.images import ImageSource


@dataclass(frozen=True, slots=True)
class SlotRead:
    """log p over the K labels, then none, normalised over exactly these K + 1 slots.

    unread: candidates that were not judged; their log-probabilities say nothing
    """

    logprobs: tuple[float, ...]
    unread: tuple[int, ...] = ()

    @property
    def margin(self) -> float:
        """Nats between the two best slots; large = sure."""
        best, second = sorted(self.logprobs, reverse=True)[:2]
        return best - second


@runtime_checkable
class Engine(Protocol):
    """Runs one model. Handles are opaque; each is used by one caller at a time, different handles concurrently.

    Raises `EngineError`. Cancelling any awaitable leaves the handle closable.
    """

    @property
    def max_context(self) -> int | None:
        """Tokens one handle can hold; None = unknown."""

    @property
    def versions(self) -> dict[str, str]:
        """For the trace: checkpoint digest, memory digest, library versions."""

    @property
    def think_margin(self) -> float | None:
        """The checkpoint's calibrated `think_margin`; None = not calibrated."""

    @property
    def none_margin(self) -> float | None:
        """The checkpoint's calibrated `none_margin`, see `ranking.rank`; None = not calibrated."""

    @property
    def trained_top_k(self) -> int:
        """K of the lists it was trained on; 0 = unknown, or any."""

    @property
    def trained_min_k(self) -> int:
        """The shortest of them; 0 = all were of that K."""

    @property
    def direct_read(self) -> bool:
        """False: `probe` works, but was never trained; it is read only where a caller insists on it (`think="never"`)."""

    async def open(self, prompt: Prompt) -> Any:
        """Read the prompt; returns a handle. `handle.prompt_tokens` is its length in tokens; `handle.notes`, if any, go to the trace."""

    async def append(self, handle: Any, segments: Sequence[Segment]) -> None: ...

    async def generate(self, handle: Any, params: GenerateParams) -> Generation: ...

    async def probe(self, handle: Any, suffix: str) -> SlotRead | None:
        """The slots' probabilities after `suffix`, read on a fork that is dropped: the handle is left as it was.

        None if this engine offers no probabilities (some chat servers): then only a thought can decide.
        """

    async def close(self, handle: Any) -> None: ...


@runtime_checkable
class ReadsPictures(Protocol):
    """An engine that shows the candidates' pictures to its model, in place of memory made of them."""

    def with_images(self, images: ImageSource) -> Engine:
        """The engine, reading pictures from `images` unless it has a source of its own."""


@runtime_checkable
class Compressor(Protocol):
    """Makes candidate memory: at index time in bulk, at query time for misses. Engines that need memory implement it too."""

    @property
    def memory_digest(self) -> str: ...

    @property
    def memory_shape(self) -> tuple[int, int]:
        """(rows at most, width)."""

    def compress(self, contents: Sequence[Content]) -> list[CompressedContent]:
        """Contents with pictures already decoded (Pillow) -> memory rows. Batched == single, to rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class CompressedContent:
    """rows: (m, width) float16; full_tokens: LM tokens when opened in full; cut_tokens: of a text beyond the model's limit."""

    rows: np.ndarray
    full_tokens: int
    cut_tokens: int = 0
