"""The line index: any line by number or key, bad rows named, bounded memory, safe in workers."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from retrv_r1_retriever.errors import InputError
from retrv_r1_retriever.evaluation.mbeir import Pool
from retrv_r1_retriever.evaluation.offsets import LineFormat, LineIndex


def key(line: bytes) -> str:
    return str(json.loads(line)["id"])


UNIQUE = LineFormat("test", key)


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def ids(lines: LineIndex) -> list[str]:
    return [key(line) for line in lines]


def test_lines_by_number_and_key(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": "é"}, b"", {"id": "b", "text": "\u2028"}, {"id": "c"})
    lines = LineIndex(path, UNIQUE)
    assert len(lines) == 3
    assert json.loads(lines[1]) == {"id": "b", "text": "\u2028"}
    assert lines.find("é") == [lines[0]]
    assert lines.find("none") == []
    assert "c" in lines
    assert "d" not in lines
    with pytest.raises(IndexError):
        lines[3]


def test_bad_rows_are_named_counted_and_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": 1}, b"{cut", {"no": 1}, {"id": 1}, {"id": 2}, b"\xff")
    lines = LineIndex(
        path, LineFormat("test", lambda line: str(json.loads(line).get("id") or int("x"))), max_bad_share=0.9
    )
    assert ids(lines) == ["1", "2"]
    assert (lines.skipped.count, lines.skipped.total) == (4, 6)
    assert [text.split(": ")[0] for text in lines.bad_rows()] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:6"]
    assert "id '1' a second time" in list(lines.bad_rows())[2]


def test_too_many_bad_rows_are_fatal_also_from_a_kept_index(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"id": i} for i in range(8)), b"bad", b"worse")
    assert len(LineIndex(path, UNIQUE, max_bad_share=0.2)) == 8
    with pytest.raises(InputError, match=r"expected at most 10\.0% bad rows, got 2 of 10; a\.jsonl:9: "):
        LineIndex(path, UNIQUE, max_bad_share=0.1)


def test_keys_may_repeat_where_lines_are_judgements(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": 1, "n": 0}, {"id": 2, "n": 1}, {"id": 1, "n": 2})
    found = LineIndex(path, LineFormat("test", key, unique=False)).find("1")
    assert [json.loads(line)["n"] for line in found] == [0, 2]


def test_index_is_kept_and_made_anew_when_the_file_or_the_index_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", {"id": "a"})
    LineIndex(path, UNIQUE)
    made = []
    monkeypatch.setattr(LineIndex, "_fill", lambda self, *a, real=LineIndex._fill: made.append(1) or real(self, *a))
    assert ids(LineIndex(path, UNIQUE)) == ["a"]
    assert made == []
    write(path, {"id": "b"}, {"id": "c"})
    assert ids(LineIndex(path, UNIQUE)) == ["b", "c"]
    (index,) = (tmp_path / ".retrv").iterdir()
    index.write_bytes(index.read_bytes()[:100])
    assert ids(LineIndex(path, UNIQUE)) == ["b", "c"]
    assert made == [1, 1]
    elsewhere = LineIndex(path, UNIQUE, folder=tmp_path / "elsewhere")
    assert ids(elsewhere) == ["b", "c"]
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_an_index_that_cannot_be_written_says_what_to_do(tmp_path):
    path = write(tmp_path / "a.jsonl", {"id": "a"})
    (tmp_path / ".retrv").write_text("in the way")
    with pytest.raises(InputError, match="Name a folder for it: --index-dir"):
        LineIndex(path, UNIQUE)


def test_threads_pickles_and_forks_read_the_same_lines(tmp_path):
    lines = LineIndex(write(tmp_path / "a.jsonl", *({"id": i, "pad": "x" * i} for i in range(300))), UNIQUE)
    everything = ids(lines)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == everything for found in pool.map(lambda _: ids(lines), range(4)))
    assert ids(pickle.loads(pickle.dumps(lines))) == everything
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:  # a shared file position would mix the children's reads
            os._exit(0 if all(ids(lines) == everything for _ in range(5)) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


MEASURE = """
import resource, sys
from pathlib import Path
from retrv_r1_retriever.evaluation.mbeir import Pool
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
Pool(Path(sys.argv[1]))  # imports, caches
before = peak()
pool = Pool(Path(sys.argv[2]))
for number in range(0, len(pool), 97):
    assert pool.get(pool[number].id) is not None
print(len(pool), peak() - before)
"""


def test_memory_does_not_grow_with_the_pool(tmp_path):
    """120,000 candidates of 1 kB: a list of rows would take far more than 120 MB."""
    small = write(tmp_path / "small.jsonl", {"did": "9:0", "txt": "x", "img_path": None, "modality": "text"})
    large = tmp_path / "large.jsonl"
    with large.open("w") as file:
        for number in range(120_000):
            file.write(f'{{"did": "9:{number}", "txt": "{"word " * 190}", "img_path": null, "modality": "text"}}\n')
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], capture_output=True, text=True, check=True
    )
    rows, grown_mb = map(int, done.stdout.split())
    assert rows == 120_000
    assert large.stat().st_size > 110e6
    assert grown_mb < 50, "SQLite's cache is 32 MB at most"
    large.unlink()


def test_pool_rows(tmp_path):
    rows = [
        {"did": "1:a", "txt": "t", "img_path": None, "modality": "text", "src_content": "s"},
        {"did": "1:b", "txt": "", "img_path": "b.png", "modality": "image,text"},
        {"did": "1:c", "txt": None, "img_path": None, "modality": "text"},
        {"did": "1 d", "txt": "t"},
        {"did": "1:e", "txt": "t", "modality": "video"},
        ["no object"],
    ]
    with pytest.raises(InputError, match=r"got 4 of 6; pool\.jsonl:3: Content: expected a text"):
        Pool(write(tmp_path / "pool.jsonl", *rows))
