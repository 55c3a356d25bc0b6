"""TREC run and qrels files, the format every evaluation tool of this field reads.

run    <query> Q0 <document> <rank> <score> <tag>
qrels  <query> 0 <document> <grade>           (M-BEIR adds a task id as fifth column; it is ignored)

BEIR's own forms are read too: qrels with a header and three columns, runs as JSON {query: {document: score}}.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TextIO

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.metrics import MAX_GRADE
from retrv_r1_retriever.types import RankedResults

_LAYOUT = "query Q0 document rank score tag"


def write_run(path: Path, run: Mapping[str, Sequence[str]], tag: str) -> None:
    """Best first becomes rank 1; the score is -rank, so that tools which sort by score keep the order."""
    lines = (run_lines(q, ((d, -rank) for rank, d in enumerate(documents, 1)), tag) for q, documents in run.items())
    path.write_text("".join(chain.from_iterable(lines)), encoding="utf-8")  # all or nothing: an id may not be writable


def run_lines(query: str, scored: Iterable[tuple[str, float]], tag: str) -> Iterator[str]:
    """The lines of one query; `scored`: best first. Nine digits tell any two float32 apart: fewer would make ties of scores."""
    for rank, (document, score) in enumerate(scored, 1):
        yield f"{_field(query)} Q0 {_field(document)} {rank} {score:.9g} {_field(tag)}\n"


def read_run(path: Path) -> dict[str, list[str]]:
    """query -> documents by falling score. Ranks in the file are ignored, as trec_eval does.

    Equal scores keep the file's order, which is the one that whoever wrote it has seen; trec_eval orders them by falling document id.
    """
    return {query: [d for d, _ in pairs] for query, pairs in read_scored_run(path).items()}


def read_scored_run(path: Path) -> dict[str, list[tuple[str, float]]]:
    """query -> (document, score), best first. A document listed twice, or a score that is no number, is an `InputError`."""
    scored: dict[str, dict[str, float]] = {}
    for where, query, document, score in _judged_json(path) if _is_json(path) else _judged_lines(path):
        if document in scored.setdefault(query, {}):
            got = f"{document!r} a second time for query {query!r}"
            raise InputError(explain(where, expected="each document once per query", got=got, fix="Fix the run."))
        scored[query][document] = score
    return {query: sorted(pairs.items(), key=lambda pair: -pair[1]) for query, pairs in scored.items()}


def run_tag(path: Path) -> str:
    """Of the first line; empty for BEIR's JSON, which has none."""
    if _is_json(path):
        return ""
    return next((fields[5] for _, fields in _rows(path, 5, _LAYOUT) if len(fields) > 5), "")


def write_qrels(path: Path, qrels: Mapping[str, Mapping[str, int]]) -> None:
    lines = [f"{_field(q)} 0 {_field(d)} {grade}\n" for q, grades in qrels.items() for d, grade in grades.items()]
    path.write_text("".join(lines), encoding="utf-8")


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """query -> document -> grade. A grade that is no whole number, or two grades of one document, are an `InputError`."""
    qrels: dict[str, dict[str, int]] = {}
    with _opened(path) as file:
        beir = file.readline().split() == ["query-id", "corpus-id", "score"]
    columns, layout = (3, "query-id corpus-id score") if beir else (4, "query 0 document grade")
    for number, fields in _rows(path, columns, layout):
        if beir and number == 1:
            continue
        query, document, grade = fields[:3] if beir else (fields[0], fields[2], fields[3])
        value, where = _number(grade, f"{path}:{number}"), f"{path}:{number}"
        if not value.is_integer():
            raise InputError(explain(where, expected="a whole number as grade", got=grade, fix="Fix the line."))
        if value > MAX_GRADE:
            fix = "Scale the grades down: nDCG's gain is 2^grade - 1."
            raise InputError(explain(where, expected=f"a grade of at most {MAX_GRADE}", got=grade, fix=fix))
        if (known := qrels.setdefault(query, {}).setdefault(document, int(value))) != value:
            got = f"{document!r} of query {query!r} as {known} and {grade}"
            raise InputError(explain(where, expected="one grade per document", got=got, fix="Keep one of the lines."))
    return qrels


def run_of(results: Iterable[RankedResults]) -> dict[str, list[str]]:
    """Reranked lists as a run; queries need ids."""
    run: dict[str, list[str]] = {}
    for ranked in results:
        if ranked.query.id is None:
            raise InputError(explain("query", expected="an id", got="None", fix="Pass Query.of(..., id=...)."))
        run[ranked.query.id] = [result.document.id for result in ranked.results]
    return run


def _is_json(path: Path) -> bool:
    with _opened(path) as file:
        return file.read(64).lstrip().startswith("{")


def _judged_lines(path: Path) -> Iterator[tuple[str, str, str, float]]:
    # A line cut off inside its score would be read with another score, and the document stand at another place.
    width, where, fields = 0, "", [_LAYOUT] * 6
    for number, fields in _rows(path, 5, _LAYOUT):
        where = f"{path}:{number}"
        width = width or min(len(fields), 6)
        if len(fields) < width:
            raise _cut_off(where, fields, f"{width} columns as in the first line")
        yield where, fields[0], fields[2], _number(fields[4], where)
    if len(fields) == 5 and not _ends_in_newline(path):
        raise _cut_off(where, fields, "a newline behind the last score")


def _cut_off(where: str, fields: Sequence[str], expected: str) -> InputError:
    got = f"{' '.join(fields)!r}, which may be cut off"
    return InputError(explain(where, expected=expected, got=got, fix="Restore the file, or complete the line."))


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() in b"\r\n"


def _judged_json(path: Path) -> Iterator[tuple[str, str, str, float]]:
    with _opened(path) as file:
        try:
            queries = json.load(file)
            for query, scores in queries.items():
                for document, score in scores.items():
                    yield str(path), query, document, _number(score, f"{path}, query {query!r}")
        except (json.JSONDecodeError, AttributeError) as error:
            expected = "{query: {document: score}}"
            raise InputError(explain(str(path), expected=expected, got=error, fix="Fix the file.")) from None


def _rows(path: Path, columns: int, layout: str) -> Iterator[tuple[int, list[str]]]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if fields and len(fields) < columns:
                got = repr(line.rstrip())
                raise InputError(explain(f"{path}:{number}", expected=layout, got=got, fix="Fix the line."))
            if fields:
                yield number, fields


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except (OSError, UnicodeDecodeError) as error:
        expected = "a readable file, in UTF-8"
        raise InputError(explain(str(path), expected=expected, got=error, fix="Fix the path, or convert it.")) from None


def _number(text: object, where: str) -> float:
    try:
        number = float(str(text))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(explain(where, expected="a number", got=repr(text), fix="Fix the line.")) from None
    return number


def check_field(what: str, ids: str, text: str) -> None:
    """Raises `InputError` where a TREC file cannot hold `text`: columns are split at spaces, and UTF-8 has no half pairs."""
    if text.split() != [text]:
        fix = "Columns of a TREC file are split there. Rename it; a row without an id is named after file and line."
        raise InputError(explain(what, expected=f"{ids} without spaces", got=repr(text), fix=fix))
    try:
        text.encode()
    except UnicodeEncodeError:
        fix = "Rename it: half a surrogate pair cannot be written."
        raise InputError(explain(what, expected=f"{ids} in valid Unicode", got=repr(text), fix=fix)) from None


def _field(text: str) -> str:
    check_field("TREC file", "ids", text)
    return text
