"""One contract, every store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from retrv_r1_retriever.errors import InputError, SchemaError, StoreError
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.store import Equals, Filter, OneOf, Point, Range, Store
from retrv_r1_retriever.types import Content, Document

from .conftest import SIZE, SPEC, png, point

AXES = np.eye(SIZE, dtype=np.float32)


def ids(candidates: Any) -> list[str]:
    return [candidate.document.id for candidate in candidates]


async def test_is_a_store(store: Any) -> None:
    assert isinstance(store, Store)
    assert store.spec == SPEC


async def test_search_returns_best_first_with_document_and_memory(store: Any) -> None:
    await store.upsert(
        [point("far", [0, 1, 0, 0]), point("near", [1, 0.1, 0, 0], colour="red", nested={"a": [1, None]})]
    )
    first, second = await store.search(AXES[0], 5)
    assert (first.rank, second.rank) == (1, 2)
    assert ids([first, second]) == ["near", "far"]
    assert first.retrieval_score == pytest.approx(1 / np.sqrt(1.01), abs=1e-5)
    assert first.document == Document("near", Content("text of near"), {"colour": "red", "nested": {"a": [1, None]}})
    stored = point("near").memory
    assert stored is not None
    np.testing.assert_array_equal(first.memory.rows, stored.rows)
    assert first.memory.rows.dtype == np.float16
    for name in ("digest", "content_hash", "full_tokens", "image_hash"):
        assert getattr(first.memory, name) == getattr(stored, name)


async def test_memory_is_optional_per_point_and_per_call(store: Any) -> None:
    await store.upsert([point("a"), point("b", memory=False)])
    by_id = {c.document.id: c for c in await store.search(AXES[0], 2)}
    assert by_id["a"].memory is not None
    assert by_id["b"].memory is None
    assert all(c.memory is None for c in await store.search(AXES[0], 2, with_memory=False))
    assert all(c.memory is None for c in await store.get(["a", "b"], with_memory=False))


async def test_a_collection_without_memory_works(open_store: Callable[..., Any]) -> None:
    store = await open_store(spec=CollectionSpec(SIZE))
    await store.upsert([point("a", memory=False)])
    assert (await store.search(AXES[0], 1))[0].memory is None
    with pytest.raises(SchemaError, match="memory width: expected no memory"):
        await store.upsert([point("b")])


@pytest.mark.parametrize("id", ["doc-1", "7", "12345678-1234-5678-1234-567812345678", "a b/ä?.png", "x" * 500])
async def test_ids_of_any_form_come_back_as_they_went_in(store: Any, id: str) -> None:
    await store.upsert([point(id)])
    assert ids(await store.search(AXES[0], 1)) == [id]
    assert ids(await store.get([id])) == [id]


async def test_get_keeps_the_order_asked_and_leaves_unknown_ids_out(store: Any) -> None:
    await store.upsert([point(id) for id in "abc"])
    found = await store.get(["c", "nope", "a", "c"])
    assert ids(found) == ["c", "a"]
    assert [c.rank for c in found] == [1, 2]
    assert found[0].retrieval_score is None
    assert await store.get([]) == []


async def test_upsert_replaces_the_whole_point(store: Any) -> None:
    await store.upsert([point("a", colour="red")])
    await store.upsert([Point(Document("a", Content("new")), AXES[1])])
    (found,) = await store.get(["a"])
    assert found.document == Document("a", Content("new"), {})
    assert found.memory is None
    assert await store.count() == 1


async def test_upserting_nothing_is_fine(store: Any) -> None:
    await store.upsert([])
    assert await store.count() == 0


async def test_images_are_stored_as_references(store: Any) -> None:
    picture = png()
    await store.upsert(
        [
            Point(Document("path", Content(image="shoes/1.png")), AXES[0]),
            Point(Document("bytes", Content("t", picture)), AXES[0]),
        ]
    )
    path, data = await store.get(["path", "bytes"])
    assert path.document.content == Content(None, "shoes/1.png")
    assert data.document.content.image.startswith("data:image/png;base64,")


async def test_equal_scores_are_ordered_by_id(store: Any) -> None:
    names = ["m", "b", "z", "a", "k"]
    await store.upsert([point(name) for name in names])
    assert ids(await store.search(AXES[0], 5)) == sorted(names)


CASES = [
    (Filter(must=(Equals("colour", "red"),)), "ac"),
    (Filter(must=(Equals("size", 2),)), "b"),
    (Filter(must=(Equals("sale", True),)), "ab"),
    (Filter(must=(Equals("sale", False),)), "c"),
    (Filter(must=(Equals("attrs.new", True),)), "a"),
    (Filter(must=(Equals("tags", "x"),)), "ab"),
    (Filter(must=(Equals("attrs.brand", "acme"),)), "a"),
    (Filter(must=(OneOf("size", (1, 3)),)), "ac"),
    (Filter(must=(OneOf("colour", ("blue", "green")),)), "b"),
    (Filter(must=(OneOf("sale", (True, "maybe")),)), "ab"),
    (Filter(must=(Range("size", gte=2),)), "bc"),
    (Filter(must=(Range("price", gt=1.5, lt=3.0),)), "b"),
    (Filter(should=(Equals("colour", "blue"), Equals("size", 3))), "bc"),
    (Filter(must=(Equals("colour", "red"),), must_not=(Equals("size", 3),)), "a"),
    (Filter(must=(Equals("nowhere", "x"),)), ""),
    (Filter(), "abc"),
]


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")
@pytest.mark.parametrize("indexed", [(), ("colour", "size", "price", "sale", "tags", "attrs.brand", "attrs.new")])
@pytest.mark.parametrize(("filter", "expected"), CASES)
async def test_filters(store: Any, filter: Filter, expected: str, indexed: tuple[str, ...]) -> None:
    """The same with and without an index of the fields, and for points that came after it."""
    await store.upsert(
        [
            point(
                "a", colour="red", size=1, price=1.5, sale=True, tags=["x", "y"], attrs={"brand": "acme", "new": True}
            ),
            point("b", colour="blue", size=2, price=2.0, sale=True, tags=["x"]),
        ]
    )
    await store.index_fields(*indexed)
    await store.upsert([point("c", colour="red", size=3, price=3.0, sale=False, tags=[])])
    assert ids(await store.search(AXES[0], 9, filter=filter)) == list(expected)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("nowhere", "got none in 2 documents"),
        ("mixed", "expected values of one kind: .* got int, str"),
        ("nested", "got dict"),
    ],
)
async def test_a_field_that_cannot_be_indexed(store: Any, field: str, message: str) -> None:
    await store.upsert([point("a", mixed=1, nested={"x": 1}), point("b", mixed="one")])
    with pytest.raises(InputError, match=message):
        await store.index_fields(field)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Equals("price", 1.5), "expected str, int or bool, got 1.5"),
        (OneOf("price", (1.5,)), "expected str, int or bool"),
        (OneOf("price", ()), "expected at least one value"),
        (Range("price"), "expected at least one number"),
        ("price > 3", "expected Equals, OneOf or Range, got str"),
    ],
)
async def test_unusable_filters(store: Any, condition: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        await store.search(AXES[0], 1, filter=Filter(must=(condition,)))


async def test_a_bare_condition_is_no_filter(store: Any) -> None:
    await store.upsert([point("a")])
    for wrong in (Equals("n", 1), {"n": 1}):
        with pytest.raises(
            InputError,
            match=r"filter: expected retrv_r1_retriever\.Filter or None, got (retrv_r1_retriever\.Equals|builtins\.dict)\. Wrap conditions",
        ):
            await store.search(AXES[0], 1, filter=wrong)


async def test_conditions_may_come_as_a_list(open_store: Callable[..., Any]) -> None:
    store = await open_store(spec=SPEC, tenant=("team", "red"))
    await store.upsert([point("a", n=1), point("b", n=2)])
    listed: Any = [Equals("n", 1)]
    assert ids(await store.search(AXES[0], 5, filter=Filter(must=listed, should=listed))) == ["a"]


async def test_a_tenant_sees_and_changes_only_its_own(open_store: Callable[..., Any]) -> None:
    acme = await open_store(spec=SPEC, tenant=("org.id", "acme"))
    await acme.upsert([point("1", colour="red"), point("2", org={"id": "acme", "x": 1})])
    zeta = await open_store(spec=SPEC, tenant=("org.id", "zeta"))
    await zeta.upsert([point("1", [0, 1, 0, 0])])
    assert ids(await zeta.search(AXES[0], 9)) == ["1"]
    assert ids(await zeta.search(AXES[0], 9, filter=Filter(must=(Equals("org.id", "acme"),)))) == []
    assert ids(await zeta.search(AXES[0], 9, filter=Filter(should=(Equals("org.id", "acme"),)))) == []
    assert ids(await zeta.get(["2", "1"])) == ["1"]
    assert await zeta.count() == 1
    assert list(await zeta.content_hashes(["1", "2"])) == ["1"]
    assert ids(await zeta.sample()) == ["1"]
    with pytest.raises(InputError, match=r"tenant 'org\.id': expected 'zeta', got 'acme'"):
        await zeta.upsert([point("3", org={"id": "acme"})])
    acme = await open_store(spec=SPEC, tenant=("org.id", "acme"))
    one, two = await acme.get(["1", "2"])
    assert one.document.metadata == {"colour": "red", "org": {"id": "acme"}}
    assert two.document.metadata == {"org": {"id": "acme", "x": 1}}
    everyone = await open_store(spec=SPEC)
    assert await everyone.count() == 3


async def test_content_hashes_name_what_needs_no_work(store: Any) -> None:
    await store.upsert([point("a"), point("b", memory=False)])
    memory = point("a").memory
    assert memory is not None
    assert await store.content_hashes(["a", "b", "c"], memory_digest="digest-1") == {"a": memory.content_hash}
    assert await store.content_hashes(["a"], memory_digest="digest-2") == {}
    assert set(await store.content_hashes(["a", "b", "c"])) == {"a", "b"}


async def test_sample(store: Any) -> None:
    await store.upsert([point(id) for id in "abc"])
    assert len(await store.sample(2)) == 2


async def test_read_only_reads(open_store: Callable[..., Any]) -> None:
    store = await open_store(spec=SPEC)
    await store.upsert([point("a")])
    store = await open_store(read_only=True)
    assert ids(await store.search(AXES[0], 1)) == ["a"]
    with pytest.raises(StoreError, match="expected no writes, got upsert"):
        await store.upsert([point("b")])
    with pytest.raises(StoreError, match="expected no writes, got index_fields"):
        await store.index_fields("colour")


async def test_what_it_was_made_with_is_kept(open_store: Callable[..., Any]) -> None:
    await open_store(spec=SPEC)
    assert (await open_store()).spec == SPEC
    assert (await open_store(spec=replace(SPEC, memory_digest="digest-2"))).spec == SPEC  # each memory names its own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector_size": 5}, "vector size: expected 5, got 4"),
        ({"memory_width": 5}, "memory width: expected 5, got 3"),
        ({"embedder": "other"}, "embedder: expected other, got embedder-1"),
    ],
)
async def test_another_model_is_refused(open_store: Callable[..., Any], change: Any, message: str) -> None:
    await open_store(spec=SPEC)
    with pytest.raises(SchemaError, match=message):
        await open_store(spec=replace(SPEC, **change))


async def test_nothing_there(open_store: Callable[..., Any]) -> None:
    with pytest.raises(StoreError, match=r"pass spec=CollectionSpec\(...\)"):
        await open_store()
    with pytest.raises(StoreError, match="without read_only"):
        await open_store(spec=SPEC, read_only=True)


async def test_empty_collection(store: Any) -> None:
    with pytest.raises(StoreError, match="expected documents, got an empty collection"):
        await store.search(AXES[0], 1)


@pytest.mark.parametrize(
    ("vector", "top_k", "error", "message"),
    [
        (np.ones(3), 1, SchemaError, r"query vector: vector size: expected \(4,\), got \(3,\)"),
        (np.ones((1, 4)), 1, SchemaError, r"got \(1, 4\)"),
        (np.array([1, np.nan, 0, 0]), 1, InputError, "finite numbers"),
        (np.ones(4), 0, InputError, "top_k: expected 1 or more, got 0"),
    ],
)
async def test_unusable_queries(store: Any, vector: Any, top_k: int, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        await store.search(vector, top_k)


def with_rows(rows: Any) -> Point:
    one = point("bad")
    assert one.memory is not None
    return replace(one, memory=replace(one.memory, rows=np.asarray(rows, np.float16)))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (point("bad", [1.0]), SchemaError, "document 'bad': vector size"),
        (point("bad", [1, 2, 3, np.inf]), InputError, "document 'bad': expected finite numbers"),
        (with_rows(np.ones((2, 5))), SchemaError, r"memory width: expected \(1 or more, 3\), got \(2, 5\)"),
        (with_rows(np.ones((0, 3))), SchemaError, "memory width"),
        (with_rows([[1, 2, np.nan]]), InputError, "memory of document 'bad': expected finite"),
        (point("bad", _retrv={}), InputError, "no key '_retrv'"),
        (point("bad", when=object()), InputError, "expected JSON values"),
        (point("bad", score=float("nan")), InputError, "expected JSON values"),
        (replace(point("bad"), document=Document("", Content("x"))), InputError, "expected a non-empty str"),
        (replace(point("bad"), document=Document(7, Content("x"))), InputError, "expected a non-empty str, got 7"),
        (point("good"), InputError, "a duplicate id, 'good'"),
    ],
)
async def test_one_unusable_point_writes_nothing(store: Any, bad: Point, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        await store.upsert([point("good"), bad])
    assert await store.count() == 0


async def test_reading_beside_writing(store: Any) -> None:
    await store.upsert([point("first")])

    async def write(start: int) -> None:
        for i in range(start, start + 30):
            await store.upsert([point(f"p{i}"), point(f"q{i}")])

    async def read() -> None:
        for _ in range(30):
            assert await store.search(AXES[0], 3)

    await asyncio.gather(write(0), write(100), read(), read())
    assert await store.count() == 121


async def test_a_point_that_changed_hands_is_noticed(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrv_r1_retriever.points import PointCodec

    await store.upsert([point("a")])
    place = PointCodec(SPEC).point_id("a")
    monkeypatch.setattr(PointCodec, "point_id", lambda self, id: place)  # what a collision would look like
    with pytest.raises(StoreError, match="expected document id 'b', got 'a'"):
        await store.get(["b"])
