"""One line per query, appended when it is done: a killed evaluation goes on where it was.

The first line names the settings. Settings are also part of the file's name, so that results of two settings cannot mix.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import InputError, explain

_EDGE = 1 << 20


class Journal:
    """`folder/<name>.<digest of the settings>.jsonl`; rows are JSON objects with a key `query`.

    A line without its end is what a kill left: it is cut off. Any other line that cannot be read is an `InputError`.
    check: raises `ValueError`, `KeyError` or `TypeError` for a row that is not of this journal
    """

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], check: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._check_row = check
        self.settings = json.loads(json.dumps(settings, sort_keys=True))
        self.path = folder / f"{name}.{digest_of(self.settings)}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        whole = self._check() if self.path.exists() else 0
        if whole == 0:
            self.path.write_text(json.dumps({"settings": self.settings}, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            os.truncate(self.path, whole)
        self._places: dict[str, int] = {}  # query -> where its line begins
        for place, row in self._placed():
            self._places[row["query"]] = place

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, query: object) -> bool:
        return query in self._places

    def get(self, query: str) -> dict[str, Any]:
        """Raises `KeyError`."""
        with self.path.open("rb") as file:
            file.seek(self._places[query])
            row: dict[str, Any] = json.loads(file.readline())
        return row

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """On the disk when this returns."""
        with self.path.open("ab") as file:
            for row in rows:
                self._places[row["query"]] = file.tell()
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> Iterator[dict[str, Any]]:
        return (row for _, row in self._placed())

    def _placed(self) -> Iterator[tuple[int, dict[str, Any]]]:
        seen: set[str] = set()
        with self.path.open("rb") as file:
            place = len(file.readline())
            for number, line in enumerate(file, 2):
                row = self._parsed(line, number)
                if (
                    row["query"] in seen
                ):  # as two evaluations would write at once; it would count twice in every average
                    got, fix = f"{row['query']!r} a second time", "Remove the line."
                    where = f"{self.path}:{number}"
                    raise InputError(explain(where, expected="each query once", got=got, fix=fix))
                seen.add(row["query"])
                yield place, row
                place += len(line)

    def _check(self) -> int:
        """Bytes of whole lines. The settings must be ours."""
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                if number == 1 and self._parsed(line, number).get("settings") != self.settings:
                    fix = "Delete the file: its results are of other settings."
                    raise InputError(explain(f"{self.path}:1", expected="our settings", got="others", fix=fix))
                whole += len(line)
        return whole

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or (number > 1 and not isinstance(row.get("query"), str)):
                raise ValueError("no object with a query")
            if number > 1:
                self._check_row(row)
        except (ValueError, KeyError, TypeError) as error:
            fix = "Remove the line; its query is done again."
            got = f"one without {error}" if isinstance(error, KeyError) else error
            raise InputError(explain(f"{self.path}:{number}", expected="a row", got=got, fix=fix)) from None
        return row


def digest_of(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def fingerprint(path: Path) -> str:
    """Tells files apart without reading gigabytes: size, time of the last change, first and last megabyte."""
    stat = path.stat()
    size = stat.st_size
    with path.open("rb") as file:
        head = file.read(_EDGE)
        file.seek(max(0, size - _EDGE))
        tail = file.read(_EDGE)
    return hashlib.blake2b(b"%d %d " % (size, stat.st_mtime_ns) + head + tail, digest_size=8).hexdigest()
