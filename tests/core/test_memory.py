from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from retrv_r1_retriever import memory
from retrv_r1_retriever.engines.base import CompressedContent
from retrv_r1_retriever.errors import EngineError, InputError, StaleMemoryError
from retrv_r1_retriever.images import LocalImages, content_hash, image_hash
from retrv_r1_retriever.memory import resolve
from retrv_r1_retriever.options import OnStale, RerankOptions
from retrv_r1_retriever.types import Candidate, Content, Document
from tests.helpers import DIGEST, FakeCompressor, candidates, documents, png, with_memory

IMAGES = LocalImages()


def stored(kinds: str) -> list[Candidate]:
    """One candidate per letter: fitting, missing, of another model (digest), changed content (c)."""
    made = []
    for rank, (kind, document) in enumerate(zip(kinds, documents(len(kinds)), strict=True), 1):
        fitting = with_memory(document, rank, digest="other" if kind == "d" else DIGEST)
        changed = Document(document.id, Content("new title")) if kind == "c" else document
        made.append(Candidate(changed, 0.5, rank, None if kind == "m" else fitting.memory))
    return made


async def test_engines_without_memory_read_everything() -> None:
    found = candidates(3)
    readable = await resolve(found, None, IMAGES, RerankOptions())
    assert (readable.positions, readable.candidates) == ((0, 1, 2), tuple(found))


async def test_fitting_memory_is_used_as_it_is() -> None:
    compressor = FakeCompressor()
    found = stored("fff")
    readable = await resolve(found, compressor, IMAGES, RerankOptions(on_stale="raise"))
    assert all(a is b for a, b in zip(readable.candidates, found, strict=True))
    assert compressor.seen == []


@pytest.mark.parametrize(
    ("content", "in_thread"),
    [
        (Content("a title", "pictures/one.png"), False),
        (Content(None, Path("pictures/one.png")), False),
        (Content(None, b"0" * 200_000), True),
        (Content("x" * 200_000), True),
        (Content(None, Image.new("RGB", (2, 2))), True),
    ],
)
async def test_only_much_is_hashed_in_a_thread(
    content: Content, in_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread takes longer to begin than fifty paths to hash; a large picture would hold up everybody's event loop."""
    seen = []

    def hashed(content: Content) -> str:
        seen.append(threading.current_thread())
        return content_hash(content)

    monkeypatch.setattr(memory, "content_hash", hashed)
    found = [Candidate(Document("1", content), 0.5, 1, None)]
    await resolve(found, FakeCompressor(), IMAGES, RerankOptions(on_stale="first_stage"))
    assert [thread is not threading.main_thread() for thread in seen] == [in_thread]


@pytest.mark.parametrize("kind", "mdc")
async def test_each_kind_of_miss_is_recomputed(kind: str) -> None:
    compressor, found = FakeCompressor(), stored("f" + kind)
    readable = await resolve(found, compressor, IMAGES, RerankOptions())
    made = readable.candidates[1].memory
    assert made is not None
    assert (made.digest, made.full_tokens) == (DIGEST, 7)
    assert made.content_hash == content_hash(found[1].document.content)
    assert len(compressor.seen) == 1
    assert found[1].memory is not made  # the caller's candidate is left alone


@given(st.text("fmdc", min_size=1, max_size=12), st.integers(0, 5), st.sampled_from(("recompute", "first_stage")))
async def test_no_candidate_is_lost_or_read_without_fitting_memory(kinds: str, most: int, on_stale: OnStale) -> None:
    compressor, found = FakeCompressor(), stored(kinds)
    options = RerankOptions(on_stale=on_stale, max_recompute=most)
    readable = await resolve(found, compressor, IMAGES, options)
    misses = [i for i, kind in enumerate(kinds) if kind != "f"]
    expected = misses[:most] if on_stale == "recompute" else []
    assert list(readable.positions) == [i for i in range(len(kinds)) if i not in misses or i in expected]
    assert len(compressor.seen) == len(expected)
    for position, candidate in zip(readable.positions, readable.candidates, strict=True):
        assert candidate.document is found[position].document
        assert candidate.memory is not None
        assert candidate.memory.digest == DIGEST
        assert candidate.memory.content_hash == content_hash(candidate.document.content)
        if position in expected:  # each got its own rows
            assert candidate.memory.rows[0, 0] == len(candidate.document.content.text or "")
    assert bool(readable.notes) == bool(misses)


async def test_raise_says_how_many_and_what_to_do() -> None:
    with pytest.raises(StaleMemoryError, match=r"2 of 3 without it .*'doc-1': no memory.*on_stale='recompute'"):
        await resolve(stored("fmd"), FakeCompressor(), IMAGES, RerankOptions(on_stale="raise"))


@pytest.mark.parametrize(
    ("kind", "words"), [("d", "memory other, of another model"), ("c", "its content changed after")]
)
async def test_raise_says_what_is_stale(kind: str, words: str) -> None:
    with pytest.raises(StaleMemoryError, match=rf"1 of 2 without it \(the first, 'doc-1': {words}"):
        await resolve(stored("f" + kind), FakeCompressor(), IMAGES, RerankOptions(on_stale="raise"))


async def test_pictures_are_decoded_for_the_compressor_and_hashed() -> None:
    compressor = FakeCompressor()
    found = [Candidate(Document("d", Content("t", png())), None, 1)]
    readable = await resolve(found, compressor, IMAGES, RerankOptions())
    assert hasattr(compressor.seen[0].image, "size")
    assert readable.candidates[0].memory is not None
    assert readable.candidates[0].memory.image_hash == image_hash(png())


async def test_a_broken_picture_leaves_out_its_own_candidate() -> None:
    broken = Candidate(Document("bad", Content("t", b"not a picture")), None, 1)
    odd = Candidate(Document("odd", Content("t", 42)), None, 2)  # type: ignore[arg-type]
    good = Candidate(Document("good", Content("text", png())), None, 3)
    readable = await resolve([broken, odd, good], FakeCompressor(), IMAGES, RerankOptions())
    assert readable.positions == (2,)
    assert readable.candidates[0].memory is not None
    assert readable.candidates[0].memory.rows[0, 0] == 4
    assert sum("could not be recomputed" in note for note in readable.notes) == 2


async def test_what_the_compressor_cannot_read_leaves_out_its_own_candidate() -> None:
    """A picture that can be opened may still have a shape that no model reads."""

    class Choosy(FakeCompressor):
        def compress(self, contents: Sequence[Content]) -> list[CompressedContent]:
            if any("narrow" in (content.text or "") for content in contents):
                raise InputError("picture: expected sides of at most 200 to 1, got 1 x 300.")
            return super().compress(contents)

    texts = ("wide", "narrow", "square", "narrow too")
    found = [Candidate(Document(text, Content(text)), None, rank) for rank, text in enumerate(texts, 1)]
    readable = await resolve(found, Choosy(), IMAGES, RerankOptions())
    assert readable.positions == (0, 2)
    assert [c.memory.rows[0, 0] for c in readable.candidates if c.memory] == [len("wide"), len("square")]
    notes = [note for note in readable.notes if "could not be recomputed: picture: expected sides" in note]
    assert [note.split("'")[1] for note in notes] == ["narrow", "narrow too"]


async def test_a_failing_compressor_is_an_engine_error() -> None:
    class Fails(FakeCompressor):
        def compress(self, contents: object) -> list[object]:  # type: ignore[override]
            raise RuntimeError("CUDA out of memory")

    with pytest.raises(EngineError, match="the compressor failed: RuntimeError: CUDA out of memory"):
        await resolve(candidates(2), Fails(), IMAGES, RerankOptions())  # type: ignore[arg-type]


async def test_a_compressor_that_returns_too_few_is_an_engine_error() -> None:
    class Short(FakeCompressor):
        def compress(self, contents: object) -> list[object]:  # type: ignore[override]
            return []

    with pytest.raises(EngineError, match="the compressor failed: expected 2 memories, got 0"):
        await resolve(candidates(2), Short(), IMAGES, RerankOptions())  # type: ignore[arg-type]
