"""Values and fakes shared by tests of several areas."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from retrv_r1_retriever.engines.base import CompressedContent
from retrv_r1_retriever.images import content_hash, image_hash
from retrv_r1_retriever.types import Candidate, Content, Document, Memory

DIGEST = "digest-of-the-fake-compressor"


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def header_only_png(width: int, height: int) -> bytes:
    """A few bytes that claim to be width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def documents(count: int) -> list[Document]:
    return [Document(f"doc-{i}", Content(f"text {i}")) for i in range(count)]


def candidates(count: int) -> list[Candidate]:
    return [Candidate(d, 1.0 - i / 200, i + 1) for i, d in enumerate(documents(count))]


def with_memory(document: Document, rank: int, *, digest: str = DIGEST, full_tokens: int = 10) -> Candidate:
    """A candidate whose stored memory fits its content."""
    image = document.content.image
    picture = image_hash(image) if isinstance(image, bytes) else None
    memory = Memory(np.ones((2, 4), np.float16), digest, content_hash(document.content), full_tokens, picture)
    return Candidate(document, 1.0 / rank, rank, memory)


class FakeCompressor:
    """Memory rows that say how long the text was; `seen` counts contents compressed."""

    memory_digest = DIGEST
    memory_shape = (2, 4)

    def __init__(self) -> None:
        self.seen: list[Content] = []

    def compress(self, contents: Sequence[Content]) -> list[CompressedContent]:
        self.seen += contents
        return [CompressedContent(np.full((2, 4), len(c.text or ""), np.float16), 7) for c in contents]
