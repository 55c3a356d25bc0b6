"""A text file as a table on disk: any line by its number or its key, in memory that does not grow with the file.

M-BEIR's union pool has 5.6 million lines. An SQLite file beside it holds key, byte offset and line number of each; lines are read
from the file when asked for. It is made once and made again when the file changes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from retrv_r1_retriever.errors import InputError, explain

_logger = logging.getLogger(__name__)
_VERSION = 1
_EXAMPLES = 5
_CACHE_KIB = 32_768

#: A file with a larger share of bad rows is refused: it is more likely to be the wrong file than to have a few bad rows.
MAX_BAD_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Skipped:
    """Rows left out. total: of all rows; examples: the first few, each with file, line and reason."""

    count: int = 0
    total: int = 0
    examples: tuple[str, ...] = ()

    def check(self, what: str, max_share: float) -> None:
        """Raises `InputError` above the share."""
        if self.count > max_share * self.total:
            raise InputError(
                explain(
                    what,
                    expected=f"at most {max_share:.1%} bad rows",
                    got=f"{self.count:,} of {self.total:,}; "
                    + "; ".join(example.rstrip(".") for example in self.examples[:3]),
                    fix="Fix the rows, or raise --max-bad-share (in a recipe: data.max_bad_share).",
                )
            )


@dataclass(frozen=True, slots=True)
class LineFormat:
    """How the lines of a kind of file are told apart.

    name: part of the index's identity; a change of `key` needs a new name
    key: the line's key; raises `ValueError` for a line that is no record
    unique: a second line with a known key is a bad row; otherwise `LineIndex.find` returns all of them
    """

    name: str
    key: Callable[[bytes], str]
    unique: bool = True


class LineIndex:
    """Lines of `path` by number (0-based, bad ones left out) or key. Safe to share with threads and forked or spawned workers.

    folder: where the index is kept; None = `.retrv` beside the file
    max_bad_share: above it, `InputError`; bad rows below it are skipped, logged once and listed by `bad_rows`
    """

    def __init__(
        self, path: Path, format: LineFormat, *, folder: Path | None = None, max_bad_share: float = MAX_BAD_SHARE
    ) -> None:
        self.path = path.resolve()
        if not self.path.is_file():
            raise InputError(explain(str(path), expected="a file", got="no such file", fix="Fix the path."))
        name = hashlib.blake2b(f"{self.path} {format.name}".encode(), digest_size=6).hexdigest()
        self._index = (folder or self.path.parent / ".retrv").resolve() / f"{self.path.name}.{name}.sqlite"
        self._local = threading.local()
        stamp = _stamp(self.path, format)
        if _stored_stamp(self._index) != stamp:
            self._make(format, stamp)
        (self._length,) = self._one("SELECT count(*) FROM rows")
        (bad,) = self._one("SELECT count(*) FROM bad")
        examples = tuple(reason for _, reason in zip(range(_EXAMPLES), self.bad_rows(), strict=False))
        self.skipped = Skipped(bad, self._length + bad, examples)
        self.skipped.check(str(path), max_bad_share)
        if bad:
            _logger.warning("%s: %d of %d rows skipped, first: %s", path, bad, self.skipped.total, examples[0])

    def __len__(self) -> int:
        return int(self._length)

    def __getitem__(self, number: int) -> bytes:
        row = self._one("SELECT start, size FROM rows WHERE number = ?", number)
        if row is None:
            raise IndexError(number)
        return self._read(*row)

    def __iter__(self) -> Iterator[bytes]:
        return (self[number] for number in range(len(self)))

    def __contains__(self, key: object) -> bool:
        return self._one("SELECT 1 FROM rows WHERE key = ?", key) is not None

    def find(self, key: str) -> list[bytes]:
        """All lines with this key, in the file's order."""
        found = self._open()[1].execute("SELECT start, size FROM rows WHERE key = ? ORDER BY number", (key,))
        return [self._read(*row) for row in found.fetchall()]

    def distinct_keys(self) -> Iterator[str]:
        """Sorted."""
        return (key for (key,) in self._open()[1].execute("SELECT DISTINCT key FROM rows ORDER BY key"))

    def bad_rows(self) -> Iterator[str]:
        """Every skipped row: file, line, reason."""
        for line, reason in self._open()[1].execute("SELECT line, reason FROM bad ORDER BY line"):
            yield f"{self.path.name}:{line}: {reason}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())

    def _read(self, start: int, size: int) -> bytes:
        file = self._open()[2]
        file.seek(start)
        return file.read(size)

    def _one(self, sql: str, *values: object) -> Any:
        return self._open()[1].execute(sql, values).fetchone()

    def _open(self) -> tuple[int, sqlite3.Connection, BinaryIO]:
        """One connection and file position per thread, and anew in a forked child."""
        handle = getattr(self._local, "handle", None)
        if handle is None or handle[0] != os.getpid():
            connection = sqlite3.connect(f"{self._index.as_uri()}?mode=ro&immutable=1", uri=True)
            handle = self._local.handle = (os.getpid(), connection, self.path.open("rb"))
        return handle

    def _make(self, format: LineFormat, stamp: str) -> None:
        """Written aside and moved into place: several ranks may do this at once, and a kill leaves nothing half-made."""
        aside = self._index.with_name(f".{self._index.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            aside.unlink(missing_ok=True)
            _logger.info("indexing %s", self.path)
            with scratch_table(aside) as table:
                self._fill(table, format)
                table.execute("CREATE TABLE stamp AS SELECT ? AS text", (stamp,))
            aside.replace(self._index)
        except (OSError, sqlite3.OperationalError) as error:
            fix = "Name a folder for it: --index-dir."
            raise InputError(explain(f"index {self._index}", expected="to write it", got=error, fix=fix)) from error
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)

    def _fill(self, table: sqlite3.Connection, format: LineFormat) -> None:
        table.execute(
            "CREATE TABLE rows(number INTEGER PRIMARY KEY, key TEXT NOT NULL, start INTEGER, size INTEGER, line INTEGER)"
        )
        table.execute("CREATE TABLE bad(line INTEGER, reason TEXT)")
        if format.unique:
            table.execute("CREATE UNIQUE INDEX by_key ON rows(key)")
        start = number = 0
        with self.path.open("rb") as file:
            for line, data in enumerate(file, 1):
                if data.strip():
                    try:
                        row = (number, format.key(data), start, len(data), line)
                        table.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", row)
                        number += 1
                    except sqlite3.IntegrityError:
                        table.execute("INSERT INTO bad VALUES (?, ?)", (line, f"id {row[1]!r} a second time"))
                    except (ValueError, RecursionError) as error:
                        table.execute("INSERT INTO bad VALUES (?, ?)", (line, str(error)))
                start += len(data)
        if not format.unique:
            table.execute("CREATE INDEX by_key ON rows(key)")


@contextmanager
def scratch_table(path: Path | str) -> Iterator[sqlite3.Connection]:
    """An SQLite file filled in one transaction, without the journal that only a file to be kept through a crash needs."""
    table = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        table.executescript(f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-{_CACHE_KIB}; BEGIN;")
        yield table
        table.execute("COMMIT")
    finally:
        table.close()


def _stamp(path: Path, format: LineFormat) -> str:
    stat = path.stat()
    return f"{_VERSION} {format.name} {stat.st_size} {stat.st_mtime_ns}"


def _stored_stamp(index: Path) -> str | None:
    if not index.is_file():
        return None
    connection = sqlite3.connect(f"{index.as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        return str(connection.execute("SELECT text FROM stamp").fetchone()[0])
    except sqlite3.DatabaseError:  # cut off or no index at all: it is made anew
        return None
    finally:
        connection.close()
