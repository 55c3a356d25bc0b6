"""Pictures and candidates as the frozen parts of a checkpoint read them: from files, when they are asked for, in bounded memory.

Tower, embedding table and in_proj never move after `align`, so what they make of a candidate may be kept for a whole training.
"""

from __future__ import annotations

import asyncio
import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from torch import nn

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.errors import ImageError
from retrv_r1_retriever.images import ImageData, ImageSource, load_content
from retrv_r1_retriever.model.checkpoint import Checkpoint
from retrv_r1_retriever.model.modeling import RetrvR1ForConditionalGeneration
from retrv_r1_retriever.model.processing import EncodedImage
from retrv_r1_retriever.types import Candidate, Content, Document, ImageInput, Memory, Query
from retrv_r1_training.unreadable import UnreadablePicture

T = TypeVar("T")


class CandidateReader:
    """Holds a copy of the frozen parts, so that it works beside a model that is wrapped, sharded or in training.

    An `ImageSource` too: what it loads has been through the tower.
    """

    def __init__(self, start: Checkpoint, images: ImageSource, cache_gb: float = 2.0) -> None:
        self.processor = start.processor
        self._engine = LocalEngine(replace(start, model=frozen_parts(start.model)))  # the code that serves makes memory
        self._images = images
        self._pictures: Bounded[EncodedImage] = Bounded(int(cache_gb * 1e9))
        self._memories: Bounded[Memory] = Bounded(int(cache_gb * 1e9))

    def candidates(self, documents: Sequence[Document]) -> tuple[Candidate, ...]:
        """With memory, in order. Raises `UnreadablePicture`."""
        memories = self._read([d.content for d in documents])
        return tuple(
            Candidate(d, None, place, m) for place, (d, m) in enumerate(zip(documents, memories, strict=True), 1)
        )

    def query(self, query: Query) -> Query:
        """With its picture after the tower."""
        return replace(query, content=self.open(query.content))

    def open(self, content: Content) -> Content:
        """With its picture after the tower. Raises `UnreadablePicture`."""
        return run(self._loaded(self, content))

    async def load(self, image: ImageInput) -> ImageData:
        if isinstance(image, EncodedImage):
            return ImageData(image, "")  # type: ignore[arg-type]  # stands for the picture wherever an engine reads it
        known = self._pictures.get(image)
        if known is None:
            data = await self._images.load(image)
            encoded = await asyncio.to_thread(self._engine.encode_picture, data.image)
            known = EncodedImage(encoded.grid, encoded.features.cpu().clone())  # a tensor that a backward pass may keep
            self._pictures.put(image, known, known.features.nbytes)
        return ImageData(known, "")  # type: ignore[arg-type]

    def _read(self, contents: Sequence[Content]) -> list[Memory]:
        found = {c: memory for c in contents if (memory := self._memories.get(c)) is not None}
        missing = [c for c in dict.fromkeys(contents) if c not in found]
        for content, made in zip(missing, self._engine.compress(self._decoded(missing), batch_size=16), strict=True):
            found[content] = Memory(made.rows, "", "", made.full_tokens)
            self._memories.put(content, found[content], made.rows.nbytes)
        return [found[c] for c in contents]

    def _decoded(self, contents: Sequence[Content]) -> list[Content]:
        async def all() -> list[Content]:
            return await asyncio.gather(*(self._loaded(self._images, c) for c in contents))

        return run(all())

    async def _loaded(self, source: ImageSource, content: Content) -> Content:
        try:
            return (await load_content(source, content))[0]
        except ImageError as error:
            raise UnreadablePicture(str(error)) from error


def frozen_parts(model: RetrvR1ForConditionalGeneration) -> RetrvR1ForConditionalGeneration:
    """A copy without the language model's layers: what candidate memory is made of."""
    language, head = model.model.language_model, model.lm_head
    layers = language.layers
    language.layers, model.lm_head = nn.ModuleList(), nn.Identity()  # type: ignore[assignment]  # put back below
    try:
        frozen = copy.deepcopy(model)
    finally:
        language.layers, model.lm_head = layers, head
    frozen.requires_grad_(False)
    return frozen


class Bounded(Generic[T]):
    """The values used last, up to `limit` bytes; one that is larger by itself is not kept."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[object, tuple[T, int]] = OrderedDict()

    def get(self, key: object) -> T | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: object, value: T, size: int) -> None:
        if key in self._kept:
            self._bytes -= self._kept.pop(key)[1]
        self._kept[key] = (value, size)
        self._bytes += size
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1][1]
