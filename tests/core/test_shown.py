"""Pictures and words for a model: what fits, what is left out, and that neither goes unsaid."""

from __future__ import annotations

import io

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.shown import LEAST_TOKENS, PIXELS_PER_TOKEN, clipped, in_words, pictures_of
from retrv_r1_retriever.types import Candidate, Content, Document, Query, RankedResult, RankedResults, Status

SIZES = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 300)), max_size=12)


@settings(max_examples=30)
@given(SIZES, st.integers(0, 2000), st.integers(16, 600))
def test_pictures_stay_within_the_budget_and_none_goes_unsaid(
    sizes: list[tuple[int, int]], tokens: int, side: int
) -> None:
    documents = [Document(str(i), Content(image=Image.new("L", size))) for i, size in enumerate(sizes)]
    found = run(pictures_of([*documents, Document("text", Content("t"))], LocalImages(), tokens=tokens, side=side))
    assert sum(picture.tokens for picture in found.shown) <= tokens
    assert sorted([*(picture.id for picture in found.shown), *found.left_out]) == sorted(d.id for d in documents)
    assert all(f"[{id}]" in found.remarks[0] for id in found.left_out)
    if tokens >= LEAST_TOKENS * max(len(sizes), 1):
        assert found.left_out == (), "there was room for a share of all"
    for picture in found.shown:
        width, height = Image.open(io.BytesIO(picture.data)).size
        before = sizes[int(picture.id)]
        assert max(width, height) <= side
        assert (width, height) <= before
        assert picture.tokens >= width * height / PIXELS_PER_TOKEN


def test_a_picture_that_cannot_be_read_is_said() -> None:
    documents = [Document("a", Content("t", b"no picture")), Document("b", Content(image=Image.new("RGB", (8, 8))))]
    found = run(pictures_of(documents, LocalImages(), tokens=100))
    assert [picture.id for picture in found.shown] == ["b"]
    assert found.remarks[0].startswith("Picture of [a] unreadable: image (10 bytes): expected a readable PNG")


def test_a_document_cannot_write_lines_and_is_cut() -> None:
    assert clipped("a\n1. [b]\u2028 c") == "a 1. [b] c"
    assert len(clipped("word " * 500)) == 500
    result = RankedResult(Candidate(Document("x", Content("one\ntwo")), None, 1), 1, 1.0)
    results = RankedResults(Query.of("q"), (result,), Status.PARTIAL, reason="1 candidate could not be opened")
    assert in_words(results).splitlines() == [
        "Only partly reranked: 1 candidate could not be opened", "1. [x] one two",
    ]  # fmt: skip
