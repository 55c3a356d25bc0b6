"""What a chat model is shown of results: words with ids to cite, and pictures within a budget of tokens. For agents' tools."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image

from retrv_r1_retriever.errors import ImageError, explain
from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.types import Document, ImageInput, RankedResult, RankedResults, Status

#: What vision models make of a picture is theirs to say; about this many pixels a token is what their vendors write. Ours.
PIXELS_PER_TOKEN = 750
#: Longest side of a picture in a list, and of one looked at alone. Ours.
LIST_SIDE, FULL_SIDE = 512, 1568
#: A picture smaller than this is not worth looking at; rather a few of a long list than a stamp of each. Ours.
LEAST_TOKENS = 50
TEXT_CHARS = 500  # of one document in a list
_QUALITY = 90

#: From what a model calls a picture to the picture itself: a model can name one, it cannot write one. None = it is unknown.
PictureOf: TypeAlias = "Callable[[str], ImageInput | None]"
PICTURE = "a picture to search with, by its name"  # the argument, for a model to read


@dataclass(frozen=True, slots=True)
class Picture:
    """Of one document, made smaller. data: encoded; tokens: what looking at it may cost, an estimate"""

    id: str
    data: bytes
    mime_type: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Pictures:
    """left_out: ids whose pictures were over the budget; unreadable: id and why"""

    shown: tuple[Picture, ...] = ()
    left_out: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()

    @property
    def remarks(self) -> list[str]:
        """For the model to read: a picture that is missing without a word looks like a document without one."""
        left = [f"Pictures not shown, to save tokens: {', '.join(f'[{id}]' for id in self.left_out)}."]
        return [
            *(left if self.left_out else ()),
            *(f"Picture of [{id}] unreadable: {why}" for id, why in self.unreadable),
        ]


async def pictures_of(
    documents: Sequence[Document], images: ImageSource, *, tokens: int, side: int = LIST_SIDE
) -> Pictures:
    """In the order given, made small enough for all of them, as far as they are still worth looking at.

    tokens: of all together, 0 = none are opened; side: longest, in pixels; nothing is made larger
    """
    pictured = [document for document in documents if document.content.image is not None]
    if tokens <= 0:
        return Pictures(left_out=tuple(document.id for document in pictured))
    share = max(tokens // max(len(pictured), 1), LEAST_TOKENS)
    loaded = await asyncio.gather(*(_loaded(document, images, side, share) for document in pictured))
    shown, left_out, unreadable, room = [], [], [], tokens
    for document, picture in zip(pictured, loaded, strict=True):
        if isinstance(picture, str):
            unreadable.append((document.id, picture))
        elif picture.tokens > room:
            left_out.append(document.id)
        else:
            shown.append(picture)
            room -= picture.tokens
    return Pictures(tuple(shown), tuple(left_out), tuple(unreadable))


async def for_a_model(results: RankedResults, images: ImageSource, *, tokens: int) -> tuple[str, tuple[Picture, ...]]:
    """What an agent's tool answers with: words, and pictures. tokens: of all pictures together, 0 = words alone"""
    documents = [result.document for result in results]
    pictures = await pictures_of(documents, images, tokens=tokens) if tokens else Pictures()
    return "\n".join([in_words(results), *pictures.remarks]), pictures.shown


def in_words(results: RankedResults) -> str:
    """One line per result, and before them whatever keeps a reader from trusting the order."""
    return "\n".join([*_remarks(results), *map(_line, results)])


def clipped(text: str, chars: int = TEXT_CHARS) -> str:
    """On one line, so that a document cannot write lines that look like other results."""
    line = " ".join(text.split())
    return line if len(line) <= chars else f"{line[: chars - 1]}…"


def _remarks(results: RankedResults) -> list[str]:
    if not len(results):
        return ["Nothing found."]
    if results.status is Status.FALLBACK:
        return [f"Not reranked, in the order of the first search: {results.reason}"]
    partly = [f"Only partly reranked: {results.reason}"] if results.status is Status.PARTIAL else []
    return [*partly, *(["None of these fits the query; the nearest first:"] if results.none_chosen else [])]


def _line(result: RankedResult) -> str:
    """Number, id and text; a picture is named, never written out as a data URI."""
    content = result.document.content
    text = clipped(content.text) if content.text else None
    words = " ".join(filter(None, [text, None if content.image is None else "(with a picture)"]))
    return f"{result.rank}. [{result.document.id}] {words}"


def named_picture(name: str | None, picture_of: PictureOf | None) -> ImageInput | None:
    """Raises `ImageError` for a name that nothing is known of."""
    if not name or picture_of is None:
        return None
    picture = picture_of(name)
    if picture is None:
        fix = "Use a name from this conversation."
        raise ImageError(explain("image", expected="the name of a picture", got=repr(name[:80]), fix=fix))
    return picture


async def _loaded(document: Document, images: ImageSource, side: int, tokens: int) -> Picture | str:
    """The picture, or why there is none."""
    assert document.content.image is not None
    try:
        image = (await images.load(document.content.image)).image
    except ImageError as error:
        return str(error)
    return await asyncio.to_thread(_encoded, document.id, image, side, tokens)


def _encoded(id: str, image: Image.Image, side: int, tokens: int) -> Picture:
    width, height = image.size
    scale = min(1.0, side / max(width, height), math.sqrt(tokens * PIXELS_PER_TOKEN / (width * height)))
    if scale < 1.0:
        size = (max(1, int(width * scale)), max(1, int(height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return Picture(id, buffer.getvalue(), "image/jpeg", math.ceil(image.width * image.height / PIXELS_PER_TOKEN))
