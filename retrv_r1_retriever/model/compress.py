"""Candidate memory, `pool(in_proj(T_c) + P)`, of contents in bulk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from retrv_r1_retriever.engines.base import CompressedContent
from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.modeling import RetrvR1Model
from retrv_r1_retriever.model.processing import Processor, collate
from retrv_r1_retriever.types import Content

BATCH = 64


@torch.inference_mode()
def compress(
    model: RetrvR1Model, processor: Processor, contents: Sequence[Content], *, device: torch.device, batch_size: int = BATCH
) -> list[CompressedContent]:  # fmt: skip
    """Reads the embedding table, the tower (pictures, which must be decoded) and `in_proj`; no layer of the language model."""
    out: list[CompressedContent] = []
    for start in range(0, len(contents), batch_size):
        part = contents[start : start + batch_size]
        chunks = [processor.content_chunk(c) for c in part]
        batch = collate(chunks, processor, device)
        features = encode_pictures(model, processor, batch.pictures)
        embeds = model.embed(batch.input_ids, features, batch.image_mask, None)
        memories = model.icm.memories([e[: len(c)] for c, e in zip(chunks, embeds, strict=True)])
        out += [
            CompressedContent(
                rows.to(torch.float16).cpu().numpy(), processor.full_tokens(content), processor.cut_tokens(content)
            )
            for content, rows in zip(part, memories, strict=True)
        ]
    return out
