"""Thumbnails as data URIs. A report never fails over a picture: what cannot be shown is left out."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import TypeAlias

from PIL import Image

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.report.markup import EMPTY, Html, html
from retrv_r1_retriever.types import ImageInput

#: Resolves a picture for display, or None to leave it out.
PictureLoader: TypeAlias = Callable[[ImageInput], Image.Image | None]

THUMBNAIL = 288  # longest side in pixels: twice the largest size shown, for dense screens
TINY = 96  # up to here a picture is embedded as it is and magnified without smoothing


def loader(images: ImageSource) -> PictureLoader:
    """`images` as a plain function that gives None where it would raise."""

    def load(image: ImageInput) -> Image.Image | None:
        try:
            return run(images.load(image)).image
        except Exception:  # a user's own ImageSource may raise anything
            return None

    return load


def thumbnail(image: ImageInput | None, load: PictureLoader, alt: str) -> Html:
    """An `<img>` with the picture inside it; empty if there is none to show."""
    picture = load(image) if image is not None else None
    if picture is None:
        return EMPTY
    tiny = max(picture.size) <= TINY
    css_class = "pic tiny" if tiny else "pic"
    return html('<img class="{}" alt="{}" src="{}">', css_class, alt, _data_uri(picture, tiny))


def _data_uri(picture: Image.Image, tiny: bool) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    if tiny:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=82)
    return f"data:image/{'png' if tiny else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
