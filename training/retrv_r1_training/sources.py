"""Rows of a table (Parquet, CSV, TSV, JSONL), one at a time, each with its place in the file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from retrv_r1_retriever.errors import InputError, explain, missing_extra

FORMATS = ("parquet", "csv", "tsv", "jsonl")
_PARQUET_BATCH = 256


@dataclass(frozen=True, slots=True)
class SourceRow:
    """where: file and line (Parquet: file and row); problem: why it is no row, with `values` empty then

    lines: of the file that the problem takes: a stray quote in CSV swallows every row up to the next quote
    """

    where: str
    values: Mapping[str, Any]
    problem: str | None = None
    lines: int = 1


def read_rows(source: str, columns: Sequence[str], format: str | None = None) -> Iterator[SourceRow]:
    """source: a path, or a URL that fsspec knows. Raises `InputError` for an unknown format, a column that is not there, and no rows."""
    suffix = Path(source).suffix.lstrip(".").lower()
    kind = format or ("jsonl" if suffix == "ndjson" else suffix)
    if kind not in FORMATS:
        fix = "Pass --format."
        raise InputError(explain(f"format of {source}", expected=f"one of {', '.join(FORMATS)}", got=kind, fix=fix))
    name = Path(source).name
    empty = True
    with _opened(source) as file:
        if kind == "parquet":
            rows = _parquet(file, name, columns)
        elif kind == "jsonl":
            rows = _jsonl(file, name, columns)
        else:
            rows = _csv(file, name, columns, "," if kind == "csv" else "\t")
        for row in rows:
            empty = False
            yield row
    if empty:
        raise InputError(explain(source, expected="rows", got="none", fix="Fill the table, or name another."))


def _parquet(file: IO[bytes], name: str, columns: Sequence[str]) -> Iterator[SourceRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "train") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise InputError(explain(name, expected="a Parquet file", got=error, fix="Pass --format.")) from error
    check_columns(name, columns, table.schema_arrow.names)
    number = 0
    for batch in table.iter_batches(batch_size=_PARQUET_BATCH, columns=list(columns)):
        for values in batch.to_pylist():
            number += 1
            yield SourceRow(f"{name}: row {number}", values)


def _csv(file: IO[bytes], name: str, columns: Sequence[str], delimiter: str) -> Iterator[SourceRow]:
    """An empty cell is no value. Bytes that are no UTF-8 make a bad row, not the end of the file. Raises `InputError` for a header
    that cannot be read."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InputError(
            explain(f"{name}:1", expected="names of columns", got=error, fix="Close the quote.")
        ) from error
    check_columns(name, columns, header)
    while True:
        before = reader.line_num
        where = f"{name}:{before + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            lines = reader.line_num - before
            got = f"{error} after {lines:,} lines"
            yield SourceRow(where, {}, explain("row", expected="CSV", got=got, fix="Close or double the quote."), lines)
            continue
        if cells is None:
            return
        if cells:
            yield _csv_row(where, header, cells, reader.line_num - before)


def _csv_row(where: str, header: Sequence[str], cells: Sequence[str], lines: int) -> SourceRow:
    if len(cells) != len(header):
        got = f"{len(cells)} in {lines:,} lines"
        return SourceRow(where, {}, explain("row", expected=f"{len(header)} cells", got=got, fix="Quote it."), lines)
    if not all(cell.isascii() or _is_utf8(cell) for cell in cells):
        return SourceRow(where, {}, explain("row", expected="UTF-8", got="other bytes", fix="Convert the file."))
    return SourceRow(where, {key: cell or None for key, cell in zip(header, cells, strict=True)})


def _jsonl(file: IO[bytes], name: str, columns: Sequence[str]) -> Iterator[SourceRow]:
    """A row may lack a column; a column that no row has is an error at the end."""
    unseen = set(columns)
    first: list[str] = []
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{name}:{number}"
            try:
                values = json.loads(line)
                json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair: JSON has it, UTF-8 has not
            except (ValueError, RecursionError) as error:
                yield SourceRow(where, {}, str(error))
                continue
            if not isinstance(values, dict):
                got = type(values).__name__
                yield SourceRow(where, {}, explain("row", expected="a JSON object", got=got, fix="Write {...}."))
                continue
            first = first or list(values)
            unseen -= values.keys()
            yield SourceRow(where, values)
    if unseen:
        check_columns(name, [c for c in columns if c in unseen], first)


def check_columns(name: str, wanted: Sequence[str], found: Sequence[str]) -> None:
    twice = [column for column in wanted if found.count(column) > 1]
    if twice:
        fix = "Rename one of them."
        raise InputError(explain(f"{name}: column {twice[0]!r}", expected="one of that name", got="several", fix=fix))
    missing = [column for column in wanted if column not in found]
    if missing:
        fix = "Fix the mapping: columns are never guessed."
        raise InputError(
            explain(f"{name}: column {missing[0]!r}", expected=f"one of {list(found)}", got="none", fix=fix)
        )


def _is_utf8(cell: str) -> bool:
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    try:
        opened = fsspec().open(source, "rb") if "://" in source else Path(source).open("rb")  # noqa: SIM115
        file = opened.__enter__()
    except OSError as error:
        raise InputError(explain(source, expected="a readable file", got=error, fix="Fix the path.")) from error
    try:
        yield file
    finally:
        opened.__exit__(None, None, None)


def fsspec() -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise missing_extra("fsspec", "train") from error
    return fsspec
