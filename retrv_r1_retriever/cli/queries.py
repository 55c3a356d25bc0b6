"""A user's own queries from a file: JSONL, CSV, M-BEIR's and BEIR's query files; with right answers, or without any."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrv_r1_retriever.cli.search import read_picture
from retrv_r1_retriever.config import Config
from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.evaluation.runs import read_qrels
from retrv_r1_retriever.images import is_data_uri
from retrv_r1_retriever.types import ImageInput, Query

SEPARATOR = "|"  # between the right answers in a CSV cell

#: Our names of a query's fields, then M-BEIR's and BEIR's.
_NAMES = {"id": ("id", "qid", "_id"), "text": ("text", "query_txt"), "image": ("image", "query_img_path"),
          "instruction": ("instruction",), "positives": ("positives", "pos_cand_list")}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """A query with an id. grades: right answer -> grade above 0; empty = not labelled"""

    query: Query
    grades: Mapping[str, int] = field(default_factory=dict)


def read_queries(
    path: Path, config: Config, *, qrels: Path | None = None, limit: int | None = None
) -> tuple[list[Asked], int, list[str]]:
    """All of them labelled, or none; how many were left out because `qrels` do not judge them; and whom these judge, but nobody asks.

    qrels: judgements in place of the rows' own. Raises `InputError` naming file and line: a measurement over the readable part would
    be another measurement.
    """
    given = read_qrels(qrels) if qrels else None
    asked: dict[str, Asked] = {}
    unjudged: set[str] = set()
    for where, row in _rows(path):
        try:
            one = _asked(row, where, path.parent, config)
        except (ValueError, AttributeError, TypeError) as error:  # our InputError is a ValueError
            raise InputError(f"{where}: {error}") from None
        id = one.query.id or ""
        if id in asked or id in unjudged:
            raise InputError(explain(where, expected="distinct ids", got=f"{id!r} a second time", fix="Rename one."))
        if given is not None:
            one = Asked(one.query, {did: grade for did, grade in given.get(id, {}).items() if grade > 0})
        if given is None or one.grades:
            asked[id] = one
        else:
            unjudged.add(id)
    if not asked:
        expected = "at least one query" + (f" that {qrels} judges" if qrels else "")
        raise InputError(explain(str(path), expected=expected, got="none", fix="Write one per line."))
    chosen = list(asked.values())[:limit]
    bare = [one.query.id for one in chosen if not one.grades]
    if 0 < len(bare) < len(chosen):
        got = f"{len(bare)} of {len(chosen)} queries without positives (first: {bare[0]!r})"
        raise InputError(explain(str(path), expected="right answers for all or none", got=got, fix="Add or drop them."))
    answered = (id for id, grades in (given or {}).items() if any(grade > 0 for grade in grades.values()))
    return chosen, len(unjudged), [id for id in answered if id not in asked]  # those beyond `limit` are there


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        expected = "a JSONL or CSV of queries"
        raise InputError(explain(str(path), expected=expected, got=error, fix="Fix the path.")) from None
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 inside a string
        if line.strip():
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                where, fix = f"{path.name}:{number}", "Fix or remove the line."
                raise InputError(explain(where, expected="a JSON object", got=error, fix=fix)) from None


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for values in reader:
        where = f"{path.name}:{reader.line_num}"
        if None in values or None in values.values():
            expected = f"{len(reader.fieldnames or ())} cells"
            raise InputError(explain(where, expected=expected, got="another number", fix="Quote cells with commas."))
        row: dict[str, Any] = {name: cell or None for name, cell in values.items()}
        if row.get("positives"):
            row["positives"] = [id for part in row["positives"].split(SEPARATOR) if (id := part.strip())]
        yield where, row


def _asked(row: Any, where: str, folder: Path, config: Config) -> Asked:
    if not isinstance(row, dict):
        raise InputError(explain("row", expected="a JSON object", got=type(row).__name__, fix="Write {...}."))
    _check_names(row)
    values = {ours: next((row[n] for n in names if row.get(n) is not None), None) for ours, names in _NAMES.items()}
    positives = values["positives"]
    if positives is not None and not isinstance(positives, list):
        raise InputError(explain("positives", expected="a list of document ids", got=repr(positives), fix="Fix it."))
    image = None if values["image"] is None else _picture(values["image"], folder, config)
    id = where if values["id"] is None else str(values["id"])
    query = Query.of(values["text"], image, values["instruction"], id)
    return Asked(query, dict.fromkeys(map(str, positives or ()), 1))


def _check_names(row: Mapping[str, Any]) -> None:
    """A field that differs from a known one by case, spaces or a plural s, and would be passed over as metadata."""
    for names in _NAMES.values():
        alike = {_bare(name): name for name in names}
        meant = [name for name in row if name not in names and _bare(name) in alike]
        if meant and not any(name in row for name in names):
            expected, fix = repr(alike[_bare(meant[0])]), "Rename it: otherwise it would not be read."
            raise InputError(explain("field", expected=expected, got=repr(meant[0]), fix=fix))


def _bare(name: str) -> str:
    return name.strip().lower().rstrip("s")


def _picture(image: str, folder: Path, config: Config) -> ImageInput:
    """A data URI, a file below the images' root, or one beside the queries."""
    if is_data_uri(image) or (config.path(config.images.root) / image).is_file():
        return image
    beside = (folder / image).resolve()
    if not beside.is_relative_to(
        folder.resolve()
    ):  # the file may be somebody else's: it names no picture just anywhere
        expected = "a file below [images] root or beside the queries"
        raise InputError(explain(f"image {image}", expected=expected, got=f"{beside}, outside both", fix="Move it."))
    return read_picture(beside)
