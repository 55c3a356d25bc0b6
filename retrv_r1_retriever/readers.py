"""Documents from files. A row that is no document comes as an `IndexFailure` naming file and line, and does not end the stream.

Picture paths are kept as they stand in the file, relative to the root given to `LocalImages`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from retrv_r1_retriever.errors import InputError, explain
from retrv_r1_retriever.indexing import IndexFailure, Row
from retrv_r1_retriever.types import Content, Document

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[Row]:
    """One document a line: {"id", "text", "image", ...}; text or image may be missing, the rest is metadata."""
    return _rows(Path(path), _plain_document)


def read_mbeir(path: str | os.PathLike[str]) -> Iterator[Row]:
    """An M-BEIR candidate pool: {"did", "txt", "img_path", "modality", "src_content"} a line."""
    return _rows(Path(path), mbeir_document)


def read_folder(root: str | os.PathLike[str]) -> Iterator[Row]:
    """Pictures and .txt files below `root`, in order of their names; same folder and stem = one document with both.

    The id is the path below `root` without its suffix. Hidden files, other suffixes and linked folders are passed over.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(explain("read_folder", expected="a folder", got=str(root), fix="Fix the path."))
    return _folder_rows(root)


def _folder_rows(root: Path) -> Iterator[Row]:
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=unreadable.append):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        stems: dict[str, list[Path]] = {}
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES | {".txt"}:
                stems.setdefault(path.stem, []).append(path.relative_to(root))
        for paths in stems.values():
            yield _folder_document(root, paths)
    for error in unreadable:
        where = str(error.filename)
        reason = explain(where, expected="a folder that can be read", got=error.strerror, fix="Check its permissions.")
        yield IndexFailure(where, reason)


def _folder_document(root: Path, paths: list[Path]) -> Row:
    id = paths[0].with_suffix("").as_posix()
    images = [path for path in paths if path.suffix.lower() != ".txt"]
    texts = [path for path in paths if path.suffix.lower() == ".txt"]
    if len(images) > 1 or len(texts) > 1:
        names = ", ".join(path.name for path in paths)
        return IndexFailure(id, explain(id, expected="one picture and one text", got=names, fix="Rename one of them."))
    try:
        text = (root / texts[0]).read_text("utf-8-sig").strip() if texts else None
        return Document(id, Content(text or None, images[0].as_posix() if images else None))
    except InputError as error:
        return IndexFailure(id, f"{texts[0] if texts else id}: {error}")
    except (OSError, ValueError) as error:
        return IndexFailure(id, explain(str(texts[0]), expected="a text in UTF-8", got=error, fix="Save it as UTF-8."))


def _rows(path: Path, document: Callable[[dict[str, Any]], Document]) -> Iterator[Row]:
    try:
        file = path.open("rb")  # here and not at the first item: a wrong path is the caller's error, not a row's
    except OSError as error:
        raise InputError(explain(str(path), expected="a readable file", got=error, fix="Fix the path.")) from error

    def rows() -> Iterator[Row]:
        with file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _row(line, f"{path.name}:{number}", document)

    return rows()


def _row(line: bytes, where: str, document: Callable[[dict[str, Any]], Document]) -> Row:
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise InputError(explain("row", expected="a JSON object", got=type(values).__name__, fix="Write {...}."))
        return document(values)
    except InputError as error:
        return IndexFailure(where, f"{where}: {error}")
    except (ValueError, RecursionError) as error:
        got = str(error).replace("line 1 column", "column")  # json counts from the row it was given
        return IndexFailure(where, explain(where, expected="a row of JSON", got=got, fix="Mend or remove the row."))


def _plain_document(values: dict[str, Any]) -> Document:
    metadata = {name: value for name, value in values.items() if name not in ("id", "text", "image")}
    return Document(_id(values, "id"), Content(_text(values, "text"), _text(values, "image")), metadata)


def mbeir_document(values: dict[str, Any]) -> Document:
    """One row of an M-BEIR pool. Raises `InputError`."""
    metadata = {name: values[name] for name in ("modality", "src_content") if values.get(name) is not None}
    return Document(_id(values, "did"), Content(_text(values, "txt"), _text(values, "img_path")), metadata)


def _id(values: dict[str, Any], name: str) -> str:
    id = values.get(name)
    if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
        raise InputError(
            explain(f"field {name!r}", expected="a string or a number", got=repr(id), fix="Give every row one.")
        )
    return str(id)


def _text(values: dict[str, Any], name: str) -> str | None:
    text = values.get(name)
    if text is not None and not isinstance(text, str):
        raise InputError(
            explain(f"field {name!r}", expected="a string or null", got=type(text).__name__, fix="Convert it.")
        )
    return text or None
