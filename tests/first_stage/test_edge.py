"""What only the embedded store does: its folder, its lock, its durability."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import qdrant_edge

from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.errors import SchemaError, StoreError
from retrv_r1_retriever.memory_file import MemoryFile
from retrv_r1_retriever.store import Equals, Filter
from retrv_r1_retriever.types import Memory

from .conftest import SPEC, WIDTH, point

HOLD = """
import asyncio, sys
from tests.first_stage.conftest import point
from retrv_r1_retriever.edge import EdgeStore
store = EdgeStore(sys.argv[1])
asyncio.run(store.upsert([point("a")]))
sys.stdout.write("open\\n"), sys.stdout.flush()
sys.stdin.readline()
asyncio.run(store.upsert([point("b")]))
sys.stdout.write("written\\n"), sys.stdout.flush()
sys.stdin.read()
"""


async def test_locked_by_another_process(tmp_path: Path) -> None:
    await EdgeStore(tmp_path, spec=SPEC).close()
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs on this loop
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(StoreError, match="expected to be its only user, got an index locked by another process"):
            EdgeStore(tmp_path)
        with pytest.raises(StoreError, match="locked"):
            EdgeStore(tmp_path, read_only=True)
        other.stdin.write("go on\n")
        other.stdin.flush()
        assert other.stdout.readline() == "written\n", "an attempt to open it must not break the index for its user"
        other.kill()  # gives the lock back, too
    store = EdgeStore(tmp_path)
    assert await store.count() == 2
    await store.close()


async def test_opened_twice_in_one_process(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, spec=SPEC)
    await store.upsert([point("a")])
    with pytest.raises(StoreError, match="or by another EdgeStore in this one"):
        EdgeStore(tmp_path)
    await store.upsert([point("b")])
    assert await store.count() == 2
    await store.close()
    await store.close()  # harmless
    with pytest.raises(StoreError, match="expected an answer"):
        await store.count()


async def test_the_lock_is_given_back_by_a_failed_opening_and_by_a_lost_store(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, spec=SPEC)
    await store.close()
    config = tmp_path / "shard" / "edge_config.json"
    text = config.read_text()
    config.write_text("{")
    with pytest.raises(StoreError, match="expected an answer") as kept:
        EdgeStore(tmp_path)
    config.write_text(text)
    store = EdgeStore(tmp_path)
    del store
    gc.collect()
    await EdgeStore(tmp_path).close()
    assert kept.value is not None  # its frames still hold the store that failed


async def test_survives_reopening_and_optimizing(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, spec=SPEC)
    await store.upsert([point("a"), point("b", [0, 1, 0, 0])])
    await store.optimize()
    await store.close()
    store = EdgeStore(tmp_path)
    found = await store.search(np.eye(4)[1], 2)
    assert [c.document.id for c in found] == ["b", "a"]
    assert all(c.memory is not None for c in found)
    await store.close()


async def test_fields_that_are_filtered_by_have_an_index_that_stays(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, spec=SPEC, tenant=("team", "red"))
    await store.upsert([point("a", colour="red", price=1, sale=True), point("b", colour="blue", price=2.5, sale=False)])
    await store.index_fields("colour", "price", "sale")
    await store.index_fields("colour")  # harmless
    await store.close()
    store = EdgeStore(tmp_path)
    kinds = {field: index.data_type for field, index in store._shard.info().payload_schema.items()}
    keyword, number = qdrant_edge.PayloadSchemaType.Keyword, qdrant_edge.PayloadSchemaType.Float
    assert kinds == {
        "colour": keyword,
        "price": number,
        "_retrv.true": keyword,
        "_retrv.false": keyword,
        "team": keyword,
    }
    await store.close()


async def test_a_kill_while_it_is_made_leaves_nothing_half_made(tmp_path: Path) -> None:
    await EdgeStore(tmp_path / "whole", spec=SPEC).close()
    half = tmp_path / "half"
    half.mkdir()
    (half / "retrv.json").write_text((tmp_path / "whole/retrv.json").read_text())  # the first thing that is written
    (half / ".new-left-over").mkdir()
    store = EdgeStore(half)
    assert await store.count() == 0
    await store.close()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", StoreError, "expected JSON"),
        ("[]", StoreError, "expected JSON"),
        (json.dumps({"layout": 99}), SchemaError, "expected layout version 1, got 99"),
        (json.dumps(SPEC.to_json()), SchemaError, "expected folder version 2, got 1. Index again into a new folder"),
    ],
)
def test_a_damaged_note(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    (tmp_path / "retrv.json").write_text(text)
    with pytest.raises(error, match=message):
        EdgeStore(tmp_path)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file", tmp_path / "file" / "index"):
        with pytest.raises(StoreError, match=r"expected a folder that can be written to, got .*Check the path"):
            EdgeStore(path, spec=SPEC)


async def test_memory_says_itself_what_it_is_of(tmp_path: Path) -> None:
    """A kill between the two writes of `upsert` leaves memory of another model or content than the point says."""
    store = EdgeStore(tmp_path, spec=SPEC)
    await store.upsert([point("a")])
    (before,) = await store.search(np.eye(4)[0], 1)
    assert before.memory is not None
    newer = replace(before.memory, rows=np.ones((2, WIDTH), np.float16), digest="digest-2", content_hash="other")
    (id,) = [store._codec.point_id("a")]
    store._memory.replace({id: newer})  # type: ignore[union-attr]
    (after,) = await store.search(np.eye(4)[0], 1)
    assert after.memory is not None
    assert (after.memory.digest, after.memory.content_hash) == ("digest-2", "other")
    assert await store.content_hashes(["a"], memory_digest="digest-1") == {"a": before.memory.content_hash}
    await store.close()


async def test_a_point_written_without_memory_has_none_left(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, spec=SPEC)
    await store.upsert([point("a"), point("b")])
    await store.upsert([point("a", memory=False)])
    got = {c.document.id: c.memory is not None for c in await store.get(["a", "b"])}
    assert got == {"a": False, "b": True}
    assert store._memory is not None
    assert store._memory.count() == 1
    await store.close()


async def test_many_searches_at_once_beside_a_write(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, spec=SPEC)
    await store.upsert([point(str(i)) for i in range(40)])
    writes = [store.upsert([point(str(i))]) for i in range(40, 60)]
    found = await asyncio.gather(*(store.search(np.eye(4)[0], 30) for _ in range(30)), *writes)
    assert all(c.memory is not None and c.memory.rows.shape == (2, WIDTH) for one in found[:30] for c in one or [])
    await store.close()


async def test_memory_whose_file_was_lost_is_made_again(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, spec=SPEC)
    await store.upsert([point("a")])
    await store.close()
    (tmp_path / "memory.sqlite").unlink()
    store = EdgeStore(tmp_path)
    assert await store.content_hashes(["a"], memory_digest="digest-1") == {}  # so an indexing run takes it for new
    assert list(await store.content_hashes(["a"])) == ["a"]
    await store.close()


async def test_a_damaged_file_of_memory(tmp_path: Path) -> None:
    await EdgeStore(tmp_path, spec=SPEC).close()
    (tmp_path / "memory.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match=r"memory\.sqlite: expected a file of memory, got .*restore it from a backup"):
        EdgeStore(tmp_path)
    (tmp_path / "memory.sqlite").unlink()
    await EdgeStore(tmp_path).close()  # the failed one let go of the folder


def test_a_write_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    file = MemoryFile(tmp_path / "m.sqlite")
    whole = Memory(np.arange(6, dtype=np.float16).reshape(2, 3), "d", "c", 5, None)
    file.replace({"a": whole})
    with pytest.raises(StoreError):
        file.replace({"b": whole, None: whole})  # type: ignore[dict-item]
    assert file.count() == 1
    got = file.read(["a", "b"])["a"]
    assert np.array_equal(got.rows, whole.rows)
    assert (got.digest, got.content_hash, got.full_tokens, got.image_hash) == ("d", "c", 5, None)
    file.close()
    with pytest.raises(StoreError, match="closed"):
        file.count()


async def test_a_search_behind_a_filter_does_not_trust_the_graph(tmp_path: Path) -> None:
    store, asked = EdgeStore(tmp_path, spec=SPEC), []
    await store.upsert([point("a", kind="x")])
    real = store._shard

    class Shard:
        def query(self, request):
            asked.append(request.params.exact)
            return real.query(request)

    store._shard = Shard()
    await store.search(np.eye(4)[0], 1)
    await store.search(np.eye(4)[0], 1, filter=Filter(must=(Equals("kind", "x"),)))
    assert asked == [False, True]
    store._shard = real
    await store.close()
