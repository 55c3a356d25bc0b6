"""Every answer of a teacher, the moment it is there: one line appended to one file, which is all the state a run has.

A killed run loses at most the answers that were still on their way. A line without its end is what a kill left; it is cut off.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from retrv_r1_retriever.errors import InputError, RetrvR1Error, explain
from retrv_r1_training.traces import TeacherTrace


@dataclass(frozen=True, slots=True)
class Entry:
    """One answer about one query: admitted (`trace`) or not (`rejected`, a reason).

    number: 0 for the first answer about this query; text: the teacher's words as they came; tokens as the endpoint counted them
    """

    query_id: str
    number: int
    prompt_hash: str
    rejected: str | None = None
    text: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    trace: TeacherTrace | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What is known of one query: answers so far, whether one was admitted, and the hash of what was asked."""

    answers: int = 0
    admitted: bool = False
    prompt_hash: str = ""


class Journal:
    """An append-only file of entries, locked while open. sync: every line is on the disk before the next request goes out."""

    def __init__(self, path: Path, *, sync: bool) -> None:
        self.path, self._sync = path, sync
        self.states: dict[str, State] = {}
        self.rejected: Counter[str] = Counter()
        self.admitted = self.tokens_in = self.tokens_out = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        _lock(self._file, self.path)
        whole = 0
        for line, entry in _entries(self.path):
            whole += len(line)
            self._count(entry)
        self._file.truncate(whole)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def append(self, entry: Entry) -> None:
        assert self._file is not None, "use it in a with statement"
        data = asdict(replace(entry, trace=None)) | {"trace": entry.trace.to_dict() if entry.trace else None}
        self._file.write(json.dumps(data, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        if self._sync:
            os.fsync(self._file.fileno())
        self._count(entry)

    def traces(self) -> Iterator[TeacherTrace]:
        """The admitted ones, in the order they came."""
        return (entry.trace for _, entry in _entries(self.path) if entry.trace)

    def state(self, query_id: str) -> State:
        return self.states.get(query_id, State())

    def _count(self, entry: Entry) -> None:
        before = self.state(entry.query_id)
        admitted = before.admitted or entry.trace is not None
        self.states[entry.query_id] = State(before.answers + 1, admitted, entry.prompt_hash)
        self.admitted += entry.trace is not None
        self.tokens_in += entry.tokens_in
        self.tokens_out += entry.tokens_out
        if entry.rejected:
            self.rejected[entry.rejected] += 1


def _entries(path: Path) -> Iterator[tuple[bytes, Entry]]:
    """Whole lines only, with their bytes."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                data = json.loads(line)
                trace = TeacherTrace.from_dict(data.pop("trace")) if data["trace"] else data.pop("trace")
                yield line, Entry(**data, trace=trace)
            except (ValueError, KeyError, TypeError) as error:
                fix = "Remove the line; its query will be asked again."
                raise InputError(
                    explain(f"{path}:{number}", expected="an entry of a synthesize run", got=error, fix=fix)
                ) from None


def _lock(file: BinaryIO, path: Path) -> None:
    """Two runs on one journal would pay everything twice. The lock goes with the process, so a kill leaves none behind."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fix = "Wait for it, or pass another --out."
        raise RetrvR1Error(explain(str(path), expected="no other run on it", got="one at work", fix=fix)) from None
