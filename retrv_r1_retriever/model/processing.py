"""The only place where segments become tensors: ids, loss mask, M-RoPE positions, pictures, memory.

A `Chunk` is one append: a whole prompt, an opened candidate, a forced tag. Every chunk starts where the last one ended, so a sequence
built in steps is bit-equal to one built at once (golden files pin it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from retrv_r1_retriever.errors import CheckpointError, ImageError, InputError, explain
from retrv_r1_retriever.model.modeling import CompressedInputs
from retrv_r1_retriever.prompt import (
    ADDED_TOKENS,
    CHECK_CUE,
    CONTENT_PAD,
    LABELS,
    RELATION_PAD,
    SLOTS,
    Prompt,
    content_text,
)  # fmt: skip
from retrv_r1_retriever.trace import Compressed, Forced, Full, QueryImage, Sampled, Segment, Text
from retrv_r1_retriever.types import Content

_FRAMES = 100  #: texts of prompt frames and thoughts' tags that are kept tokenised; there are a handful
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """A picture after the tower. grid: (t, h, w) patches; features: (t*h*w / merge**2, H)."""

    grid: tuple[int, int, int]
    features: Tensor


Picture = Image | EncodedImage


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """ids (L,), positions (3, L), query/sampled/image masks (L,); pictures and candidates in order of appearance."""

    ids: np.ndarray
    positions: np.ndarray
    query: np.ndarray
    sampled: np.ndarray
    image: np.ndarray
    pictures: tuple[Picture, ...]
    candidates: tuple[int, ...]
    memories: tuple[np.ndarray, ...]
    next_position: int

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def join(cls, chunks: Sequence[Chunk]) -> Chunk:
        """Chunks that follow one another, as one."""
        if len(chunks) == 1:  # every decoded token
            return chunks[0]
        return cls(
            np.concatenate([c.ids for c in chunks]),
            np.concatenate([c.positions for c in chunks], axis=1),
            np.concatenate([c.query for c in chunks]),
            np.concatenate([c.sampled for c in chunks]),
            np.concatenate([c.image for c in chunks]),
            tuple(p for c in chunks for p in c.pictures),
            tuple(i for c in chunks for i in c.candidates),
            tuple(m for c in chunks for m in c.memories),
            chunks[-1].next_position,
        )

    @classmethod
    def plain(cls, ids: Sequence[int], start: int) -> Chunk:
        """Text tokens only, from position `start` on."""
        n = len(ids)
        nothing = np.zeros(n, dtype=bool)
        positions = np.empty((3, n), dtype=np.int64)
        positions[:] = np.arange(start, start + n)
        return cls(np.asarray(ids, dtype=np.int64), positions, nothing, nothing, nothing, (), (), (), start + n)


class Processor:
    """max_text_tokens: longest text kept of one candidate; the rest is cut (`cut_tokens`), and the index report says so."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_processor: Qwen2VLImageProcessorPil, max_text_tokens: int = 512
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.max_text_tokens = max_text_tokens
        vocab = tokenizer.get_vocab()
        missing = [t for t in (*ADDED_TOKENS, VISION_START, VISION_END, IMAGE_PAD) if t not in vocab]
        if missing:
            raise CheckpointError(
                explain("tokenizer", expected="all Retrv-R1 tokens", got=f"{len(missing)} missing, first {missing[0]}",
                        fix="Load a checkpoint made by `retrv-r1-train export`, or call model.checkpoint.add_tokens.")
            )  # fmt: skip
        self._special = {t: vocab[t] for t in (*ADDED_TOKENS, VISION_START, VISION_END, IMAGE_PAD)}
        self._frames = {token: [id] for token, id in self._special.items()}
        self.merge = int(image_processor.merge_size)

    @cached_property
    def slot_ids(self) -> tuple[int, ...]:
        """Token ids of the 127 labels and none."""
        return tuple(self._special[s] for s in SLOTS)

    def token_id(self, token: str) -> int:
        return int(self._special[token])

    def tokenise(self, text: str) -> list[int]:
        if text in self._special:
            return [self._special[text]]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def frame(self, text: str) -> Sequence[int]:
        """`tokenise`, once for each text: for what is the same in every prompt or thought, never for a query's or candidate's own words."""
        ids = self._frames.get(text)
        if ids is None:
            ids = self.tokenise(text)
            if len(self._frames) < len(self._special) + _FRAMES:
                self._frames[text] = ids
        return ids

    def chunk(self, segments: Sequence[Segment], prompt: Prompt, start: int = 0) -> Chunk:
        """Segments of one append -> tensors-to-be. `Full` and the query must carry decoded pictures. start: next position."""
        builder = _Builder(self, start)
        for segment in segments:
            if isinstance(segment, Text):
                builder.text(segment.text, query=segment.query)
            elif isinstance(segment, QueryImage):
                builder.picture(_picture(prompt.query.content), query=True)
            elif isinstance(segment, Compressed):
                memory = prompt.candidates[segment.index].memory
                if memory is None:
                    raise InputError(
                        explain(
                            f"candidate {segment.index}", expected="memory", got="none", fix="Resolve memory first."
                        )
                    )
                builder.compressed(segment.index, memory.rows)
            elif isinstance(segment, Full):
                builder.content(segment.content or prompt.candidates[segment.index].document.content)
                if segment.cue:
                    builder.text(CHECK_CUE)
            elif isinstance(segment, Sampled):
                ids = segment.token_ids if segment.token_ids is not None else self.tokenise(segment.text)
                builder.ids(ids, sampled=True)
            elif isinstance(segment, Forced):
                builder.text(segment.text)
        return builder.chunk()

    def content_chunk(self, content: Content) -> Chunk:
        """T_c: the tokens of one candidate, exactly as when it is opened, without the cue after it."""
        builder = _Builder(self, 0)
        builder.content(content)
        return builder.chunk()

    def full_tokens(self, content: Content) -> int:
        return len(self.content_chunk(content)) + len(self.tokenise(CHECK_CUE))

    def cut_tokens(self, content: Content) -> int:
        """Tokens of the text beyond `max_text_tokens`, which the model never sees."""
        text = content_text(content)
        if len(text.encode()) <= self.max_text_tokens:  # a token is at least one byte
            return 0
        return max(0, len(self.tokenise(text)) - self.max_text_tokens)

    def grid(self, picture: Picture) -> tuple[int, int, int]:
        """(t, h, w) in patches after the resize Qwen2.5-VL applies."""
        if isinstance(picture, EncodedImage):
            return picture.grid
        p = self.image_processor
        if max(picture.size) > 200 * min(picture.size):  # Qwen2.5-VL's own limit; its resize raises a bare ValueError
            size = f"{picture.width} x {picture.height}"
            raise ImageError(
                explain("picture", expected="sides of at most 200 to 1", got=size, fix="Crop it, or cut it into parts.")
            )
        height, width = smart_resize(
            picture.height, picture.width, p.patch_size * self.merge, p.size["shortest_edge"], p.size["longest_edge"]
        )
        return 1, int(height // p.patch_size), int(width // p.patch_size)

    def pixels(self, pictures: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """pixel_values (patches, dim) and grids (n, 3) for the tower."""
        batch = self.image_processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]


class _Builder:
    def __init__(self, processor: Processor, start: int) -> None:
        self._p = processor
        self._ids: list[int] = []
        self._positions: list[np.ndarray] = []
        self._marked: dict[str, list[slice]] = {"query": [], "sampled": [], "image": []}
        self._pictures: list[Picture] = []
        self._candidates: list[int] = []
        self._memories: list[np.ndarray] = []
        self._next, self._text = start, 0  # text tokens since the last picture

    def ids(self, ids: Sequence[int], *, query: bool = False, sampled: bool = False) -> None:
        n = len(ids)
        self._ids += ids
        self._next += n
        self._text += n
        if query or sampled:
            self._mark("query" if query else "sampled", n)

    def _mark(self, what: str, n: int) -> None:
        """The last n tokens."""
        self._marked[what].append(slice(len(self._ids) - n, len(self._ids)))

    def text(self, text: str, *, query: bool = False) -> None:
        self.ids(self._p.tokenise(text) if query else self._p.frame(text), query=query)

    def picture(self, picture: Picture, *, query: bool = False) -> None:
        t, h, w = self._p.grid(picture)
        rows, columns = h // self._p.merge, w // self._p.merge
        self.ids([self._p.token_id(VISION_START)], query=query)
        n = t * rows * columns
        grid = np.stack(np.meshgrid(np.arange(t), np.arange(rows), np.arange(columns), indexing="ij")).reshape(3, -1)
        self._ids += [self._p.token_id(IMAGE_PAD)] * n
        self._place_text()
        self._positions.append(grid + self._next)
        self._mark("image", n)
        if query:
            self._mark("query", n)
        self._pictures.append(picture)
        self._next += max(rows, columns)  # as Qwen2.5-VL's get_rope_index
        self.ids([self._p.token_id(VISION_END)], query=query)

    def _place_text(self) -> None:
        """One position after the other, for all of it at once: a list is a hundred pieces of text."""
        n, self._text = self._text, 0
        self._positions.append(np.broadcast_to(np.arange(self._next - n, self._next), (3, n)))

    def content(self, content: Content) -> None:
        if content.image is not None:
            self.picture(_picture(content))
        if content.text:
            self.ids(self._p.tokenise(content_text(content))[: self._p.max_text_tokens])

    def compressed(self, index: int, memory: np.ndarray) -> None:
        self.ids([self._p.token_id(CONTENT_PAD), self._p.token_id(RELATION_PAD)])
        self._candidates.append(index)
        self._memories.append(memory)

    def chunk(self) -> Chunk:
        masks = {what: np.zeros(len(self._ids), dtype=bool) for what in self._marked}
        for what, spans in self._marked.items():
            for span in spans:
                masks[what][span] = True
        self._place_text()
        positions = np.concatenate(self._positions, axis=1).astype(np.int64)
        found = (tuple(self._pictures), tuple(self._candidates), tuple(self._memories))
        return Chunk(np.asarray(self._ids, dtype=np.int64), positions, **masks, pictures=found[0], candidates=found[1],
                     memories=found[2], next_position=self._next)  # fmt: skip


@dataclass(slots=True)
class Batch:
    """Right-padded chunks as tensors. Arguments of `RetrvR1Model.embed`; positions (3, B, L), attention_mask (B, L)."""

    input_ids: Tensor
    positions: Tensor
    attention_mask: Tensor
    image_mask: Tensor
    sampled: Tensor
    pictures: tuple[Picture, ...]
    compressed: CompressedInputs


def collate(chunks: Sequence[Chunk], processor: Processor, device: torch.device | str = "cpu") -> Batch:
    """Pad chunks on the right. Pictures stay in order (row by row), which is the order `masked_scatter` fills."""
    length = max(len(c) for c in chunks)

    def pad(arrays: Sequence[np.ndarray]) -> Tensor:
        if len(arrays) == 1:  # every token of a lone thought
            return torch.from_numpy(arrays[0][None]).to(device)
        out = np.zeros((len(arrays), *arrays[0].shape[:-1], length), dtype=arrays[0].dtype)
        for row, array in zip(out, arrays, strict=True):
            row[..., : array.shape[-1]] = array
        return torch.from_numpy(out).to(device)

    input_ids = pad([c.ids for c in chunks])
    return Batch(
        input_ids=input_ids,
        positions=pad([c.positions for c in chunks]).transpose(0, 1).contiguous(),
        attention_mask=pad([np.ones(len(c), dtype=np.int64) for c in chunks]),
        image_mask=pad([c.image for c in chunks]),
        sampled=pad([c.sampled for c in chunks]),
        pictures=tuple(p for c in chunks for p in c.pictures),
        compressed=_compressed(chunks, processor, length, pad([c.query for c in chunks]), device),
    )


def memories(chunks: Sequence[Chunk], dtype: type[np.floating] = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Memories of all candidates, in order: (N, m, w), padded, and which rows are valid, (N, m) bool."""
    found = [m for c in chunks for m in c.memories]
    rows = max((len(m) for m in found), default=0)
    memory = np.zeros((len(found), rows, found[0].shape[1] if found else 0), dtype=dtype)
    mask = np.zeros((len(found), rows), dtype=bool)
    for i, array in enumerate(found):
        memory[i, : len(array)] = array
        mask[i, : len(array)] = True
    return memory, mask


def _compressed(
    chunks: Sequence[Chunk], processor: Processor, length: int, query_mask: Tensor, device: torch.device | str
) -> CompressedInputs:
    if not any(c.memories for c in chunks):  # every decoded token
        none = torch.zeros(0, dtype=torch.int64, device=device)
        empty, no_mask = torch.zeros(0, 0, 0, device=device), torch.zeros(0, 0, dtype=torch.bool, device=device)
        return CompressedInputs(empty, no_mask, none, none, none, none, query_mask)
    memory, mask = memories(chunks)
    row = np.repeat(np.arange(len(chunks)), [len(c.memories) for c in chunks])
    label = [processor.token_id(LABELS[i]) for c in chunks for i in c.candidates]
    pad = processor.token_id(CONTENT_PAD)  # a model may sample this id as well, but only behind the prompt's own
    content_at = np.concatenate(
        [np.flatnonzero(c.ids == pad)[: len(c.memories)] + b * length for b, c in enumerate(chunks)]
    )
    label_ids = np.asarray(label, dtype=np.int64)
    arrays = (memory, mask, row.astype(np.int64), label_ids, content_at, content_at + 1)
    tensors = [torch.as_tensor(a, device=device) for a in arrays]
    return CompressedInputs(tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], query_mask)


def _picture(content: Content) -> Picture:
    if isinstance(content.image, Picture):
        return content.image
    raise InputError(
        explain("content.image", expected="a decoded picture", got=type(content.image).__name__,
                fix="Load it through an ImageSource first.")
    )  # fmt: skip
