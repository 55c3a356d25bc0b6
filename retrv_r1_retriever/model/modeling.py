"""Qwen2.5-VL with the compression module in the inner model. No forward surgery: placeholders are overwritten, the rest is stock.

B rows, L tokens, N candidates over all rows, m memory rows, w memory width, H LM width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, Qwen2_5_VLTextModel

from retrv_r1_retriever.model.configuration import RetrvR1Config
from retrv_r1_retriever.model.icm import Icm, pad

#: transformers' name for the KV cache among a forward's arguments: 5.24 renamed it, and warns of the old one.
CACHE = "cache" if "cache" in inspect.signature(Qwen2_5_VLTextModel.forward).parameters else "past_key_values"

#: Patches that go through the tower together on a CPU: what many pictures need at once does not fit its cache (docs/experiments.md).
CPU_PATCHES = 1024


@dataclass(slots=True)
class CompressedInputs:
    """What the placeholders of a batch are made of. N may be 0 (nothing to compress in this batch).

    memory (N, m, w), memory_mask (N, m) bool; in the order of the placeholders, row by row
    row (N,): batch row; label (N,): token id of the slot label that tags both tokens
    content_at, relation_at (N,): flat positions (row * L + column) of the two placeholders
    query_mask (B, L) bool: the tokens of T_q
    """

    memory: Tensor
    memory_mask: Tensor
    row: Tensor
    label: Tensor
    content_at: Tensor
    relation_at: Tensor
    query_mask: Tensor


def _groups(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Neighbours whose sum is at most `most`; a larger one stands alone."""
    groups: list[list[int]] = []
    for size in sizes:
        if not groups or sum(groups[-1]) + size > most:
            groups.append([])
        groups[-1].append(size)
    return groups


class RetrvR1Model(Qwen2_5_VLModel):
    config_class = RetrvR1Config
    config: RetrvR1Config

    def __init__(self, config: RetrvR1Config) -> None:
        super().__init__(config)
        self.icm = Icm(config.icm_config, config.text_config.hidden_size)

    def init_icm(self, norm: float | None = None) -> None:
        """Let both outputs start at `norm` (None = the embedding table's mean); once, when a module is made anew."""
        table = self.get_input_embeddings().weight
        if table.is_meta:
            return
        table_norm = float(table.detach().float().norm(dim=-1).mean())
        self.icm.start_at(table_norm if norm is None else norm, table_norm)

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, ...]:
        """The tower's tokens, one (n, H) tensor per image."""
        patches = image_grid_thw.prod(-1).tolist()
        groups = _groups(patches, CPU_PATCHES if pixel_values.device.type == "cpu" else sum(patches))
        pixels = torch.split(pixel_values, [sum(group) for group in groups])
        grids = torch.split(image_grid_thw, [len(group) for group in groups])
        return tuple(
            t for part in zip(pixels, grids, strict=True) for t in self.get_image_features(*part).pooler_output
        )

    def embed(
        self,
        input_ids: Tensor,
        image_features: Tensor | None,
        image_mask: Tensor | None,
        compressed: CompressedInputs | None,
    ) -> Tensor:
        """LM input embeddings (B, L, H): token rows, image tokens scattered where `image_mask`, ICM output at placeholders."""
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        if image_features is not None and image_mask is not None:
            embeds = embeds.masked_scatter(image_mask[..., None], image_features.to(embeds.dtype))
        if compressed is None or len(compressed.row) == 0:
            return embeds
        query, query_mask = self.query_rows(embeds, compressed.query_mask)
        memory = compressed.memory.to(embeds.dtype)
        content, relation = self.icm(memory, compressed.memory_mask, query, query_mask, compressed.row)
        tag = self.get_input_embeddings()(compressed.label) * self.icm.tag_scale
        return self.place(embeds, compressed, content + tag, relation + tag)

    def query_rows(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """T_q of each row, projected: (B, q, w), padded, with its mask."""
        return pad(self.icm.rows([embeds[b, mask[b]] for b in range(len(embeds))]))

    def place(self, embeds: Tensor, compressed: CompressedInputs, content: Tensor, relation: Tensor) -> Tensor:
        """Content and relation tokens (N, H) over the placeholders of `embeds` (B, L, H)."""
        flat = embeds.flatten(0, 1)
        flat = flat.index_copy(0, compressed.content_at, content.to(flat.dtype))
        flat = flat.index_copy(0, compressed.relation_at, relation.to(flat.dtype))
        return flat.view_as(embeds)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        image_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        compressed: CompressedInputs | None = None,
        **kwargs: Any,  # transformers' own forward arguments; this signature is the framework's
    ) -> Any:
        """Stock forward, unless features or memory come with it: then embeddings are built here and positions are required."""
        shared = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: kwargs.pop(CACHE, None)}
        if compressed is None and image_features is None:
            return super().forward(input_ids, use_cache=use_cache, **shared, **kwargs)
        assert input_ids is not None
        assert position_ids is not None
        embeds = self.embed(input_ids, image_features, image_mask, compressed)
        return self.language_model(inputs_embeds=embeds, use_cache=use_cache, **shared)


class RetrvR1ForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    config_class = RetrvR1Config
    config: RetrvR1Config
    model: RetrvR1Model

    def __init__(self, config: RetrvR1Config) -> None:
        super().__init__(config)
        self.model = RetrvR1Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        self.model.init_icm()
