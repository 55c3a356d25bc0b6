"""The backbone's own embedder: the hidden state of the last token, cut to `dim` and normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.model.checkpoint import load_embedder_checkpoint
from retrv_r1_retriever.model.modeling import RetrvR1Model
from retrv_r1_retriever.model.processing import Chunk, EncodedImage, Picture, Processor, collate
from retrv_r1_retriever.prompt import Prompt, query_segments
from retrv_r1_retriever.trace import Text
from retrv_r1_retriever.types import Content, Query

END = Text("<|im_end|>")  # the token whose state is the embedding


class BackboneEmbedder:
    """Implements `Embedder` on a Qwen2.5-VL backbone; any mix of text and pictures on both sides.

    dim: leading dimensions kept (the training recipe trains exactly these)
    digest: says whose vectors a collection holds; empty = unknown
    """

    def __init__(
        self, model: RetrvR1Model, processor: Processor, dim: int, batch_size: int = 64, *, digest: str = ""
    ) -> None:
        self.model = model.eval()
        self.digest = digest
        self.processor = processor
        self.dim = dim
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str | None = None, dtype: str | None = None, batch_size: int = 64
    ) -> BackboneEmbedder:
        """The embedder inside a Retrv-R1 checkpoint (`retrv/embedder/`)."""
        checkpoint = load_embedder_checkpoint(path, device=device, dtype=dtype)
        manifest = checkpoint.manifest
        return cls(
            checkpoint.model.model, checkpoint.processor, manifest.embedder_dim, batch_size,
            digest=manifest.embedder_digest,
        )  # fmt: skip

    def embed(self, items: Sequence[Query | Content]) -> np.ndarray:
        """(n, dim) float32, rows of norm 1. Pictures must be decoded."""
        chunks = [embedding_chunk(self.processor, item) for item in items]
        longest, limit = max(map(len, chunks), default=0), self.model.config.text_config.max_position_embeddings
        if longest > limit:
            raise InputError(
                explain("text to embed", expected=f"at most {limit:,} tokens", got=f"{longest:,}", fix="Shorten it.")
            )
        order = sorted(range(len(chunks)), key=lambda i: len(chunks[i]))  # alike lengths together: little padding
        out = np.zeros((len(chunks), self.dim), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                picked = order[start : start + self.batch_size]
                vectors = embed_chunks(self.model, self.processor, [chunks[i] for i in picked], self.dim)
                out[picked] = vectors.float().cpu().numpy()
        return out


def embedding_chunk(processor: Processor, item: Query | Content) -> Chunk:
    if isinstance(item, Query):
        return processor.chunk([*query_segments(item), END], Prompt(item, (), ()))
    content = processor.content_chunk(item)
    end = processor.chunk([END], Prompt(Query(item), (), ()), content.next_position)
    return Chunk.join([content, end])


def embed_chunks(model: RetrvR1Model, processor: Processor, chunks: Sequence[Chunk], dim: int) -> Tensor:
    """(n, dim), rows of norm 1, with gradient if enabled; also the trainer's forward."""
    batch = collate(chunks, processor, model.device)
    embeds = model.embed(batch.input_ids, encode_pictures(model, processor, batch.pictures), batch.image_mask, None)
    hidden = model.language_model(
        inputs_embeds=embeds, position_ids=batch.positions, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    last = torch.tensor([len(c) - 1 for c in chunks], device=hidden.device)
    return F.normalize(hidden[torch.arange(len(chunks), device=hidden.device), last, :dim].float(), dim=-1)


def encode_pictures(model: RetrvR1Model, processor: Processor, pictures: Sequence[Picture]) -> Tensor | None:
    """All tower tokens in order, (sum n, H); pictures that are already encoded are taken as they are."""
    if not pictures:
        return None
    raw = [p for p in pictures if not isinstance(p, EncodedImage)]
    encoded: Iterator[Tensor] = iter(())
    if raw:
        pixels, grids = processor.pixels(raw)
        encoded = iter(model.encode_images(pixels.to(model.device, model.dtype), grids.to(model.device)))
    parts = [p.features if isinstance(p, EncodedImage) else next(encoded) for p in pictures]
    return torch.cat([part.to(model.device) for part in parts])
