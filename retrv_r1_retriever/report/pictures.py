"""Thumbnails as data URIs. A report never fails over a picture: what cannot be shown is left out."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Hashable
from typing import TypeAlias

from PIL import Image

from retrv_r1_retriever._sync import run
from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.report.markup import EMPTY, Html, html
from retrv_r1_retriever.types import ImageInput

#: Resolves a picture for display, or None to leave it out.
PictureLoader: TypeAlias = Callable[[ImageInput], Image.Image | None]

THUMBNAIL = 288  # longest side in pixels: twice the largest size shown, for dense screens
SHARED = 168  # of a page with many queries, whose size counts
TINY = 96  # up to here a picture is embedded as it is and magnified without smoothing


def loader(images: ImageSource) -> PictureLoader:
    """`images` as a plain function that gives None where it would raise."""

    def load(image: ImageInput) -> Image.Image | None:
        try:
            return run(images.load(image)).image
        except Exception:  # a user's own ImageSource may raise anything
            return None

    return load


class Pictures:
    """The thumbnails of one page, each made once.

    shared: a picture is on the page once, however many queries show it, and the page's script puts it where it belongs when
        a query is opened; otherwise each `<img>` carries its own
    """

    def __init__(self, load: PictureLoader, *, shared: bool = False) -> None:
        self._load, self._shared = load, shared
        self._made: dict[Hashable, tuple[int, str, str] | None] = {}

    def thumbnail(self, image: ImageInput | None, alt: str) -> Html:
        """An `<img>`; empty if there is nothing to show."""
        if image is None:
            return EMPTY
        key = image if isinstance(image, str | bytes) else id(image)
        if key not in self._made:
            self._made[key] = self._make(image)
        made = self._made[key]
        if made is None:
            return EMPTY
        place, css_class, uri = made
        if self._shared:
            return html('<img class="{}" alt="{}" data-picture="{}">', css_class, alt, place)
        return html('<img class="{}" alt="{}" src="{}">', css_class, alt, uri)

    def block(self) -> Html:
        """The shared pictures, for the page's script. Nothing foreign is in it: data URIs are made here."""
        if not self._shared:
            return EMPTY
        uris = json.dumps([made[2] for made in self._made.values() if made])
        return html("<script type='application/json' id='pictures'>{}</script>", Html(uris))

    def _make(self, image: ImageInput) -> tuple[int, str, str] | None:
        picture = self._load(image)
        if picture is None:
            return None
        tiny = max(picture.size) <= TINY
        uri = _data_uri(picture, tiny, SHARED if self._shared else THUMBNAIL)
        return sum(made is not None for made in self._made.values()), "pic tiny" if tiny else "pic", uri


def _data_uri(picture: Image.Image, tiny: bool, longest: int) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    if tiny:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=82)
    return f"data:image/{'png' if tiny else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
