from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.errors import OptionsError, SchemaError, StoreError
from retrv_r1_retriever.images import LocalImages, content_hash, image_hash
from retrv_r1_retriever.indexing import Indexer, IndexFailure, IndexReport, _Ids
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.store import VectorFirstStage
from retrv_r1_retriever.types import Content, Document, Query

from .conftest import png
from .fakes import HashCompressor, HashEmbedder

SPEC = CollectionSpec(32, 8, "digest-1")


@pytest.fixture
async def store(open_store: Callable[..., Any]) -> Any:
    return await open_store(spec=SPEC)


def documents(n: int, note: str = "") -> list[Document]:
    return [Document(f"d{i}", Content(f"text {i}{note}"), {"i": i}) for i in range(n)]


async def test_what_is_indexed_is_found_with_its_memory(store: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("blue"))
    compressor = HashCompressor()
    indexer = Indexer(store, HashEmbedder(), compressor, LocalImages(tmp_path), batch_size=2)
    rows = [
        *documents(3),
        Document("path", Content("a thing", "a.png")),
        Document("bytes", Content(None, png("red"))),
        Document("pixels", Content(None, Image.new("RGB", (2, 2), "green"))),
    ]
    report = await indexer.aindex(rows)
    assert (report.indexed, report.skipped, report.failed) == (6, 0, ())
    assert report.seconds > 0
    first_stage = VectorFirstStage(store, HashEmbedder())
    for row in rows[:3]:
        best = (await first_stage(Query(row.content), top_k=3))[0]
        assert best.document == row
        assert best.retrieval_score == pytest.approx(1.0, abs=1e-5)
        (expected,) = HashCompressor().compress([row.content])
        assert best.memory is not None
        np.testing.assert_array_equal(best.memory.rows, expected.rows)
        assert best.memory.full_tokens == expected.full_tokens
        assert best.memory.content_hash == content_hash(row.content)
    path, data, pixels = await store.get(["path", "bytes", "pixels"])
    assert path.document.content.image == "a.png"
    assert (path.memory.image_hash, data.memory.image_hash) == (image_hash(png("blue")), image_hash(png("red")))
    for found in (path, data, pixels):  # what comes back hashes as what went in, or every memory would look stale
        assert found.memory.content_hash == content_hash(found.document.content)
        loaded = await LocalImages(tmp_path).load(found.document.content.image)
        assert loaded.hash == found.memory.image_hash


async def test_running_again_does_no_work(store: Any) -> None:
    rows = [*documents(5), Document("pixels", Content(None, Image.new("RGB", (2, 2), "green")))]
    compressor, embedder = HashCompressor(), HashEmbedder()
    indexer = Indexer(store, embedder, compressor, batch_size=4)
    await indexer.aindex(rows)
    before = compressor.seen, embedder.calls
    report = await indexer.aindex(rows)
    assert (report.indexed, report.skipped) == (0, 6)
    assert (compressor.seen, embedder.calls) == before
    report = await indexer.aindex([*documents(2, " changed"), *documents(6)[2:]])
    assert (report.indexed, report.skipped) == (3, 3)  # two changed, one new
    assert (await indexer.aindex(rows, force=True)).indexed == 6
    assert await store.count() == 7


async def test_another_model_makes_all_memory_again(store: Any) -> None:
    await Indexer(store, HashEmbedder(), HashCompressor()).aindex(documents(3))
    report = await Indexer(store, HashEmbedder(), HashCompressor(digest="digest-2")).aindex(documents(3))
    assert (report.indexed, report.skipped) == (3, 0)
    assert {c.memory.digest for c in await store.get(["d0", "d1", "d2"])} == {"digest-2"}
    without = await Indexer(store, HashEmbedder()).aindex(documents(3))
    assert without.skipped == 3  # an index without memory is content with one that has it


async def test_an_index_without_memory(store: Any) -> None:
    indexer = Indexer(store, HashEmbedder())
    assert (await indexer.aindex(documents(3))).indexed == 3
    assert (await indexer.aindex(documents(3))).skipped == 3
    assert all(c.memory is None for c in await store.get(["d0", "d1"]))


async def test_of_equal_ids_the_last_one_wins(store: Any) -> None:
    rows = [Document("same", Content(f"version {i}")) for i in range(5)]
    await Indexer(store, HashEmbedder(), HashCompressor(), batch_size=2).aindex(rows)
    await Indexer(store, HashEmbedder(), HashCompressor(), batch_size=2).aindex(rows)
    (found,) = await store.get(["same"])
    assert found.document.content.text == "version 4"
    assert await store.count() == 1


async def test_equal_ids_in_one_batch_are_reported(store: Any) -> None:
    rows = [Document("same", Content("first")), Document("other", Content("x")), Document("same", Content("second"))]
    report = await Indexer(store, HashEmbedder(), HashCompressor()).aindex(rows)
    assert report.indexed == 2
    (failure,) = report.failed
    assert failure.id == "same"
    assert failure.reason.startswith(
        "document id: expected distinct ids, got 'same' more than once. The last one is kept"
    )
    (found,) = await store.get(["same"])
    assert found.document.content.text == "second"


async def test_equal_ids_in_different_batches_are_reported_and_counted_once(store: Any, tmp_path: Path) -> None:
    rows = [
        *documents(4),
        Document("d1", Content("another")),
        Document("gone", Content("x", "nope.png")),
        Document("d2", Content("text 2"), {"i": 2}),  # just as it was
        Document("gone", Content("here now")),  # the first time it was not in the index: nothing is replaced
        Document("d1", Content("a third")),
        Document("d3", Content("x", "nope.png")),  # cannot replace anything
    ]
    indexer = Indexer(store, HashEmbedder(), HashCompressor(), LocalImages(tmp_path), batch_size=2)
    for again in (False, True):
        seen: list[int] = []
        indexer.progress = lambda report, seen=seen: seen.append(
            report.indexed + report.skipped + len(report.failed)  # type: ignore[misc]
        )
        report = await indexer.aindex(rows)
        assert report.indexed + report.skipped == 5
        repeated = [failure for failure in report.failed if "distinct ids" in failure.reason]
        assert [failure.id for failure in repeated] == ["d1", "d2", "d1"], again
        assert sorted(f.id for f in report.failed if "no such file" in f.reason) == ["d3", "gone"]
        assert seen == [2, 4, 6, 8, 10], "every row is counted once"
        texts = [c.document.content.text for c in await store.get(["d1", "d2", "d3", "gone"])]
        assert texts == ["a third", "text 2", "text 3", "here now"]


def test_ids_of_a_run_are_remembered_in_little_memory() -> None:
    met = _Ids()
    ids = [f"document-{i}" for i in range(20_000)]
    for start in range(0, len(ids), 50):
        assert met.add(ids[start : start + 50]) == []
    assert met.add([]) == []
    assert met.add(["new", *ids[::100], "other"]) == ids[::100]
    assert met.add(["other", "third", "new"]) == ["other", "new"]
    assert sum(array.nbytes for array in met._arrays) == 8 * (len(ids) + 3)
    assert len(met._arrays) < 20


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"deep": json.loads("[" * 100 + "]" * 100)},
            "metadata of document 'bad': expected at most 100 levels, got more",
        ),
        ({"code": 10**22}, "expected JSON values, got a whole number of more than 64 bits, 10000000000000000000000"),
        ({"name": "\ud800"}, "text or metadata of document 'bad': expected valid Unicode, got 'utf-8' codec"),
    ],
)
async def test_metadata_that_a_store_would_not_give_back_is_refused(
    store: Any, metadata: dict[str, Any], message: str
) -> None:
    """Qdrant Edge wrote such nesting, and no search or run over the index could read it again."""
    rows = [Document("good", Content("x"), {"deep": json.loads("[" * 99 + "]" * 99), "code": 2**64 - 1})]
    indexer = Indexer(store, HashEmbedder(), HashCompressor())
    report = await indexer.aindex([*rows, Document("bad", Content("y"), metadata)])
    assert [failure.reason.startswith(message) or message in failure.reason for failure in report.failed] == [True]
    assert (await indexer.aindex(rows)).skipped == 1
    assert [c.document for c in await store.search(HashEmbedder().embed([Content("x")])[0], 5)] == rows


async def test_what_is_no_document_is_reported_and_not_swallowed(store: Any) -> None:
    rows: list[Any] = [{"id": "a", "text": "x"}, "text", Document("b", Content("x")), Document(7, Content("x"))]  # type: ignore[arg-type]
    report = await Indexer(store, HashEmbedder(), HashCompressor()).aindex(rows)
    assert report.indexed == 1
    assert [f.id for f in report.failed] == ["?", "?", "7"]
    assert report.failed[0].reason.startswith("row: expected Document, got dict. Wrap each one")
    assert "expected a non-empty str, got 7" in report.failed[2].reason


async def test_a_source_or_picture_that_raises_anything_costs_one_item(store: Any, tmp_path: Path) -> None:
    class Remote(LocalImages):
        async def load(self, image: Any) -> Any:
            if image == "down":
                raise ConnectionError("no route to host")
            return await super().load(image)

    (tmp_path / "cut.png").write_bytes(png(size=(99, 99))[:60])
    lazy = Image.open(tmp_path / "cut.png")  # Pillow reads its pixels only when they are needed
    rows = [Document("down", Content("x", "down")), Document("lazy", Content("x", lazy)), *documents(2)]
    report = await Indexer(store, HashEmbedder(), HashCompressor(), Remote(tmp_path)).aindex(rows)
    assert report.indexed == 2
    reasons = {failure.id: failure.reason for failure in report.failed}
    assert reasons["down"] == "ConnectionError: no route to host"
    assert "truncated" in reasons["lazy"]


class Picky(HashEmbedder):
    def embed(self, items: Any) -> np.ndarray:
        if any("bad" in (item.text or "") for item in items):
            raise RuntimeError("cannot read this")
        vectors = super().embed(items)
        vectors[[("nan" in (item.text or "")) for item in items]] = np.nan
        return vectors


async def test_one_bad_item_is_reported_and_skipped(store: Any, tmp_path: Path) -> None:
    rows: list[Any] = [
        Document("broken", Content("x", b"not a picture")),
        *documents(3),
        Document("missing", Content("x", "nope.png")),
        Document("url", Content("x", "https://example.com/a.png")),
        Document("bad", Content("bad text")),
        Document("nan", Content("nan text")),
        IndexFailure("pool.jsonl:8", "no id"),
        Document("json", Content("x"), {"when": object()}),
        Document("half", Content("\ud800")),
        Document("", Content("x")),
        Document("caf\udce9", Content("a file name in Latin-1")),
        Document("d3", Content("text 3")),
    ]
    report = await Indexer(store, Picky(), HashCompressor(), LocalImages(tmp_path), batch_size=len(rows)).aindex(
        iter(rows)
    )
    assert (report.indexed, report.skipped) == (4, 0)
    reasons = {failure.id: failure.reason for failure in report.failed}
    assert set(reasons) == {"broken", "missing", "url", "bad", "nan", "pool.jsonl:8", "json", "half", "", "caf\udce9"}
    assert "expected a readable PNG" in reasons["broken"]
    assert "no such file" in reasons["missing"]
    assert "got a URL" in reasons["url"]
    assert reasons["bad"] == "RuntimeError: cannot read this"
    assert "NaN" in reasons["nan"]
    assert "expected JSON values" in reasons["json"]
    assert "expected a non-empty str" in reasons[""]
    assert "expected valid Unicode" in reasons["half"]
    assert "document id: expected valid Unicode, got 'caf\\udce9'" in reasons["caf\udce9"]
    assert await store.count() == 4


async def test_a_wrong_setup_ends_the_run(store: Any) -> None:
    with pytest.raises(SchemaError, match="vector size"):
        await Indexer(store, HashEmbedder(size=16), HashCompressor()).aindex(documents(3))
    with pytest.raises(SchemaError, match="memory width"):
        await Indexer(store, HashEmbedder(), HashCompressor(width=5)).aindex(documents(3))
    with pytest.raises(OptionsError, match="batch_size: expected 1 or more, got 0"):
        Indexer(store, HashEmbedder(), batch_size=0)


async def test_a_store_that_refuses_ends_the_run(open_store: Callable[..., Any]) -> None:
    await open_store(spec=SPEC)
    with pytest.raises(StoreError, match="read_only"):
        await Indexer(await open_store(read_only=True), HashEmbedder(), HashCompressor()).aindex(documents(3))


async def test_streams_with_bounded_memory(store: Any) -> None:
    taken = 0
    reports: list[IndexReport] = []

    def rows() -> Iterator[Document]:
        nonlocal taken
        for document in documents(20):
            taken += 1
            yield document

    def progress(report: IndexReport) -> None:
        reports.append(report)
        assert taken <= report.indexed + 4  # never more than one batch ahead

    await Indexer(store, HashEmbedder(), HashCompressor(), batch_size=4, progress=progress).aindex(rows())
    assert [report.indexed for report in reports] == [4, 8, 12, 16, 20]


async def test_async_documents(store: Any) -> None:
    async def rows() -> AsyncIterator[Document]:
        for document in documents(5):
            await asyncio.sleep(0)
            yield document

    assert (await Indexer(store, HashEmbedder(), batch_size=2).aindex(rows())).indexed == 5


async def test_a_slow_compressor_does_not_block_the_loop(store: Any) -> None:
    class Slow(HashCompressor):
        def compress(self, contents: Any) -> Any:
            time.sleep(0.2)
            return super().compress(contents)

    run = asyncio.create_task(Indexer(store, HashEmbedder(), Slow()).aindex(documents(2)))
    ticks = 0
    while not run.done():
        await asyncio.sleep(0.005)
        ticks += 1
    assert ticks > 10


def test_sync(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, spec=SPEC)
    assert Indexer(store, HashEmbedder(), HashCompressor()).index(documents(3)).indexed == 3


RUN = """
import sys, time
from fakes import HashCompressor, HashEmbedder
from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.indexing import Indexer
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.types import Content, Document

def say(report):
    sys.stdout.write(f"{report.indexed} {report.skipped}\\n"), sys.stdout.flush()

store = EdgeStore(sys.argv[1], spec=CollectionSpec(32, 8, "digest-1"))
documents = (Document(f"d{i}", Content(f"text {i}"), {"i": i}) for i in range(400))
Indexer(store, HashEmbedder(), HashCompressor(), batch_size=8, progress=say).index(documents)
"""


def test_killed_in_the_middle_and_run_again(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = 0
    for batches in (3, 11, 24):  # killed three times, at different places
        with subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
        ) as run:
            assert run.stdout is not None
            for _ in range(batches):
                indexed, skipped = map(int, run.stdout.readline().split())
            assert skipped >= min(done, 8 * batches)  # what was reported as written is there
            run.send_signal(signal.SIGKILL)
            done = indexed + skipped
    store = EdgeStore(tmp_path)
    rows = [Document(f"d{i}", Content(f"text {i}"), {"i": i}) for i in range(400)]
    report = Indexer(store, HashEmbedder(), HashCompressor(), batch_size=8).index(rows)
    assert report.skipped >= done
    assert report.indexed + report.skipped == 400
    assert report.indexed > 0

    async def check() -> None:
        assert await store.count() == 400
        found = await store.get([row.id for row in rows])
        assert [candidate.document for candidate in found] == rows
        assert all(c.memory is not None and len(c.memory.rows) > 0 for c in found)
        await store.close()

    asyncio.run(check())
