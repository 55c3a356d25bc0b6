"""A deterministic embedder and compressor; the kill test imports them in another process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from retrv_r1_retriever.engines.base import CompressedContent
from retrv_r1_retriever.types import Content, Query


def _rng(content: Content) -> np.random.Generator:
    pixels = content.image.tobytes() if isinstance(content.image, Image.Image) else b""
    text = (content.text or "").encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text + b"|" + pixels, digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


class HashEmbedder:
    """The same content has the same direction; different contents are nearly orthogonal."""

    def __init__(self, size: int = 32) -> None:
        self.size = size
        self.calls = 0

    def embed(self, items: Sequence[Query | Content]) -> np.ndarray:
        self.calls += 1
        contents = [item.content if isinstance(item, Query) else item for item in items]
        vectors = np.stack([_rng(content).standard_normal(self.size) for content in contents])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class HashCompressor:
    """Rows drawn from the content; as many as the text has words, at most `rows`."""

    def __init__(self, rows: int = 4, width: int = 8, digest: str = "digest-1") -> None:
        self.memory_shape = (rows, width)
        self.memory_digest = digest
        self.seen = 0

    def compress(self, contents: Sequence[Content]) -> list[CompressedContent]:
        self.seen += len(contents)
        return [self._compress(content) for content in contents]

    def _compress(self, content: Content) -> CompressedContent:
        tokens = max(1, len((content.text or "").split()) + (16 if content.image is not None else 0))
        shape = (min(self.memory_shape[0], tokens), self.memory_shape[1])
        return CompressedContent(_rng(content).standard_normal(shape).astype(np.float16), tokens)
