"""Traces on disk: one JSON object per line and call, written while calls run and read again for a report."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.measures import reason_label
from retrv_r1_retriever.observe import Found, Step, Tell
from retrv_r1_retriever.plain import artifact
from retrv_r1_retriever.trace import ReasoningTrace, Text, strict_json
from retrv_r1_retriever.types import (
    Candidate,
    Content,
    Document,
    Query,
    RankedResult,
    RankedResults,
    Signals,
    Status,
)

log = logging.getLogger(__name__)

RECORD_VERSION = 1
REDACTED = "(redacted)"
_NOT_STORED = "(not stored)"
_BARE = "a trace without its result list: the answer is shown first, the others as they stood in the prompt"


class TraceLog:
    """For `RetrvR1Retriever(observers=(TraceLog(path),))`: appends a line per ranked list; a file it makes is its owner's only.

    redact: leave out what was asked, found and thought: ids, scores, ranks, states, counts and timings stay
    A line that cannot be written is logged; it never fails a call. Pictures are kept as references (paths, URLs), never as bytes.
    """

    def __init__(self, path: str | os.PathLike[str], *, redact: bool = False) -> None:
        self.path, self.redact = Path(path), redact

    @contextmanager
    def watch(self, step: Step) -> Iterator[Tell]:
        yield self._write if step.outermost else _pass_over

    def _write(self, found: Found) -> None:
        if not isinstance(found, RankedResults):
            return
        try:
            line = (to_line(redacted(found) if self.redact else found) + "\n").encode()
            # Opened per line, so that the file may be rotated; one write per line, so that processes may share it.
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(file, line)
            finally:
                os.close(file)
        except (OSError, ValueError, TypeError) as error:
            log.warning("a trace could not be written to %s: %s", self.path, error)


def _pass_over(found: Found) -> None:
    pass


def to_line(results: RankedResults) -> str:
    written = datetime.now(UTC).isoformat(timespec="milliseconds")
    record = {"record_version": RECORD_VERSION, "time": written, **artifact(results)}
    return strict_json(record, default=str)


def redacted(results: RankedResults) -> RankedResults:
    """The same list without a word or picture of query, documents and model; also in `reason`, which may quote them."""
    nothing = Content(REDACTED)
    return replace(
        results,
        query=Query(nothing, id=results.query.id),
        results=tuple(
            replace(
                r,
                candidate=replace(r.candidate, document=Document(r.document.id, nothing)),
                signals=replace(r.signals, verdict=None),
            )
            for r in results.results
        ),
        reason=results.reason and reason_label(results.reason),
        trace=results.trace and results.trace.redacted(),
    )


def read_traces(path: Path) -> Iterator[RankedResults]:
    """What a `TraceLog` wrote, an adapter's artifact or `ReasoningTrace.to_json`, one per line or one alone in its file.

    Raises `InputError` naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(explain(str(path), expected="a file of traces", got=error, fix="Fix the path.")) from None
    for number, line in _documents(text):
        try:
            yield from_record(json.loads(line))
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            got = f"{type(error).__name__}: {error}"
            fix = "Pass a file that [observe] traces or --traces wrote."
            raise InputError(explain(f"{path}:{number}", expected="a trace as JSON", got=got, fix=fix)) from None


def _documents(text: str) -> Iterator[tuple[int, str]]:
    try:
        json.loads(text)
    except ValueError:
        yield from ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    else:
        yield 1, text


def from_record(record: Mapping[str, Any]) -> RankedResults:
    """The ranked list of a record. Raises `InputError` for one of a newer version, and what a broken one raises."""
    version = record.get("record_version", RECORD_VERSION)
    if version != RECORD_VERSION:
        fix = "Read it with the release that wrote it, or a newer one."
        raise InputError(explain("record_version", expected=RECORD_VERSION, got=version, fix=fix))
    if "trace_version" in record:
        return _of_bare_trace(ReasoningTrace.from_json(json.dumps(record)))
    query = record["query"]
    return RankedResults(
        query=Query(_content(query), query["instruction"], query["id"]),
        results=tuple(_result(row) for row in record["results"]),
        status=Status(record["status"]),
        none_chosen=record["none_chosen"],
        reason=record["reason"],
        unranked=tuple(record["unranked"]),
        trace=None if record["trace"] is None else ReasoningTrace.from_json(json.dumps(record["trace"])),
    )


def _result(row: Mapping[str, Any]) -> RankedResult:
    signals = Signals(row["keep_logprob"], row["slot_logprob"], row["verdict"], row["opened"], row["match"])
    document = Document(row["id"], _content(row), row["metadata"])
    candidate = Candidate(document, row["retrieval_score"], row["retrieval_rank"])
    return RankedResult(candidate, row["rank"], row["score"], row["selected"], signals)


def _content(row: Mapping[str, Any]) -> Content:
    """A picture that was given as bytes was not stored, and may leave nothing."""
    return Content(row["text"], row["image"]) if row["text"] or row["image"] else Content(_NOT_STORED)


def _of_bare_trace(trace: ReasoningTrace) -> RankedResults:
    asked = "".join(s.text for s in trace.segments if isinstance(s, Text) and s.query).strip()
    places = sorted(range(len(trace.candidates)), key=lambda place: place != trace.answer)
    results = tuple(
        RankedResult(
            Candidate(Document(trace.candidates[place], Content(_NOT_STORED)), None, place + 1),
            rank,
            None,
            selected=place == trace.answer,
            signals=Signals(opened=place in trace.inspected),
        )
        for rank, place in enumerate(places, 1)
    )
    return RankedResults(Query.of(asked or _NOT_STORED), results, Status.PARTIAL, reason=_BARE, trace=trace)
