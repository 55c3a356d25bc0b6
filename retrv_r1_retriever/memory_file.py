"""Candidate memory of an embedded index, in a file of its own: SQLite, one row per point, the numbers as they are in memory.

Qdrant Edge gives vectors back as lists of Python floats, which costs many times what it takes to find them (docs/design-decisions.md).
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from retrv_r1_retriever.errors import StoreError, explain
from retrv_r1_retriever.points import memory_note, noted_memory
from retrv_r1_retriever.types import Memory

_TABLE = "CREATE TABLE IF NOT EXISTS memory (id TEXT NOT NULL PRIMARY KEY, note TEXT NOT NULL, width INTEGER NOT NULL, rows BLOB NOT NULL)"
_TYPE = np.dtype("<f2")


class MemoryFile:
    """Memory by point id. Every call holds the file by itself, so any number of threads may use it. Raises `StoreError`.

    A row carries the note of its own memory: whoever reads it sees which model and which content it was made of, whatever the
    collection says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False)
            self._db.execute(_TABLE)

    def read(self, ids: Sequence[str]) -> dict[str, Memory]:
        """Those that are there."""
        found = self._select(
            "SELECT id, note, width, rows FROM memory WHERE id IN (SELECT value FROM json_each(?))", ids
        )
        return {
            id: noted_memory(np.frombuffer(rows, _TYPE).reshape(-1, width), json.loads(note))
            for id, note, width, rows in found
        }

    def content_hashes(self, ids: Sequence[str]) -> dict[str, str]:
        """Id -> hash of the content that its memory was made of, for those that are there; reads no rows."""
        found = self._select("SELECT id, note FROM memory WHERE id IN (SELECT value FROM json_each(?))", ids)
        return {id: json.loads(note)["content_hash"] for id, note in found}

    def page(self, after: str | None, limit: int) -> tuple[list[str], str | None]:
        """Up to `limit` ids from `after` on, in their order, and where the next page starts."""
        with self._errors():
            found = self._db.execute(
                "SELECT id FROM memory WHERE id >= ? ORDER BY id LIMIT ?", (after or "", limit + 1)
            )
            ids = [str(id) for (id,) in found]
        return ids[:limit], ids[limit] if len(ids) > limit else None

    def count(self) -> int:
        with self._errors():
            return int(self._db.execute("SELECT count(*) FROM memory").fetchone()[0])

    def replace(self, memories: Mapping[str, Memory | None]) -> None:
        """All or nothing, on disk when this returns. None: there shall be no memory of this point."""
        rows = [
            (id, json.dumps(memory_note(m)), m.rows.shape[1], np.ascontiguousarray(m.rows, _TYPE).tobytes())
            for id, m in memories.items()
            if m is not None
        ]
        with self._errors(), self._db:
            self._db.executemany("INSERT OR REPLACE INTO memory VALUES (?, ?, ?, ?)", rows)
            self._db.executemany("DELETE FROM memory WHERE id = ?", [(id,) for id, m in memories.items() if m is None])

    def close(self) -> None:
        with self._errors():
            self._db.close()

    def _select(self, query: str, ids: Sequence[str]) -> list[tuple[Any, ...]]:
        with self._errors():
            return self._db.execute(query, (json.dumps(list(ids)),)).fetchall()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (sqlite3.Error, OSError) as error:
            fix = "Check its permissions and the space on it; restore it from a backup, or index again."
            raise StoreError(explain(f"{self.path}", expected="a file of memory", got=error, fix=fix)) from error
