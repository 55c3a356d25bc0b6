"""Thumbnails as data URIs. A report never fails over a picture: what cannot be shown is left out."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps

from retrv_r1_retriever.report.markup import EMPTY, Html, html
from retrv_r1_retriever.types import ImageInput

#: Resolves a picture for display, or None to leave it out.
PictureLoader: TypeAlias = Callable[[ImageInput], Image.Image | None]

THUMBNAIL = 288  # longest side in pixels: twice the largest size shown, for dense screens
TINY = 96  # up to here a picture is embedded as it is and magnified without smoothing
MAX_PIXELS = 50_000_000


def local_pictures(root: Path | None) -> PictureLoader:
    """Bytes, data URIs, decoded pictures and files under `root`; nothing else is opened, nothing is fetched."""

    def load(image: ImageInput) -> Image.Image | None:
        try:
            return _open(image, root)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None

    return load


def _open(image: ImageInput, root: Path | None) -> Image.Image | None:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, bytes):
        return _decode(image)
    location = os.fspath(image)
    if location.startswith("data:"):
        return _decode(_data_uri_bytes(location))
    if root is None or "://" in location:
        return None
    path = (root / location).resolve()
    return _decode(path.read_bytes()) if path.is_relative_to(root.resolve()) else None


def _data_uri_bytes(uri: str) -> bytes:
    head, _, body = uri.partition(",")
    raw = unquote_to_bytes(body)
    return base64.b64decode(raw) if head.endswith(";base64") else raw


def _decode(data: bytes) -> Image.Image | None:
    image = Image.open(io.BytesIO(data))
    if image.width * image.height > MAX_PIXELS:
        return None
    image.load()
    return image


def thumbnail(image: ImageInput | None, load: PictureLoader, alt: str) -> Html:
    """An `<img>` with the picture inside it; empty if there is none to show."""
    picture = load(image) if image is not None else None
    if picture is None:
        return EMPTY
    tiny = max(picture.size) <= TINY
    css_class = "pic tiny" if tiny else "pic"
    return html('<img class="{}" alt="{}" src="{}">', css_class, alt, _data_uri(picture, tiny))


def _data_uri(picture: Image.Image, tiny: bool) -> str:
    picture = ImageOps.exif_transpose(picture)
    buffer = io.BytesIO()
    if tiny or picture.has_transparency_data:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.convert("RGBA" if picture.has_transparency_data else "RGB").save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture = picture.convert("RGB")
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.save(buffer, "JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
