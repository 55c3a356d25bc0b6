from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from retrv_r1_retriever.errors import InputError
from retrv_r1_retriever.indexing import IndexFailure
from retrv_r1_retriever.readers import read_folder, read_jsonl, read_mbeir
from retrv_r1_retriever.types import Content, Document

from .conftest import png


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def test_jsonl(tmp_path: Path) -> None:
    path = write(
        tmp_path / "docs.jsonl",
        {"id": "a", "text": "t", "image": "p/1.png", "colour": "red", "n": {"x": 1}},
        b"",
        {"id": 7, "text": "seven"},
        {"id": "c", "text": "", "image": "only.png"},
    )
    assert list(read_jsonl(path)) == [
        Document("a", Content("t", "p/1.png"), {"colour": "red", "n": {"x": 1}}),
        Document("7", Content("seven")),
        Document("c", Content(None, "only.png")),
    ]


def test_mbeir(tmp_path: Path) -> None:
    path = write(
        tmp_path / "cand.jsonl",
        {"did": "9:1", "txt": "a dog", "img_path": "mbeir_images/1.jpg", "modality": "image,text", "src_content": None},
        {"did": "9:2", "txt": None, "img_path": "mbeir_images/2.jpg", "modality": "image", "src_content": "wiki"},
        {"did": "9:3", "txt": "text", "img_path": None, "modality": "text"},
    )
    assert list(read_mbeir(path)) == [
        Document("9:1", Content("a dog", "mbeir_images/1.jpg"), {"modality": "image,text"}),
        Document("9:2", Content(None, "mbeir_images/2.jpg"), {"modality": "image", "src_content": "wiki"}),
        Document("9:3", Content("text"), {"modality": "text"}),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"id": "a",', "Expecting property name"),
        (b"\xff\xfe", "decode|utf"),
        (b"[" * 100_000, "recursion|Expecting"),
        ([1], "expected a JSON object, got list"),
        ({"text": "t"}, "field 'id': expected a string or a number, got None"),
        ({"id": True, "text": "t"}, "field 'id'"),
        ({"id": "a"}, "Content: expected a text, an image or both"),
        ({"id": "a", "text": ["t"]}, "field 'text': expected a string or null, got list"),
        ({"id": "a", "image": 3}, "field 'image'"),
    ],
)
def test_a_bad_row_is_named_and_the_next_one_read(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "docs.jsonl", {"id": "ok", "text": "t"}, row, {"id": "next", "text": "t"})
    first, bad, last = read_jsonl(path)
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert isinstance(bad, IndexFailure)
    assert bad.id == "docs.jsonl:2"
    with pytest.raises(InputError, match=reason):
        raise InputError(bad.reason)


def test_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", ".hidden.png", ".git/x.png", "sub/two.png", "sub/two.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (tmp_path / "b.txt").write_text(" about b \n")
    (tmp_path / "only.txt").write_text("only text")
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "notes.md").write_text("passed over")
    rows = {row.id: row for row in read_folder(tmp_path)}
    assert list(rows) == ["a", "b", "empty", "latin", "only", "sub/c", "sub/two"]
    assert rows["b"] == Document("b", Content("about b", "b.png"))
    assert rows["a"] == Document("a", Content(None, "a.JPG"))
    assert rows["only"] == Document("only", Content("only text"))
    assert rows["sub/c"] == Document("sub/c", Content(None, "sub/c.webp"))
    failed = {id: row.reason for id, row in rows.items() if isinstance(row, IndexFailure)}
    assert set(failed) == {"empty", "latin", "sub/two"}
    assert failed["latin"].startswith("latin.txt: expected a text in UTF-8, got 'utf-8' codec")
    assert "empty.txt" in failed["empty"]
    assert "expected one picture and one text, got two.jpg, two.png" in failed["sub/two"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.txt", "locked/2.txt", "z/3.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("text")
    scan = os.scandir

    def guarded(path: Any) -> Any:
        if Path(path).name == "locked":  # a test may run as root, who may read everything
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", guarded)
    first, second, failure = read_folder(tmp_path)
    assert [first.id, second.id] == ["a/1", "z/3"]
    assert isinstance(failure, IndexFailure)
    assert failure.reason == (
        f"{tmp_path / 'locked'}: expected a folder that can be read, got Permission denied. Check its permissions."
    )


@pytest.mark.parametrize("reader", [read_jsonl, read_mbeir, read_folder])
def test_a_wrong_path_is_said_at_once(tmp_path: Path, reader: Any) -> None:
    with pytest.raises(InputError, match=r"expected a (readable file|folder), got .*nope"):
        reader(tmp_path / "nope")
