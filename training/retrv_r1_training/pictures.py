"""Pictures of a data set to be converted: taken from a folder, an fsspec URL, a tar file or the table itself, put below the output."""

from __future__ import annotations

import io
import sqlite3
import tarfile
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeAlias
from urllib.parse import quote

from PIL import Image

from retrv_r1_retriever.errors import ImageError, InputError, explain
from retrv_r1_retriever.evaluation.offsets import scratch_table
from retrv_r1_retriever.images import FORMATS
from retrv_r1_training.sources import fsspec

#: The bytes of the picture with this name (relative, no ".."). Raises `ImageError` or `OSError`; called from several threads.
ReadPicture: TypeAlias = Callable[[str], bytes]

_SUFFIXES = {"JPEG": "jpg", "TIFF": "tif"}


class Pictures:
    """Checks and copies pictures into `out/mbeir_images/<name>/`.

    source: a folder, a .tar file or an fsspec URL that names in the table are relative to; None = the table holds the bytes
    A picture that lies below `out` already stays where it is.
    """

    def __init__(self, source: str | None, out: Path, name: str) -> None:
        self.out, self.folder = out.resolve(), out.resolve() / "mbeir_images" / name
        self.source = source
        local = source is not None and "://" not in source and not source.endswith(".tar")
        self.root = Path(source).resolve() if local and source is not None else None
        self._read = None if source is None else _reader(source)

    def save(self, picture: object, id: str) -> str:
        """The path to write into the row, relative to the output. Raises `ImageError`."""
        if isinstance(picture, dict) and isinstance(picture.get("bytes"), bytes):  # a picture column of `datasets`
            picture = picture["bytes"]
        if isinstance(picture, bytes):
            return self._write(picture, quote(id, safe="") + "." + _suffix(picture, id))
        if not isinstance(picture, str):
            raise _refused(picture, "a path, or bytes", type(picture).__name__, "Convert the column.")
        if self._read is None:
            raise _refused(picture, "bytes in the table", "a name", "Say where the pictures are: --images.")
        name = self._relative(picture)
        if self.root is not None and (self.root / name).resolve().is_relative_to(self.out):
            path = (self.root / name).resolve()
            _suffix(self._bytes(name), picture)
            return path.relative_to(self.out).as_posix()
        data = self._bytes(name)
        _suffix(data, picture)
        return self._write(data, name)

    def _relative(self, picture: str) -> str:
        """The name below the source; whole paths and URLs must begin with it."""
        prefix = "" if self.source is None else (str(self.root) if self.root else self.source).rstrip("/") + "/"
        name = picture.removeprefix(prefix)
        parts = PurePosixPath(name).parts
        if "://" in name or not parts or parts[0] == "/" or ".." in parts or "\\" in name:
            raise _refused(picture, f"a path below {self.source}", "one outside", "Fix the row, or --images.")
        return str(PurePosixPath(name))

    def _bytes(self, name: str) -> bytes:
        assert self._read is not None
        try:
            return self._read(name)
        except Exception as error:  # every fsspec file system has its own errors
            got = "no such file" if isinstance(error, FileNotFoundError) else error
            raise _refused(name, f"a picture in {self.source}", got, "Fix the row, or --images.") from error

    def _write(self, data: bytes, name: str) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path.relative_to(self.out).as_posix()


def _reader(source: str) -> ReadPicture:
    if "://" in source:
        filesystem, path = fsspec().core.url_to_fs(source)
        return lambda name: filesystem.cat_file(f"{path.rstrip('/')}/{name}" if path else name)
    if source.endswith(".tar"):
        return _TarFile(Path(source))
    root = Path(source).resolve()
    if not root.is_dir():
        fix = "A folder, a .tar file or a URL; unpack compressed tar files first."
        raise InputError(explain(f"--images {source}", expected="a folder", got="none", fix=fix))
    return lambda name: (root / name).read_bytes()


class _TarFile:
    """Members by name without unpacking: a table of their offsets, since a tar file has none, and millions fit no list."""

    def __init__(self, path: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="retrv-tar-")  # removed with this object
        index = Path(self._folder.name, "members.sqlite")
        try:
            with scratch_table(index) as table, tarfile.open(path, "r:") as archive:
                table.execute("CREATE TABLE members(name TEXT PRIMARY KEY, start INTEGER, size INTEGER)")
                for member in archive:
                    if member.isfile():
                        row = (str(PurePosixPath(member.name)), member.offset_data, member.size)
                        table.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?)", row)
                    archive.members = []  # type: ignore[attr-defined]  # tarfile would keep them all; no public name
            self._table = sqlite3.connect(index, check_same_thread=False)
            self._file = path.open("rb")
        except (OSError, tarfile.TarError) as error:
            fix = "Uncompressed tar only: gunzip it first."
            raise InputError(explain(f"--images {path}", expected="a tar file", got=error, fix=fix)) from error
        self._lock = threading.Lock()

    def __call__(self, name: str) -> bytes:
        with self._lock:
            row = self._table.execute("SELECT start, size FROM members WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise FileNotFoundError(f"no member {name}")
            self._file.seek(row[0])
            return self._file.read(row[1])


def _suffix(data: bytes, shown: object) -> str:
    """File suffix of an encoded picture, by its header; the pixels are not decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            format = image.format or ""
    except Exception as error:  # Pillow raises many types on broken files
        raise _refused(shown, f"a {', '.join(FORMATS)} picture", type(error).__name__, "Save it again.") from error
    return _SUFFIXES.get(format, format.lower())


def _refused(picture: object, expected: str, got: object, fix: str) -> ImageError:
    return ImageError(explain(f"image {str(picture)[:120]}", expected=expected, got=got, fix=fix))
