"""What only the embedded store does: its folder, its lock, its durability."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.errors import SchemaError, StoreError

from .conftest import SPEC, point

HOLD = """
import sys
from retrv_r1_retriever.edge import EdgeStore
store = EdgeStore(sys.argv[1])
sys.stdout.write("open\\n"), sys.stdout.flush()
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
        other.stdin.close()
        other.wait(30)
    await EdgeStore(tmp_path).close()


async def test_opened_twice_in_one_process(tmp_path: Path) -> None:
    store = EdgeStore(tmp_path, spec=SPEC)
    with pytest.raises(StoreError, match="or by another EdgeStore in this one"):
        EdgeStore(tmp_path)
    await store.close()
    await store.close()  # harmless
    with pytest.raises(StoreError, match="expected an answer"):
        await store.count()


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
