"""M-BEIR files into memory, with pictures passed through the frozen tower once."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from retrv_r1_retriever.demo.catalogue import TASKS, LabelledQuery, pool_path, read_queries
from retrv_r1_retriever.model.embedding import encode_pictures
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration, RetrvR1Model
from retrv_r1_retriever.model.processing import EncodedImage, Processor, collate
from retrv_r1_retriever.types import Content, Query
from retrv_r1_training.teacher import Caption


@dataclass(frozen=True, slots=True)
class Item:
    """One candidate of a pool. caption: its content in words (equal to the text for text candidates)."""

    id: str
    modality: str
    content: Content
    caption: str


@dataclass(frozen=True)
class Pool:
    """One split: candidates, labelled queries, and each query's target as an index into `items`."""

    items: tuple[Item, ...]
    queries: tuple[LabelledQuery, ...]

    @cached_property
    def index(self) -> dict[str, int]:
        return {item.id: i for i, item in enumerate(self.items)}

    def target(self, query: LabelledQuery) -> int:
        return self.index[query.positives[0]]

    @cached_property
    def by_modality(self) -> dict[str, tuple[int, ...]]:
        names = {item.modality for item in self.items}
        return {m: tuple(i for i, item in enumerate(self.items) if item.modality == m) for m in names}

    @cached_property
    def captions(self) -> tuple[Caption, ...]:
        return tuple(Caption.of(item.caption) for item in self.items)

    @cached_property
    def _by_prefix(self) -> dict[tuple[str, tuple[str, ...]], list[int]]:
        """Items of one modality whose coarse words begin alike."""
        groups: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for i, (item, caption) in enumerate(zip(self.items, self.captions, strict=True)):
            for length in range(len(caption.coarse)):
                groups.setdefault((item.modality, caption.coarse[:length]), []).append(i)
        return groups

    def contradicting(self, target: int, rng: random.Random) -> int:
        """An item that agrees with the target up to a random coarse word and contradicts there, if the pool has one."""
        modality, want = self.items[target].modality, self.captions[target].coarse
        at = rng.randrange(len(want))
        members = self._by_prefix[modality, want[:at]]
        for _ in range(8):
            other = rng.choice(members)
            if self.captions[other].coarse[at] != want[at]:
                return other
        return rng.choice(self._by_prefix[modality, ()])


def load_pool(root: Path, split: str) -> Pool:
    """Pictures decoded (Pillow, RGB)."""
    items = []
    for line in pool_path(root, split).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        content = Content(row["txt"], _open(root / row["img_path"]) if row["img_path"] else None)
        items.append(Item(row["did"], row["modality"], content, json.loads(row["src_content"])["caption"]))
    queries = [q for task in TASKS for q in read_queries(root, split, task)]
    return Pool(tuple(items), tuple(_with_image(q, root) for q in queries))


def encode_pool(model: RetrvR1Model, processor: Processor, pool: Pool) -> Pool:
    """The same pool with every picture as tower tokens: later stages never run the tower."""
    pictures = [i.content.image for i in pool.items if i.content.image is not None]
    pictures += [q.query.content.image for q in pool.queries if q.query.content.image is not None]
    encoded = iter(encode(model, processor, pictures))  # type: ignore[arg-type]

    def swap(content: Content) -> Content:
        return content if content.image is None else Content(content.text, next(encoded))  # type: ignore[arg-type]

    items = tuple(Item(i.id, i.modality, swap(i.content), i.caption) for i in pool.items)
    queries = tuple(_replace_content(q, swap(q.query.content)) for q in pool.queries)
    return Pool(items, queries)


@torch.inference_mode()
def encode(
    model: RetrvR1Model, processor: Processor, pictures: Sequence[Image.Image], batch_size: int = 128
) -> list[EncodedImage]:
    out: list[EncodedImage] = []
    for start in range(0, len(pictures), batch_size):
        pixels, grids = processor.pixels(pictures[start : start + batch_size])
        features = model.encode_images(pixels.to(model.device, model.dtype), grids.to(model.device))
        out += [EncodedImage(tuple(g.tolist()), f.clone()) for g, f in zip(grids, features, strict=True)]
    return out


def content_embeds(
    model: RetrvR1ForConditionalGeneration, processor: Processor, contents: Sequence[Content], cache: dict[int, Tensor]
) -> list[Tensor]:
    """T_c of each content, (n, H) without gradient (the LM and the tower are frozen), cached by object."""
    missing = [c for c in contents if id(c) not in cache]
    if missing:
        with torch.no_grad():
            chunks = [processor.content_chunk(c) for c in missing]
            batch = collate(chunks, processor, model.device)
            features = encode_pictures(model.model, processor, batch.pictures)
            embeds = model.model.embed(batch.input_ids, features, batch.image_mask, None)
        for content, chunk, row in zip(missing, chunks, embeds, strict=True):
            cache[id(content)] = row[: len(chunk)].clone()
    return [cache[id(c)] for c in contents]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _with_image(query: LabelledQuery, root: Path) -> LabelledQuery:
    content = query.query.content
    if content.image is None:
        return query
    assert isinstance(content.image, str)  # a path, as `read_queries` leaves it
    return _replace_content(query, Content(content.text, _open(root / content.image)))


def _replace_content(query: LabelledQuery, content: Content) -> LabelledQuery:
    old = query.query
    new = Query(content, old.instruction, old.id)
    return LabelledQuery(new, query.task, query.stratum, query.positives, query.target_modality, query.target_text)
