"""Pictures: where they come from, what is refused, and the hashes that tell a changed candidate from an unchanged one."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import io
import os
import re
import urllib.parse
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from retrv_r1_retriever.errors import ImageError, explain
from retrv_r1_retriever.types import Content, ImageInput, Query

#: File formats that are opened. Pillow knows more; the rest (EPS runs Ghostscript, ICO hides a second size) is not worth its risk.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_CONTENT_HASH_VERSION = "c1"  # part of stored data: a new number makes every stored memory stale
_IMAGE_HASH_VERSION = "i1"
_CHECK_ROOT = "Check the path, and the root it starts at: root=, or [images] root in retrv.toml."
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class ImageData:
    """image: decoded, RGB, upright; hash: of the encoded bytes (of the pixels, where a decoded image was given)"""

    image: Image.Image
    hash: str


@runtime_checkable
class ImageSource(Protocol):
    """Turns whatever a `Content.image` holds into pixels. Raises `ImageError`; never blocks the event loop."""

    async def load(self, image: ImageInput) -> ImageData: ...


class LocalImages:
    """Bytes, data URIs, Pillow images, and files below `root`. Nothing is ever fetched from a network.

    root: the only folder files are read from, whoever names them (a query, a payload); relative paths start here, symbolic
        links out of it are refused. None = no files at all
    max_pixels: width x height in the file's header, checked before anything is decoded
    max_frames: animations longer than this are refused; of the others the first frame is taken
    concurrency: files read and decoded at the same time; timeout_s: for one picture, once its turn has come
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        max_bytes: int = 20_000_000,
        max_pixels: int = 50_000_000,
        max_frames: int = 1_000,
        concurrency: int = 8,
        timeout_s: float = 30.0,
    ) -> None:
        self.root = None if root is None else Path(root).resolve()
        if self.root is not None and not self.root.is_dir():
            raise ImageError(
                explain(
                    "LocalImages root",
                    expected="a folder",
                    got=str(self.root),
                    fix="Create it, or fix root= ([images] root in retrv.toml).",
                )
            )
        self.max_bytes, self.max_pixels, self.max_frames = max_bytes, max_pixels, max_frames
        self.concurrency, self.timeout_s = concurrency, timeout_s
        self._start_threads()
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]
        self._turns = weakref.WeakKeyDictionary()

    def _start_threads(self) -> None:
        """Own threads: a hung network drive may block these, never the default pool everybody shares."""
        self._threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="retrv-images")
        self._pid = os.getpid()

    async def load(self, image: ImageInput) -> ImageData:
        if self._pid != os.getpid():  # a forked child has the pool, but none of its threads
            self._start_threads()
        loop = asyncio.get_running_loop()
        async with self._turns.setdefault(loop, asyncio.Semaphore(self.concurrency)):
            work = loop.run_in_executor(self._threads, self._load, image)
            try:
                return await asyncio.wait_for(work, self.timeout_s)
            except TimeoutError:
                raise ImageError(
                    explain(
                        f"image {_shown(image)}",
                        expected=f"an answer within {self.timeout_s} s",
                        got="none",
                        fix="Check the drive it lies on, or raise timeout_s.",
                    )
                ) from None

    def _load(self, image: ImageInput) -> ImageData:
        if isinstance(image, Image.Image):
            self._check_size(image, _shown(image))
            return ImageData(_guarded(lambda: to_rgb(image), image), image_hash(image))
        data = self._read(image)
        if len(data) > self.max_bytes:
            raise _too_large(image, f"{len(data):,} bytes", f"{self.max_bytes:,} bytes", "max_bytes")
        return ImageData(_guarded(lambda: self._decode(data, _shown(image)), image), image_hash(data))

    def _read(self, image: ImageInput) -> bytes:
        if isinstance(image, bytes):
            return image
        if isinstance(image, str) and is_data_uri(image):
            if len(image) > 4 * self.max_bytes:  # no encoding is longer: %XX is 3 characters a byte, base64 1.34
                raise _too_large(
                    image, f"a data URI of {len(image):,} characters", f"{self.max_bytes:,} bytes", "max_bytes"
                )
            return data_uri_bytes(image)
        if isinstance(image, str) and _URL.match(image):
            raise ImageError(
                explain(
                    f"image {_shown(image)}",
                    expected="bytes, a path, a data URI or a Pillow image",
                    got="a URL, and LocalImages fetches nothing",
                    fix="Download it first, or allow its host: hosts in [images] of retrv.toml, HttpImages(...) in Python.",
                )
            )
        if isinstance(image, str | os.PathLike):
            return self._read_file(image)
        raise ImageError(
            explain(
                "image",
                expected="bytes, a path, a data URI or a Pillow image",
                got=type(image).__name__,
                fix="Convert it to one of these.",
            )
        )

    def _read_file(self, image: str | os.PathLike[str]) -> bytes:
        if self.root is None:
            raise ImageError(
                explain(
                    f"image {_shown(image)}",
                    expected="an image source that may read files",
                    got="LocalImages without a root",
                    fix="Pass LocalImages(root=...): the folder below which pictures may be read.",
                )
            )
        try:
            path = (self.root / image).resolve()  # symbolic links and .. are gone after this
            if not path.is_relative_to(self.root):
                raise ImageError(
                    explain(
                        f"image {_shown(image)}",
                        expected=f"a file below {self.root}",
                        got=f"{path}, outside root",
                        fix="Move it below root, or name another one: root=, or [images] root in retrv.toml.",
                    )
                )
            if not path.is_file():
                raise ImageError(explain(f"image {path}", expected="a file", got="no such file", fix=_CHECK_ROOT))
            with path.open("rb") as file:
                return file.read(self.max_bytes + 1)
        except (OSError, ValueError) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(
                explain(f"image {_shown(image)}", expected="a readable file", got=error, fix="Check the path.")
            ) from error

    def _decode(self, data: bytes, shown: str) -> Image.Image:
        with self._opened(data, shown) as image:  # reads the header only
            self._check_size(image, shown)
            frames = getattr(image, "n_frames", 1)
            if frames > self.max_frames:
                raise _too_large(shown, f"{frames} frames", f"{self.max_frames} frames", "max_frames")
            image.seek(0)
            image.load()
            return to_rgb(image)

    def _opened(self, data: bytes, shown: str) -> Image.Image:
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:  # Pillow keeps the size to itself, but for its words
            size = re.search(r"\d+", str(error))
            got = f"{int(size[0]):,} pixels in its header" if size else f"more in its header ({error})"
            pillows = 2 * (Image.MAX_IMAGE_PIXELS or self.max_pixels)
            option = "max_pixels" if self.max_pixels <= pillows else "PIL.Image.MAX_IMAGE_PIXELS"
            raise _too_large(shown, got, f"{min(self.max_pixels, pillows):,} pixels", option) from None

    def _check_size(self, image: Image.Image, shown: str) -> None:
        if (pixels := image.width * image.height) > self.max_pixels:
            got = f"{image.width} x {image.height} = {pixels:,} pixels"
            raise _too_large(shown, got, f"{self.max_pixels:,} pixels", "max_pixels")


async def load_content(source: ImageSource, content: Content) -> tuple[Content, str | None]:
    """The content with its picture decoded, and the picture's hash (None without a picture)."""
    if content.image is None:
        return content, None
    data = await source.load(content.image)
    return replace(content, image=data.image), data.hash


#: Pictures of queries that are decoded, by id: a retriever's query comes to its reranker as it was embedded.
_decoded: weakref.WeakValueDictionary[int, Image.Image] = weakref.WeakValueDictionary()


async def load_query(source: ImageSource, query: Query) -> Query:
    """The query with its picture decoded. One that this gave back before is not converted and hashed again."""
    image = query.content.image
    if image is None or _decoded.get(id(image)) is image:
        return query
    content, _ = await load_content(source, query.content)
    if isinstance(content.image, Image.Image):  # a caller's own source may give what an engine has encoded
        _decoded[id(content.image)] = content.image
    return replace(query, content=content)


def content_hash(content: Content) -> str:
    """Hash of the text and of the picture's *reference*; touches no file, so it is cheap enough for query time.

    A data URI hashes like the bytes in it, a Pillow image by its pixels. A file that changed under the same path keeps its
    content hash; `image_hash` is there for that.
    """
    digest = _hasher()
    text = (content.text or "").encode("utf-8", "surrogatepass")
    digest.update(len(text).to_bytes(8, "little") + text)
    image = content.image
    if isinstance(image, str) and is_data_uri(image):
        with contextlib.suppress(
            ImageError
        ):  # a broken one is hashed as the string it is; loading it says what is wrong
            image = data_uri_bytes(image)
    if isinstance(image, bytes):
        digest.update(b"data" + image)
    elif isinstance(image, Image.Image):
        digest.update(b"pixels" + image_hash(image).encode())
    elif image is not None:
        digest.update(b"path" + image_reference(image).encode("utf-8", "surrogatepass"))
    return f"{_CONTENT_HASH_VERSION}:{digest.hexdigest()}"


def image_hash(image: bytes | Image.Image) -> str:
    """Hash of a picture's encoded bytes, or of its pixels."""
    digest = _hasher()
    if isinstance(image, bytes):
        digest.update(image)
    else:
        digest.update(f"{image.mode} {image.size} ".encode() + image.tobytes())
    return f"{_IMAGE_HASH_VERSION}:{digest.hexdigest()}"


def image_reference(image: ImageInput) -> str:
    """The string a picture is stored as: a path as given (with forward slashes), everything else as a data URI."""
    if isinstance(image, str):
        return image
    if isinstance(image, os.PathLike):
        return Path(image).as_posix()
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        to_rgb(image).save(buffer, "PNG")
        image = buffer.getvalue()
    if not isinstance(image, bytes):
        raise ImageError(
            explain("image", expected="bytes, str, path or Pillow image", got=type(image).__name__, fix="Convert it.")
        )
    data = image

    def mime() -> str | None:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            return opened.get_format_mimetype()

    return f"data:{_guarded(mime, data)};base64,{base64.b64encode(data).decode('ascii')}"


def is_data_uri(text: str) -> bool:
    return text[:5].lower() == "data:"


def data_uri_bytes(uri: str) -> bytes:
    """The bytes of a data URI (RFC 2397), base64 or percent-encoded."""
    head, comma, body = uri.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        data = urllib.parse.unquote_to_bytes(body)
        if head.lower().rstrip().endswith(";base64"):
            data = b"".join(data.split())
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (ValueError, binascii.Error) as error:
        raise ImageError(
            explain(
                f"image {_shown(uri)}", expected="data:image/png;base64,...", got=f"a bad data URI ({error})",
                fix="Encode it again.",
            )
        ) from error  # fmt: skip
    return data


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB; transparency on white."""
    with contextlib.suppress(Exception):  # an unreadable EXIF block is no reason to lose the picture
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Pillow's own conversion clips 16-bit values to white; the container says 16 bits by its type or by its values."""
    values = pixels.astype(np.float64)
    top = float(np.nanmax(values, initial=0.0))
    if np.issubdtype(pixels.dtype, np.floating):
        values *= 255.0 if top <= 1.0 else 1.0
    elif pixels.dtype.itemsize == 2 or top > 255:
        values /= 257.0
    return np.nan_to_num(values).clip(0, 255).round().astype(np.uint8)


def _guarded(work: Callable[[], _T], image: object) -> _T:
    """Pillow raises many types on broken files; all of them mean the same to a caller."""
    try:
        return work()
    except ImageError:
        raise
    except Exception as error:
        words = "" if isinstance(error, UnidentifiedImageError) else f": {error}"  # its words are an object's address
        raise ImageError(
            explain(
                f"image {_shown(image)}",
                expected=f"a readable {', '.join(FORMATS)} picture",
                got=f"{type(error).__name__}{words}",
                fix="Save it again as PNG or JPEG.",
            )
        ) from error


def _too_large(image: object, got: str, limit: str, option: str) -> ImageError:
    return ImageError(
        explain(f"image {_shown(image)}", expected=f"at most {limit}", got=got, fix=f"Shrink it, or raise {option}.")
    )


def _shown(image: object) -> str:
    """A short name for messages; never a megabyte of base64."""
    if isinstance(image, bytes):
        return f"({len(image):,} bytes)"
    if isinstance(image, Image.Image):
        return f"(Pillow, {image.mode} {image.width}x{image.height})"
    text = os.fspath(image) if isinstance(image, os.PathLike) else str(image)
    return text if len(text) <= 120 else f"{text[:60]}..."


def _hasher() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)
