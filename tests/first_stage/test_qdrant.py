"""What only the client store does: collections of other people, sync and async clients, servers that do not answer."""

from __future__ import annotations

import asyncio
import builtins
import uuid
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from qdrant_client import AsyncQdrantClient, QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.errors import MissingExtraError, OptionsError, SchemaError, StoreError
from retrv_r1_retriever.indexing import Indexer
from retrv_r1_retriever.points import CollectionSpec, native_id
from retrv_r1_retriever.qdrant import QdrantStore
from retrv_r1_retriever.schema import PayloadSchema
from retrv_r1_retriever.store import Equals, Filter
from retrv_r1_retriever.types import Content, Document

from .conftest import SPEC, point
from .fakes import HashEmbedder
from .rest_stub import rest_stub

AXES = np.eye(4, dtype=np.float32)
SCHEMA = PayloadSchema(text="{title} - {attrs.color}", image="image.path", id="sku", vector="clip")
PAYLOADS: list[dict[str, Any]] = [
    {"sku": "a-1", "title": "Shoe", "attrs": {"color": "red"}, "image": {"path": "1.png"}, "org": "acme", "new": True},
    {"sku": 2, "title": "Hat", "attrs": {}, "org": "zeta", "new": False},
]


def foreign(client: QdrantClient, payloads: list[dict[str, Any]] = PAYLOADS) -> None:
    client.create_collection(
        "shop",
        vectors_config={
            "clip": models.VectorParams(size=4, distance=models.Distance.COSINE),
            "late": models.VectorParams(
                size=4,
                distance=models.Distance.DOT,
                multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            ),
        },
    )
    if payloads:
        points = [
            models.PointStruct(id=i, vector={"clip": AXES[i].tolist()}, payload=payload)
            for i, payload in enumerate(payloads)
        ]
        client.upsert("shop", points)


@pytest.fixture
def client() -> QdrantClient:
    return QdrantClient(":memory:")


async def test_a_foreign_collection_is_read(client: QdrantClient) -> None:
    foreign(client)
    store = QdrantStore("shop", client=client, schema=SCHEMA)
    assert store.spec == CollectionSpec(4)
    first, second = await store.search(AXES[0], 5)
    assert first.document == Document(
        "a-1",
        Content("Shoe - red", "1.png"),
        {"title": "Shoe", "attrs": {"color": "red"}, "org": "acme", "new": True},
    )
    assert first.memory is None
    assert (second.document.id, second.document.content) == ("2", Content("Hat"))
    assert [c.document.id for c in await store.get(["2", "nope", "a-1"])] == ["2", "a-1"]
    (new,) = await store.search(AXES[0], 5, filter=Filter(must=(Equals("new", True),)))
    assert new.document.id == "a-1"
    zeta = QdrantStore("shop", client=client, schema=SCHEMA, tenant=("org", "zeta"))
    assert [c.document.id for c in await zeta.search(AXES[0], 5)] == ["2"]
    assert [c.document.id for c in await zeta.get(["2", "a-1"])] == ["2"]


async def test_a_foreign_collection_is_never_written_to(client: QdrantClient, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(client)
    before = client.get_collection("shop"), client.scroll("shop", with_vectors=True)
    store = QdrantStore("shop", client=client, schema=SCHEMA)
    with pytest.raises(StoreError, match="this package never writes to a collection it did not make"):
        await store.upsert([point("a")])
    await store.search(AXES[0], 5)
    assert await store.content_hashes(["a-1"]) == {}
    assert (client.get_collection("shop"), client.scroll("shop", with_vectors=True)) == before


async def test_point_ids_serve_where_no_field_does(client: QdrantClient) -> None:
    client.create_collection("plain", vectors_config=models.VectorParams(size=4, distance=models.Distance.EUCLID))
    name = str(uuid.uuid4())
    client.upsert(
        "plain",
        [
            models.PointStruct(id=7, vector=[1, 0, 0, 0], payload={"text": "seven"}),
            models.PointStruct(id=name, vector=[3, 0, 0, 0], payload={"text": "name"}),
            models.PointStruct(id=8, vector=[1, 0, 0, 0], payload={"other": "no content"}),
        ],
    )
    store = QdrantStore("plain", client=client, schema=PayloadSchema(text="text", vector=""))
    assert [c.document.id for c in await store.search(AXES[0], 5)] == ["7", name]  # nearest first, by Euclid too
    assert [c.document.id for c in await store.get([name, "7", "9", "not-an-id"])] == [name, "7"]


async def test_a_point_without_content_is_left_out_with_a_warning(
    client: QdrantClient, caplog: pytest.LogCaptureFixture
) -> None:
    foreign(client, [*PAYLOADS, {"sku": "c", "price": 3}])
    found = await QdrantStore("shop", client=client, schema=SCHEMA).search(AXES[2], 5)
    assert sorted(c.document.id for c in found) == ["2", "a-1"]
    assert [c.rank for c in found] == [1, 2]
    assert "payload of point 2: expected text and/or image" in caplog.text


def test_a_rare_field_is_looked_for_in_the_whole_collection(client: QdrantClient) -> None:
    foreign(client, [{"sku": "x", "title": "t"}])
    for i in range(1, 100):
        client.upsert(
            "shop", [models.PointStruct(id=i, vector={"clip": [1, 0, 0, 0]}, payload={"sku": "x", "title": "t"})]
        )
    client.set_payload("shop", {"image": {"path": "p.png"}, "attrs": {"color": "red"}}, points=[99])
    QdrantStore("shop", client=client, schema=SCHEMA)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (None, "expected schema=.* its payload has the fields attrs, attrs.color.* its vectors are 'clip', 'late'"),
        (PayloadSchema(text="title"), "vector name: expected 'dense', got vectors named 'clip', 'late'"),
        (PayloadSchema(text="title", vector=""), "expected the unnamed vector, got vectors named 'clip'"),
        (PayloadSchema(text="title", vector="late"), "expected 'late', got a multivector"),
        (
            PayloadSchema(text="body", vector="clip"),
            "payload field 'body': expected it in at least one point, got none; .* title",
        ),
        (PayloadSchema(text="title", image="img", vector="clip"), "payload field 'img'"),
    ],
)
def test_a_wrong_schema_is_named_at_once(client: QdrantClient, schema: Any, message: str) -> None:
    foreign(client)
    with pytest.raises(SchemaError, match=message):
        QdrantStore("shop", client=client, schema=schema)


async def test_an_empty_foreign_collection(client: QdrantClient) -> None:
    foreign(client, [])
    store = QdrantStore("shop", client=client, schema=SCHEMA)
    with pytest.raises(StoreError, match="got an empty collection"):
        await store.search(AXES[0], 1)


def test_sizes_are_checked_on_foreign_collections_too(client: QdrantClient) -> None:
    foreign(client)
    with pytest.raises(SchemaError, match="vector size: expected 5, got 4"):
        QdrantStore("shop", client=client, schema=SCHEMA, spec=CollectionSpec(5))


def test_ours_and_theirs_are_not_mixed_up(client: QdrantClient) -> None:
    foreign(client)
    with pytest.raises(StoreError, match="got one without our mark"):
        QdrantStore("shop", client=client, spec=SPEC)
    QdrantStore("ours", client=client, spec=SPEC)
    with pytest.raises(SchemaError, match=r"expected no schema= \(we made it\)"):
        QdrantStore("ours", client=client, schema=SCHEMA)


def test_a_newer_layout_is_refused(client: QdrantClient) -> None:
    client.create_collection(
        "next",
        vectors_config={"dense": models.VectorParams(size=4, distance=models.Distance.COSINE)},
        metadata={"retrv": {"layout": 99, "vector_size": 4}},
    )
    with pytest.raises(SchemaError, match="expected layout version 1, got 99"):
        QdrantStore("next", client=client)


async def test_an_async_client_is_checked_on_first_use() -> None:
    client = AsyncQdrantClient(":memory:")
    store = QdrantStore("nope", client=client)
    with pytest.raises(StoreError, match=r"expected a checked collection, got none yet. Await open\(\)"):
        store.spec  # noqa: B018
    with pytest.raises(StoreError, match="collection 'nope': expected an existing collection"):
        await store.count()
    store = QdrantStore("new", client=client, spec=SPEC)
    assert await store.count() == 0
    assert store.spec == SPEC


def test_an_async_client_serves_one_event_loop() -> None:
    """Its connections are bound to the loop they were made in: without the check, calls fail now and then."""
    with rest_stub() as stub:
        url = stub.url.replace(
            "127.0.0.1", "127.1"
        )  # for the usual names of this machine the client keeps no connections
        store = QdrantStore("new", client=AsyncQdrantClient(url=url, check_compatibility=False), spec=SPEC)
        assert run(store.count()) == 0
        with pytest.raises(
            StoreError, match=r"expected calls from the event loop it was first used in.* or pass a Qdrant"
        ):
            asyncio.run(store.count())
        assert run(store.count()) == 0
        everywhere = QdrantStore("new", client=QdrantClient(url=url, check_compatibility=False))
        assert (run(everywhere.count()), asyncio.run(everywhere.count())) == (0, 0)
    local = QdrantStore("new", client=AsyncQdrantClient(":memory:"), spec=SPEC)  # has no connections
    assert (run(local.count()), asyncio.run(local.count())) == (0, 0)


async def test_a_sync_client_may_be_handed_over_inside_a_loop(client: QdrantClient) -> None:
    store = QdrantStore("new", client=client, spec=SPEC)
    await store.upsert([point("a")])
    await store.close()
    assert client.collection_exists("new")  # the caller's client is not closed


def test_no_server() -> None:
    with pytest.raises(StoreError, match="collection_exists: expected an answer from Qdrant, got ResponseHandling"):
        QdrantStore("x", url="http://127.0.0.1:9")


@pytest.mark.parametrize("arguments", [{}, {"client": object(), "url": "http://x"}])
def test_client_or_url(arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionsError, match="expected client= or url=, got both or none"):
        QdrantStore("x", **arguments)


@pytest.mark.parametrize(("module", "line"), [("qdrant_client", "qdrant"), ("qdrant_edge", "edge")])
def test_missing_extra(monkeypatch: pytest.MonkeyPatch, module: str, line: str) -> None:
    from retrv_r1_retriever.edge import EdgeStore

    original: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=rf"pip install 'retrv-r1-retriever\[{line}\]'"):
        QdrantStore("x", url="http://x") if line == "qdrant" else EdgeStore("x")


async def test_points_the_server_refuses_cost_themselves_only(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server takes requests of some size only; too large a batch is written one by one, and one point too large left out."""
    store = QdrantStore("ours", client=client, spec=CollectionSpec(32))
    upsert = client.upsert

    def limited(*, points: list[Any], **rest: Any) -> Any:
        if sum(len(str(p.payload)) for p in points) > 2_000:
            raise UnexpectedResponse(413, "Payload Too Large", b"", httpx.Headers())
        return upsert(points=points, **rest)

    monkeypatch.setattr(client, "upsert", limited)
    rows = [Document(f"d{i}", Content("x" * (5_000 if i == 3 else 400))) for i in range(8)]
    report = await Indexer(store, HashEmbedder()).aindex(rows)
    assert report.indexed == 7
    (failure,) = report.failed
    assert failure.id == "d3"
    assert "expected points that Qdrant takes, got UnexpectedResponse" in failure.reason


def test_which_ids_are_numbers() -> None:
    for text in ("0", "7", str(2**64 - 1)):
        assert native_id(text) == int(text)
    for text in ("007", str(2**64), "9" * 5000, "-1", "1.0", "²", "x", ""):
        assert native_id(text) is None, text
    for text in ("0" * 31 + "7", "6f0e3c1e-7f0f-5a0a-9f57-3a1d5cbe2f41"):
        assert native_id(text) == text
