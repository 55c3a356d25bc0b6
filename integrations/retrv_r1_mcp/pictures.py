"""Pictures on their way in, as a client may name them, and on their way out, as content blocks."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

from mcp_types import ContentBlock, ImageContent, ResourceLink, TextContent

from retrv_r1_retriever.errors import ImageError, InputError, explain
from retrv_r1_retriever.images import LocalImages, is_data_uri
from retrv_r1_retriever.shown import Pictures
from retrv_r1_retriever.store import Store
from retrv_r1_retriever.types import Document, ImageInput

TEMPLATE = "retrv://documents/{id}/picture"
_HANDLE = re.compile(r"retrv://documents/([^/]+)/picture")


def handle(document: Document) -> str | None:
    """The URI of its picture; None without one."""
    return None if document.content.image is None else TEMPLATE.format(id=quote(document.id, safe=""))


def handle_id(uri: str) -> str | None:
    """The document's id, None for any other URI."""
    found = _HANDLE.fullmatch(uri)
    return unquote(found[1]) if found else None


async def document_of(store: Store | None, id: str) -> Document:
    """Raises `InputError` for an id that this store does not show, whoever else's it may be."""
    found = await store.get([id], with_memory=False) if store is not None else []
    if not found:
        fix = "Take an id from the results of `search`."
        raise InputError(explain("id", expected="one of a document in this collection", got=repr(id[:200]), fix=fix))
    return found[0].document


@dataclass(frozen=True, slots=True)
class ClientPictures:
    """files: reads what clients name by path; None = no path is taken. Documents' own pictures are not read from here."""

    files: LocalImages | None = None

    async def resolve(self, named: Iterable[str | None], store: Store | None) -> Mapping[str, ImageInput]:
        """Each name -> what the reranker's image source reads. Raises `InputError`."""
        return {name: await self._resolve(name, store) for name in set(named) if name}

    async def _resolve(self, name: str, store: Store | None) -> ImageInput:
        if is_data_uri(name) or name[:8].lower().startswith(("http://", "https://")):
            return name
        if name.startswith("retrv:"):
            return await self._of_document(name, store)
        if self.files is None:
            expected = "a data URI, an http(s) URL, or the picture of a result"
            fix = "Paths are read where the server was started with --image-root."
            raise ImageError(explain(f"image {name[:120]!r}", expected=expected, got="something else", fix=fix))
        path = url2pathname(urlsplit(name).path) if name.startswith("file:") else name
        return (await self.files.load(path)).image

    async def _of_document(self, uri: str, store: Store | None) -> ImageInput:
        id = handle_id(uri)
        image = None if id is None else (await document_of(store, id)).content.image
        if image is None:
            fix = f"It looks like {TEMPLATE}, see `picture` of a result."
            raise ImageError(explain(f"image {uri[:120]!r}", expected="the picture of a document", got="none", fix=fix))
        return image


def blocks(pictures: Pictures) -> list[ContentBlock]:
    """Every picture under a line with its id; clients that drop pictures leave the lines."""
    found: list[ContentBlock] = []
    for picture in pictures.shown:
        data = base64.b64encode(picture.data).decode("ascii")
        found.append(TextContent(text=f"Picture of [{picture.id}]:"))
        found.append(ImageContent(data=data, mime_type=picture.mime_type))
    return found


def links(documents: Iterable[Document]) -> list[ContentBlock]:
    named = [(document.id, handle(document)) for document in documents]
    return [
        ResourceLink(uri=uri, name=f"picture of [{id}]", mime_type="image/jpeg") for id, uri in named if uri is not None
    ]
