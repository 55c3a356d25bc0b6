"""Thoughts to train on, one JSON line each: what a teacher wrote about one query and its candidates, in the grammar of the session.

A line (version 1):

    {"trace_version": 1, "query_id": "90:7", "candidates": ["90:3", "90:5"], "hypothesis": "two red circle",
     "verdicts": [[0, "no red"], [1, "keep"]], "checks": [[1, "a4 yes match"]], "answer": "90:5",
     "teacher": "qwen2.5-vl-72b", "licence": "...", "prompt_hash": "..."}

The numbers in `verdicts` and `checks` are places in `candidates`; `answer` is an id of these, or null for `<|none|>`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.parser import Check, Thought, Verdict, render
from retrv_r1_retriever.prompt import DIFFERS, MATCH, NONE_INDEX
from retrv_r1_retriever.trace import Segment

TRACE_VERSION = 1


@dataclass(frozen=True, slots=True)
class TeacherTrace:
    """One admitted thought: a session has replayed it to a right answer.

    candidates: ids in the order of the prompt; `thought` speaks of them by place
    teacher: who wrote it; licence: of the teacher's output, carried into the model card ("" = unknown)
    prompt_hash: of what the teacher was shown and asked
    """

    query_id: str
    candidates: tuple[str, ...]
    thought: Thought
    teacher: str
    licence: str
    prompt_hash: str

    @property
    def answer(self) -> str | None:
        """Id of the answer; None means that none of the candidates answers the query."""
        index = self.thought.answer
        return None if index is None or index == NONE_INDEX else self.candidates[index]

    @property
    def turn(self) -> tuple[Segment, ...]:
        """The model's turn to train on; `Full` segments are without content, which the trainer fills in."""
        return render(self.thought)

    def to_dict(self) -> dict[str, Any]:
        return {
            "trace_version": TRACE_VERSION,
            "query_id": self.query_id,
            "candidates": list(self.candidates),
            "hypothesis": self.thought.hypothesis,
            "verdicts": [[v.index, v.text] for v in self.thought.verdicts],
            "checks": [[c.index, c.text] for c in self.thought.checks],
            "answer": self.answer,
            "teacher": self.teacher,
            "licence": self.licence,
            "prompt_hash": self.prompt_hash,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TeacherTrace:
        """Raises `InputError`: a missing field, another version, a place or an answer outside `candidates`."""
        try:
            if data["trace_version"] != TRACE_VERSION:
                raise InputError(
                    explain("trace_version", expected=TRACE_VERSION, got=data["trace_version"],
                            fix="Read it with the release that wrote it.")
                )  # fmt: skip
            candidates = tuple(map(str, data["candidates"]))
            answer = NONE_INDEX if data["answer"] is None else candidates.index(data["answer"])
            verdicts = tuple(Verdict(_place(i, candidates), str(text)) for i, text in data["verdicts"])
            checks = tuple(_check(_place(i, candidates), str(text)) for i, text in data["checks"])
            thought = Thought(data["hypothesis"], verdicts, checks, answer)
            return cls(data["query_id"], candidates, thought, data["teacher"], data["licence"], data["prompt_hash"])
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"
            raise InputError(explain("trace", expected="a trace of version 1", got=got, fix="Fix the line.")) from None


def write_traces(path: Path, traces: Iterable[TeacherTrace]) -> int:
    """Whole file or none: written beside and moved into place. Returns the number of traces."""
    count = 0
    beside = path.with_suffix(".tmp")
    with beside.open("w", encoding="utf-8") as file:
        for trace in traces:
            count += 1
            file.write(json.dumps(trace.to_dict(), ensure_ascii=False) + "\n")
    os.replace(beside, path)
    return count


def read_traces(path: Path) -> Iterator[TeacherTrace]:
    """Line by line. Raises `InputError` naming file and line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                data = json.loads(line)
                if not isinstance(data, dict):
                    raise InputError(
                        explain("line", expected="a JSON object", got=type(data).__name__, fix="Fix the line.")
                    )
                yield TeacherTrace.from_dict(data)
            except ValueError as error:  # our InputError is one, and so is what json raises
                raise InputError(f"{path}:{number}: {error}") from None


def _place(index: object, candidates: tuple[str, ...]) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(candidates):
        raise InputError(explain("place", expected=f"0 to {len(candidates) - 1}", got=index, fix="Fix the line."))
    return index


def _check(index: int, text: str) -> Check:
    last = text.rsplit(maxsplit=1)[-1] if text.strip() else ""
    return Check(index, text, {MATCH: True, DIFFERS: False}.get(last))
