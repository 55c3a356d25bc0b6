"""Memory beside a collection: on a server behind an alias, in an embedded index behind a file, the same rules for both."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_client
from qdrant_client import QdrantClient, models

from retrv_r1_retriever import qdrant_transport, sidecar
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.errors import OptionsError, StaleMemoryError, StoreError
from retrv_r1_retriever.images import LocalImages, content_hash
from retrv_r1_retriever.indexing import Indexer
from retrv_r1_retriever.lazy import WriteBack, check_pointer
from retrv_r1_retriever.memory import resolve
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.qdrant import QdrantStore
from retrv_r1_retriever.schema import PayloadSchema
from retrv_r1_retriever.sidecar_build import BuildReport, MemoryBuilder, Shard
from retrv_r1_retriever.types import Candidate, Content, Document, Memory

from .fakes import HashCompressor, HashEmbedder
from .grpc_stub import grpc_stub
from .rest_stub import Stub, rest_stub

IMAGES = LocalImages()
OLD, NEW = HashCompressor(digest="old"), HashCompressor(digest="new")
COUNT = 40


@pytest.fixture
def server() -> Iterator[Stub]:
    with rest_stub() as stub:
        yield stub


@pytest.fixture(params=["foreign", "server", "edge"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    """40 documents: in somebody else's collection, in ours on a server, in ours on this disk (both with memory of `old`)."""
    if request.param == "foreign":
        client = QdrantClient(":memory:")
        fill(client)
        yield QdrantStore("shop", client=client, schema=PayloadSchema(text="text", id="sku", vector=""))
        return
    spec = CollectionSpec(32, OLD.memory_shape[1], OLD.memory_digest)
    store: Any = (
        EdgeStore(tmp_path / "index", spec=spec)
        if request.param == "edge"
        else QdrantStore("shop", client=QdrantClient(":memory:"), spec=spec)
    )
    rows = [Document(f"d{i}", Content(f"text number {i}")) for i in range(COUNT)]
    await Indexer(store, HashEmbedder(), OLD).aindex(rows)
    yield store
    await store.close()


def fill(client: QdrantClient, count: int = COUNT) -> None:
    # Dot: local mode would normalise cosine vectors again when it is searched.
    client.create_collection("shop", vectors_config=models.VectorParams(size=32, distance=models.Distance.DOT))
    contents = [Content(f"text number {i}") for i in range(count)]
    vectors = HashEmbedder().embed(contents)
    client.upsert(
        "shop",
        [
            models.PointStruct(id=i, vector=vector.tolist(), payload={"sku": f"d{i}", "text": content.text})
            for i, (content, vector) in enumerate(zip(contents, vectors, strict=True))
        ],
    )


async def found(store: Any, id: str = "d7") -> Candidate:
    vector = HashEmbedder().embed([Content(f"text number {id[1:]}")])[0]
    return next(c for c in await store.search(vector, 5) if c.document.id == id)


async def digests(store: Any) -> set[str | None]:
    candidates = await store.get([f"d{i}" for i in range(COUNT)])
    assert len(candidates) == COUNT
    return {None if c.memory is None else c.memory.digest for c in candidates}


async def test_blue_green(store: Any) -> None:
    before = await digests(store)
    report = await MemoryBuilder(store.sidecars, NEW, IMAGES, batch_size=16).build()
    assert (report.seen, report.written, report.current, report.failed) == (COUNT, COUNT, 0, ())
    assert await digests(store) == before  # built, but not in use
    await store.sidecars.switch("new")
    assert await digests(store) == {"new"}
    memory = (await found(store)).memory
    assert memory is not None
    content = Content("text number 7")
    expected = NEW.compress([content])[0]
    np.testing.assert_allclose(memory.rows, expected.rows, atol=1e-2)
    assert (memory.content_hash, memory.full_tokens, memory.image_hash) == (content_hash(content), 3, None)
    assert (await resolve([await found(store)], NEW, IMAGES, RerankOptions(on_stale="raise"))).fresh == ()
    assert (await found(store)).retrieval_score == pytest.approx(1.0, abs=1e-3)
    assert [c.memory for c in await store.get(["d1"], with_memory=False)] == [None]

    await MemoryBuilder(store.sidecars, HashCompressor(width=6, digest="newest"), IMAGES).build()
    await store.sidecars.switch("newest")  # other sizes are no obstacle
    assert await digests(store) == {"newest"}
    await store.sidecars.switch("new")
    assert await digests(store) == {"new"}
    assert [(one.digest, one.points, one.in_use) for one in await store.sidecars.all()] == [
        ("new", COUNT, True),
        ("newest", COUNT, False),
    ]
    with pytest.raises(
        StoreError, match=r"expected a sidecar that is not in use, got new\. Switch to another one first"
    ):
        await store.sidecars.drop("new")
    await store.sidecars.drop("newest")
    assert [one.digest for one in await store.sidecars.all()] == ["new"]
    for act in (store.sidecars.drop, store.sidecars.switch):
        with pytest.raises(StoreError, match=r"memory \.\./x: expected one that was built, got new"):
            await act("../x")


async def test_a_second_run_does_what_is_missing(store: Any) -> None:
    builder = MemoryBuilder(store.sidecars, NEW, IMAGES, batch_size=4)
    seen: list[int] = []
    parts = [await builder.build(Shard(i, 3), progress=lambda r: seen.append(r.seen)) for i in (1, 2)]
    assert seen[-1] == COUNT
    done = sum(part.written for part in parts)
    assert all(0 < part.written < COUNT for part in parts)
    compressed = NEW.seen
    whole = await builder.build()
    assert (whole.current, whole.written) == (done, COUNT - done)
    assert NEW.seen - compressed == COUNT - done


async def test_shards_share_without_rest() -> None:
    ids = [str(i) for i in range(1000)]
    shards = [Shard(i, 4) for i in range(1, 5)]
    assert all(sum(shard.has(id) for shard in shards) == 1 for id in ids)
    assert all(200 < sum(shard.has(id) for id in ids) < 300 for shard in shards)
    for text in ("0/2", "3/2", "1", "a/b", "-1/2"):
        with pytest.raises(OptionsError, match="shard: expected i/n"):
            Shard.parse(text)


async def test_the_plan_writes_nothing_and_measures(store: Any) -> None:
    builder = MemoryBuilder(store.sidecars, NEW, IMAGES)
    plan = await builder.plan(COUNT, sample=10)
    assert await store.sidecars.all() == ()
    assert (plan.documents, plan.present, plan.sampled, plan.unreadable) == (COUNT, 0, 10, 0)
    assert 3 * 8 * 2 < plan.bytes < 3 * 8 * 2 + 400  # 3 words, 8 columns, 2 bytes, and the note
    assert plan.grpc_bytes == 3 * 8 * 4 < plan.json_bytes
    assert plan.total_seconds == plan.seconds * COUNT > 0
    await builder.build(Shard(1, 2))
    again = await builder.plan(COUNT, sample=10)
    assert 0 < again.present < COUNT
    assert again.total_seconds == pytest.approx(again.seconds * (COUNT - again.present))


async def test_a_changed_payload_is_seen_and_repaired(server: Stub) -> None:
    fill(server.client)
    store = QdrantStore("shop", url=server.url, schema=PayloadSchema(text="text", id="sku", vector=""))
    builder = MemoryBuilder(store.sidecars, NEW, IMAGES)
    await builder.build()
    await store.sidecars.switch("new")
    server.client.set_payload("shop", {"text": "another text"}, points=[7])
    with pytest.raises(StaleMemoryError, match="'d7': its content changed after it was indexed"):
        await resolve([await found(store)], NEW, IMAGES, RerankOptions(on_stale="raise"))
    left_out = await resolve([await found(store)], NEW, IMAGES, RerankOptions(on_stale="first_stage"))
    assert left_out.candidates == ()
    assert "missing or stale" in left_out.notes[0]
    again = await builder.build()
    assert (again.written, again.current) == (1, COUNT - 1)
    assert (await resolve([await found(store)], NEW, IMAGES, RerankOptions(on_stale="raise"))).fresh == ()


async def test_somebody_elses_collection_is_never_written_to(server: Stub) -> None:
    fill(server.client)
    before = server.client.get_collection("shop"), server.client.scroll("shop", limit=99, with_vectors=True)
    store = QdrantStore("shop", url=server.url, schema=PayloadSchema(text="text", id="sku", vector=""))
    await MemoryBuilder(store.sidecars, NEW, IMAGES).build()
    await store.sidecars.switch("new")
    write_back = WriteBack(store.sidecars)
    write_back([with_memory(await found(store))])
    await write_back.flush()
    await store.sidecars.forget("new", ["3"])
    after = server.client.get_collection("shop"), server.client.scroll("shop", limit=99, with_vectors=True)
    assert after == before
    assert server.log
    assert not [one for one in server.log if one[1].startswith(("collections/shop/", "collections/shop?"))]
    assert {one[1].split("/")[1] for one in server.log} == {"shop__retrv_new", "aliases"}
    config = server.client.get_collection("shop__retrv_new").config
    assert config.metadata == {"retrv": {"layout": 1, "memory_of": "shop", "memory_digest": "new"}}


async def test_a_name_that_is_taken_is_left_alone() -> None:
    client = QdrantClient(":memory:")
    fill(client)
    client.create_collection("shop__retrv_new", vectors_config={})
    store = QdrantStore("shop", client=client, schema=PayloadSchema(text="text", vector=""))
    for act in (store.sidecars.make("new", 8), store.sidecars.drop("new"), store.sidecars.forget("new", ["1"])):
        with pytest.raises(StoreError, match=r"expected a sidecar made by this package .* got one without our mark"):
            await act


async def test_a_switch_elsewhere_is_noticed(server: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers go through the alias; only "there is none" is believed for a while."""
    fill(server.client)
    schema = PayloadSchema(text="text", id="sku", vector="")
    reader, writer = (QdrantStore("shop", url=server.url, schema=schema) for _ in range(2))
    assert await digests(reader) == {None}
    for compressor in (OLD, NEW):
        await MemoryBuilder(writer.sidecars, compressor, IMAGES).build()
    await writer.sidecars.switch("old")
    assert await digests(reader) == {None}
    monkeypatch.setattr(sidecar, "_LOOK_AGAIN_S", 0.0)
    reader.sidecars._look_again = 0.0
    assert await digests(reader) == {"old"}
    await writer.sidecars.switch("new")
    assert await digests(reader) == {"new"}


async def test_aliases_that_may_not_be_listed(server: Stub, caplog: pytest.LogCaptureFixture) -> None:
    fill(server.client)
    store = QdrantStore("shop", url=server.url, schema=PayloadSchema(text="text", id="sku", vector=""))

    def refused(**_: Any) -> Any:
        raise PermissionError("this key may not")

    store._client.get_aliases = refused
    assert (await found(store)).memory is None
    assert "memory beside the collection is not used for 60 s" in caplog.text


async def test_documents_indexed_after_the_switch_keep_their_own_memory(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, spec=CollectionSpec(32, 8))
    indexer = Indexer(store, HashEmbedder(), NEW)
    await indexer.aindex([Document("d1", Content("text number 1")), Document("d2", Content("text number 2"))])
    await MemoryBuilder(store.sidecars, NEW, IMAGES).build()
    await store.sidecars.switch("new")
    await indexer.aindex([Document("d1", Content("changed")), Document("d3", Content("text number 3"))])
    for candidate in await store.get(["d1", "d2", "d3"]):
        assert candidate.memory is not None
        assert candidate.memory.content_hash == content_hash(candidate.document.content)
    await store.close()
    reopened = EdgeStore(tmp_path)  # the pointer is on disk
    assert await reopened.sidecars.in_use() == "new"
    await reopened.close()


async def test_memory_of_deleted_documents(store: Any) -> None:
    await MemoryBuilder(store.sidecars, NEW, IMAGES).build()
    gone, following = await store.sidecars.orphans("new", None, 1000)
    assert (gone, following) == ([], None)
    page = await store.sidecars.page(None, 1)
    memory = Memory(np.ones((1, 8), np.float16), "new", "c1:x", 1)
    lost = "999" if page.ids[0].isdigit() else "00000000-0000-0000-0000-000000000001"
    await store.sidecars.write("new", {lost: memory})
    first, following = await store.sidecars.orphans("new", None, 25)
    second, end = await store.sidecars.orphans("new", following, 25)
    assert (first + second, end) == ([lost], None)
    await store.sidecars.forget("new", [lost])
    assert [one.points for one in await store.sidecars.all()] == [COUNT]


async def test_another_tenants_memory_is_no_orphan() -> None:
    client = QdrantClient(":memory:")
    fill(client)
    client.set_payload("shop", {"org": "a"}, points=list(range(10)))
    client.set_payload("shop", {"org": "b"}, points=list(range(10, COUNT)))
    schema = PayloadSchema(text="text", id="sku", vector="")
    a, b = (QdrantStore("shop", client=client, schema=schema, tenant=("org", name)) for name in "ab")
    assert (await MemoryBuilder(a.sidecars, NEW, IMAGES).build()).written == 10
    assert (await MemoryBuilder(b.sidecars, NEW, IMAGES).build()).written == COUNT - 10
    assert await a.sidecars.orphans("new", None, 1000) == ([], None)
    assert [document.id for _, document in await a.sidecars.locate(["d1", "d20"])] == ["d1"]


async def test_bad_documents_cost_themselves_only(server: Stub) -> None:
    fill(server.client)
    server.client.set_payload("shop", {"text": ""}, points=[3])
    server.client.set_payload("shop", {"image": "data:image/png;base64,AAAA"}, points=[4])

    class Picky(HashCompressor):
        def compress(self, contents: Any) -> Any:
            if any(content.text == "text number 5" for content in contents):
                raise RuntimeError("five")
            return super().compress(contents)

    store = QdrantStore("shop", url=server.url, schema=PayloadSchema(text="text", image="image", id="sku", vector=""))
    report = await MemoryBuilder(store.sidecars, Picky(digest="new"), IMAGES, batch_size=8).build()
    assert report.written == COUNT - 3
    reasons = {failure.id: failure.reason for failure in report.failed}
    assert "neither text nor image" in reasons["3"]
    assert "expected a readable" in reasons["d4"]
    assert reasons["d5"] == "RuntimeError: five"


# -- lazy


def with_memory(candidate: Candidate, text: str | None = None) -> Candidate:
    content = candidate.document.content if text is None else Content(text)
    rows = NEW.compress([content])[0].rows
    return Candidate(candidate.document, None, 1, Memory(rows, "new", content_hash(content), 3))


async def test_lazy_memory_is_there_the_next_time(store: Any) -> None:
    write_back = WriteBack(store.sidecars)
    readable = await resolve([await found(store)], NEW, IMAGES, RerankOptions())
    assert len(readable.fresh) == 1
    write_back(readable.fresh)
    await write_back.flush()
    assert await store.sidecars.in_use() == "new"
    assert (await resolve([await found(store)], NEW, IMAGES, RerankOptions(on_stale="raise"))).fresh == ()


@pytest.mark.parametrize("id", ["sku", None])
async def test_lazy_memory_of_points_that_a_framework_found(id: str | None) -> None:
    """A framework's own store knows a point by its point id, whatever field [store] id names."""
    client = QdrantClient(":memory:")
    fill(client)
    client.set_payload("shop", {"sku": "3"}, points=[7])  # looks like the point id of another
    sidecars = QdrantStore("shop", client=client, schema=PayloadSchema(text="text", id=id, vector="")).sidecars
    write_back = WriteBack(sidecars)
    named = [Candidate(Document(str(i), Content(f"text number {i}")), None, 1) for i in (3, 4)]
    write_back([with_memory(candidate) for candidate in named])
    await write_back.flush()
    kept = await sidecars.fetch(["3", "4", "7"])
    assert {id: memory.content_hash for id, memory in kept.items()} == {
        c.document.id: content_hash(c.document.content) for c in named
    }


async def test_lazy_memory_that_can_never_be_kept_is_said(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    write_back = WriteBack(store.sidecars)
    write_back([with_memory(Candidate(Document("unheard of", Content("x")), None, 1))])
    await write_back.flush()
    assert "memory of 1 candidates is not kept" in caplog.text
    assert "fields (text, image, id)" in caplog.text


async def test_lazy_memory_of_content_that_has_changed_is_not_written(store: Any) -> None:
    write_back = WriteBack(store.sidecars)
    write_back([with_memory(await found(store), "what it was when the query ran")])
    await write_back.flush()
    assert [one.points for one in await store.sidecars.all()] == [0]


async def test_lazy_memory_never_fails_or_floods(store: Any, caplog: pytest.LogCaptureFixture) -> None:
    candidate = with_memory(await found(store))
    few = WriteBack(store.sidecars, max_waiting=2)
    few([candidate] * 3)
    assert "memory of 3 candidates is not written back" in caplog.text
    await MemoryBuilder(store.sidecars, OLD, IMAGES).build()
    await store.sidecars.switch("old")
    few([candidate])
    await few.flush()
    assert 'memory = "lazy": expected memory new, or none yet, got memory old in use' in caplog.text
    assert {one.digest for one in await store.sidecars.all()} == {"old"}
    check_pointer("new", "new")


async def test_several_points_of_one_document_id(server: Stub) -> None:
    """Chunks under their parent's id: each point gets the memory of its own content only."""
    fill(server.client, 2)
    server.client.set_payload("shop", {"sku": "same"}, points=[0, 1])
    store = QdrantStore("shop", url=server.url, schema=PayloadSchema(text="text", id="sku", vector=""))
    (first, second) = await store.search(HashEmbedder().embed([Content("text number 0")])[0], 2)
    write_back = WriteBack(store.sidecars)
    write_back([with_memory(first)])
    await write_back.flush()
    write_back([with_memory(second)])
    await write_back.flush()
    for candidate in await store.search(HashEmbedder().embed([Content("text number 0")])[0], 2):
        assert candidate.memory is not None
        assert candidate.memory.content_hash == content_hash(candidate.document.content)


# -- transport


async def test_memory_over_rest_is_weighed(server: Stub, caplog: pytest.LogCaptureFixture) -> None:
    fill(server.client)
    heavy = HashCompressor(rows=3, width=128, digest="new")
    store = QdrantStore("shop", url=server.url, schema=PayloadSchema(text="text", id="sku", vector=""), grpc=False)
    plan = await MemoryBuilder(store.sidecars, heavy, IMAGES).plan(COUNT)
    await MemoryBuilder(store.sidecars, heavy, IMAGES).build()
    await store.sidecars.switch("new")
    server.sent.clear()
    vector = HashEmbedder().embed([Content("text number 0")])[0]
    await store.search(vector, COUNT)
    await store.search(vector, COUNT)
    warnings = [record.getMessage() for record in caplog.records if "MB of JSON" in record.getMessage()]
    assert len(warnings) == 1
    said = float(warnings[0].split(" came as ")[1].split(" MB")[0]) * 1e6
    (sent, _) = server.sent["points"]
    assert said == pytest.approx(sent, rel=0.15)
    assert plan.json_bytes * COUNT == pytest.approx(sent, rel=0.15)
    assert "gRPC sends 0.1 MB" in warnings[0]


def test_grpc_is_preferred_where_its_port_answers(server: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(server.url.rpartition(":")[2])
    monkeypatch.setattr(qdrant_transport, "GRPC_PORT", port)
    assert qdrant_transport.connect(qdrant_client, server.url, None, None)._client._prefer_grpc
    assert not qdrant_transport.connect(qdrant_client, server.url, None, False)._client._prefer_grpc
    monkeypatch.setattr(qdrant_transport, "GRPC_PORT", 9)
    assert qdrant_transport.over_rest(qdrant_transport.connect(qdrant_client, server.url, None, None))
    assert not qdrant_transport.over_rest(QdrantClient(":memory:"))


async def test_the_whole_life_cycle_over_grpc(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heavy = HashCompressor(rows=3, width=128, digest="new")
    with grpc_stub() as (port, held):
        fill(held)
        monkeypatch.setattr(qdrant_transport, "GRPC_PORT", port)
        schema = PayloadSchema(text="text", id="sku", vector="")
        store = QdrantStore("shop", url="http://127.0.0.1:9", schema=schema)  # nothing answers REST there
        assert await digests(store) == {None}
        report = await MemoryBuilder(store.sidecars, heavy, IMAGES, batch_size=16).build()
        assert (report.written, report.failed) == (COUNT, ())
        await store.sidecars.switch("new")
        assert await digests(store) == {"new"}
        memory = (await found(store)).memory
        assert memory is not None
        np.testing.assert_allclose(memory.rows, heavy.compress([Content("text number 7")])[0].rows, atol=1e-2)
        assert (await resolve([await found(store)], heavy, IMAGES, RerankOptions(on_stale="raise"))).fresh == ()
        assert (await MemoryBuilder(store.sidecars, heavy, IMAGES).build()).current == COUNT
        held.delete("shop", [3])
        assert await store.sidecars.orphans("new", None, 100) == (["3"], None)
        await store.sidecars.forget("new", ["3"])
        await MemoryBuilder(store.sidecars, NEW.__class__(digest="next"), IMAGES).build()
        await store.sidecars.switch("next")
        await store.sidecars.drop("new")
        assert [(one.digest, one.points) for one in await store.sidecars.all()] == [("next", COUNT - 1)]
        own = QdrantStore("ours", url="http://127.0.0.1:9", spec=CollectionSpec(32, 8))
        await Indexer(own, HashEmbedder(), OLD).aindex([Document("d1", Content("text number 1"))])
        assert (await own.get(["d1"]))[0].memory is not None
        await store.close()
        await own.close()
    assert "MB of JSON" not in caplog.text


# -- killed

RUN = """
import asyncio, sys, time
sys.path.insert(0, "")
from retrv_r1_retriever.images import LocalImages
from retrv_r1_retriever.qdrant import QdrantStore
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.schema import PayloadSchema
from retrv_r1_retriever.sidecar_build import MemoryBuilder
from fakes import HashCompressor

class Slow(HashCompressor):
    def compress(self, contents):
        time.sleep(0.02)
        return super().compress(contents)

where = sys.argv[1]
store = (QdrantStore("shop", url=where, schema=PayloadSchema(text="text", id="sku", vector="")) if "://" in where
         else EdgeStore(where))
report = asyncio.run(MemoryBuilder(store.sidecars, Slow(digest="new"), LocalImages(), batch_size=8).build(
    progress=lambda r: print(r.written, r.current, flush=True)))
"""


@pytest.mark.parametrize("kind", ["server", "edge"])
def test_killed_in_the_middle_and_run_again(server: Stub, tmp_path: Path, kind: str) -> None:
    total = 240
    if kind == "server":
        fill(server.client, total)
    else:
        before = EdgeStore(tmp_path, spec=CollectionSpec(32, 8))
        rows = [Document(f"d{i}", Content(f"text number {i}")) for i in range(total)]
        Indexer(before, HashEmbedder(), OLD).index(rows)
        asyncio.run(before.close())
    place = server.url if kind == "server" else str(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = 0
    for batches in (3, 12):
        command = [sys.executable, "-c", RUN, place]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            for _ in range(batches):
                line = process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            written, current = map(int, line.split())
            assert current >= min(done, 8 * batches)  # what was reported as written is there
            done = written + current
    store: Any = EdgeStore(tmp_path) if kind == "edge" else QdrantStore(
        "shop", url=server.url, schema=PayloadSchema(text="text", id="sku", vector="")
    )  # fmt: skip

    async def finish() -> None:
        report: BuildReport = await MemoryBuilder(store.sidecars, NEW, IMAGES).build()
        assert report.current >= done >= 8 * 12
        assert report.written == total - report.current > 0
        await store.sidecars.switch("new")
        candidates = await store.get([f"d{i}" for i in range(total)])
        assert len(candidates) == total
        assert all(c.memory and c.memory.content_hash == content_hash(c.document.content) for c in candidates)
        await store.close()

    asyncio.run(finish())


def test_a_broken_pointer_is_named(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, spec=CollectionSpec(32, 8))
    (tmp_path / "memory.json").write_text(json.dumps([]))
    with pytest.raises(StoreError, match=r"memory\.json: expected .* Run `retrv-r1 memory switch`"):
        asyncio.run(store.sidecars.in_use())
    asyncio.run(store.close())
