"""`LocalEngine`: `Engine` and `Compressor` on one model in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from PIL.Image import Image
from torch import Tensor

from retrv_r1_retriever.engines.base import CompressedContent, SlotRead
from retrv_r1_retriever.engines.local.batcher import Batcher, Handle, Job
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.model.checkpoint import Checkpoint, load_checkpoint, numerics
from retrv_r1_retriever.model.compress import BATCH, compress
from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.processing import Chunk, EncodedImage
from retrv_r1_retriever.prompt import Prompt
from retrv_r1_retriever.session import GenerateParams, Generation
from retrv_r1_retriever.trace import Full, Segment
from retrv_r1_retriever.types import Content

_LONG = 10_000  # characters; tokenised in some milliseconds


class LocalEngine:
    """CPU or CUDA; float32 on CPU and bfloat16 on CUDA unless told otherwise.

    max_batch_tokens: most prompt tokens read in one forward pass
    autocast: of a model in training, whose trained weights are float32 beside frozen ones in this dtype
    """

    def __init__(
        self, checkpoint: Checkpoint, *, max_batch_tokens: int = 8192, autocast: torch.dtype | None = None
    ) -> None:
        self._checkpoint = checkpoint
        self._model = checkpoint.model.eval()
        self._processor = checkpoint.processor
        self._batcher = Batcher(checkpoint, max_batch_tokens, autocast)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | None = None, dtype: str | None = None, max_batch_tokens: int = 8192
    ) -> LocalEngine:
        """path: a checkpoint directory (`retrv/` inside). device None = CUDA if there is one."""
        return cls(load_checkpoint(path, device=device, dtype=dtype), max_batch_tokens=max_batch_tokens)

    @property
    def max_context(self) -> int | None:
        return int(self._model.config.text_config.max_position_embeddings)

    @property
    def think_margin(self) -> float | None:
        return self._checkpoint.manifest.think_margin

    @property
    def none_margin(self) -> float | None:
        return self._checkpoint.manifest.none_margin

    @property
    def trained_top_k(self) -> int:
        return self._checkpoint.manifest.trained_top_k

    @property
    def trained_min_k(self) -> int:
        return self._checkpoint.manifest.trained_min_k

    @property
    def direct_read(self) -> bool:
        return self._checkpoint.manifest.direct_read

    @property
    def versions(self) -> dict[str, str]:
        manifest = self._checkpoint.manifest
        return {
            "engine": "local", "checkpoint": manifest.checkpoint_digest, "memory": manifest.memory_digest,
            "base": manifest.base, "torch": torch.__version__, "transformers": transformers.__version__,
            **numerics(self._model),
        }  # fmt: skip

    @property
    def memory_digest(self) -> str:
        return self._checkpoint.manifest.memory_digest

    @property
    def memory_shape(self) -> tuple[int, int]:
        icm = self._model.config.icm_config
        return icm.memory_rows or int(self._model.config.text_config.max_position_embeddings), icm.width

    @property
    def forward_tokens(self) -> int:
        """Tokens read so far over all handles (tests count them: nothing is read twice)."""
        return self._batcher.forward_tokens

    @property
    def forward_seconds(self) -> float:
        """Time spent in forward passes so far; the rest of a call is ours."""
        return self._batcher.forward_seconds

    @property
    def step_seconds(self) -> float:
        """The same with what goes before and after each pass: batching, sampling."""
        return self._batcher.step_seconds

    @property
    def encoded_pictures(self) -> int:
        """Pictures passed through the tower at query time so far."""
        return self._batcher.encoded_pictures

    def compress(self, contents: Sequence[Content], batch_size: int = BATCH) -> list[CompressedContent]:
        """Candidate memory, exactly `pool(in_proj(T_c) + P)`; pictures must be decoded."""
        return compress(self._model.model, self._processor, contents, device=self._model.device, batch_size=batch_size)

    def encode_picture(self, picture: Image) -> EncodedImage:
        """A decoded picture after the tower; stands for the picture in any `Content` this engine reads."""
        with torch.inference_mode():
            features = encode_pictures(self._model.model, self._processor, [picture])
        assert features is not None
        return EncodedImage(self._processor.grid(picture), features)

    async def open(self, prompt: Prompt) -> Handle:
        chunk = await self._chunk(prompt.segments, prompt, 0)
        limit = self.max_context
        if limit is not None and len(chunk) >= limit:
            fix = "Shorten the query, or lower top_k."
            raise InputError(explain("prompt", expected=f"fewer than {limit} tokens", got=len(chunk), fix=fix))
        return Handle(prompt, len(chunk), [chunk], chunk.next_position)

    async def append(self, handle: Handle, segments: Sequence[Segment]) -> None:
        if segments:
            chunk = await self._chunk(segments, handle.prompt, handle.next_position)
            handle.pending.append(chunk)
            handle.next_position = chunk.next_position
            handle.recent = (-1, -1)

    async def generate(self, handle: Handle, params: GenerateParams) -> Generation:
        if params.temperature > 0 and handle.generator is None:
            handle.generator = torch.Generator().manual_seed(params.seed)
        allowed = self._token_ids(params.allowed) if params.allowed else None
        generation: Generation = await self._batcher.run(Job(handle, params, allowed))
        return generation

    async def probe(self, handle: Handle, suffix: str) -> SlotRead:
        chunk = Chunk.plain(self._processor.tokenise(suffix), handle.next_position)
        read: SlotRead = await self._batcher.run(Job(handle, None, self._token_ids(handle.prompt.slots), chunk))
        return read

    async def close(self, handle: Handle) -> None:
        self._batcher.close(handle)

    async def aclose(self) -> None:
        """End the worker; calls in flight fail, later ones are refused. An engine that is let go at exit ends by itself."""
        await asyncio.to_thread(self._batcher.stop)

    async def _chunk(self, segments: Sequence[Segment], prompt: Prompt, start: int) -> Chunk:
        """In a thread only what is long: the rest takes about as long as a thread takes to begin."""
        if sum(map(_characters, segments)) > _LONG:
            return await asyncio.to_thread(self._processor.chunk, segments, prompt, start)
        return self._processor.chunk(segments, prompt, start)

    def _token_ids(self, tokens: Sequence[str]) -> Tensor:
        return torch.tensor([self._processor.token_id(t) for t in tokens], device=self._model.device)


def _characters(segment: Segment) -> int:
    if isinstance(segment, Full):
        return len(segment.content.text or "") if segment.content else 0
    return len(getattr(segment, "text", ""))
