"""Guesses how a collection's payload maps to documents, from a sample; every guess is written down to be looked at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from retrv_r1_retriever.errors import SchemaError, explain
from retrv_r1_retriever.readers import IMAGE_SUFFIXES
from retrv_r1_retriever.schema import found_fields, lookup

Shape = Literal["langchain-qdrant", "llama-index", "plain"]
_TITLES = ("title", "name", "headline", "product_name")
_TEXTS = (
    "text",
    "content",
    "body",
    "document",
    "chunk",
    "description",
    "caption",
    "summary",
    "abstract",
    "page_content",
)
_IDS = ("id", "doc_id", "document_id", "sku", "uuid", "product_id", "item_id", "asin", "uid")
_NODE = "_node_content"  # LlamaIndex: the node as JSON
_NODE_TEXTS = (f"{_NODE}.text", f"{_NODE}.text_resource.text")
_NODE_IMAGES = ("image", "image_path", "image_resource.path", "image_url", "image_resource.url")
_READ_ALIKE = "memory made of this text fits where LlamaIndex reads it, too: metadata_mode=MetadataMode.NONE"
_BASE64_IMAGE = f"data:;base64,{{{_NODE}.image}}"  # what is there and no data URI is base64 alone


@dataclass(frozen=True, slots=True)
class Draft:
    """shape: who seems to have written it; notes: what was guessed among several, and what to look at"""

    shape: Shape
    text: str | None
    image: str | None
    id: str | None
    vector: str
    hosts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def toml(self, url: str, collection: str, api_key_env: str | None) -> str:
        """The file, with the notes as comments."""
        store = {"kind": "qdrant", "url": url, "collection": collection, "api_key_env": api_key_env}
        store |= {"text": self.text, "image": self.image, "id": self.id, "vector": self.vector}
        lines = [f"# Drafted from a sample of the payload ({self.shape}). Look at it: it is a guess.", "[store]"]
        lines += [f"{key} = {_quoted(value)}" for key, value in store.items() if value is not None]
        lines += [f"# {_one_line(note)}" for note in self.notes]
        lines += ["", "[images]", 'root = "."  # the folder that picture paths start from']
        if self.hosts:
            lines += ["# Pictures lie behind URLs of these hosts; nothing is fetched until this line is active:"]
            lines += [f"# hosts = [{', '.join(map(_quoted, self.hosts))}]"]
        return "\n".join(lines) + "\n"


def draft(payloads: Sequence[Mapping[str, Any]], vectors: Mapping[str, int], where: str) -> Draft:
    """vectors: dense vectors by name, with their sizes; "" = the unnamed one. Raises `SchemaError` if nothing fits."""
    if not payloads or not vectors:
        missing = "points" if vectors else "a dense vector"
        raise SchemaError(explain(where, expected=missing, got="none", fix="Check the name of the collection."))
    shape = _shape(payloads)
    fields = _Fields.of(payloads, shape)
    vector = "dense" if "dense" in vectors else next(iter(sorted(vectors)))
    text, text_note = _text(fields, shape)
    image, image_note = _image(fields)
    if text is None and image is None:
        raise SchemaError(
            explain(where, expected="a text or a picture in the payload", got=", ".join(found_fields(payloads)) or "nothing",
                    fix="Write [store] text or image by hand, see docs/config.md.")
        )  # fmt: skip
    notes = [text_note, image_note, _READ_ALIKE if shape == "llama-index" else None]
    if len(vectors) > 1:
        notes.append(f"vectors found: {', '.join(f'{n!r} ({size})' for n, size in sorted(vectors.items()))}")
    id = _id(fields) if shape == "plain" else None
    hosts = sorted({host for value in fields.values(image) if (host := _host(value))}) if image else []
    return Draft(shape, text, image, id, vector, tuple(hosts), tuple(note for note in notes if note))


@dataclass(frozen=True, slots=True)
class _Fields:
    """The sample's fields by dotted name, and how many payloads have each."""

    payloads: Sequence[Mapping[str, Any]]
    names: tuple[str, ...]

    @classmethod
    def of(cls, payloads: Sequence[Mapping[str, Any]], shape: Shape) -> _Fields:
        names = set(found_fields(payloads))
        if shape == "llama-index":
            names |= {*_NODE_TEXTS, *(f"{_NODE}.{name}" for name in _NODE_IMAGES)}
        return cls(payloads, tuple(sorted(names)))

    def values(self, name: str | None) -> list[Any]:
        found = [lookup(payload, name) for payload in self.payloads] if name else []
        return [value for value in found if value not in (None, "")]

    def texts(self) -> Iterator[tuple[str, list[str]]]:
        for name in self.names:
            values = self.values(name)
            if values and all(isinstance(value, str) for value in values):
                yield name, values


def _shape(payloads: Sequence[Mapping[str, Any]]) -> Shape:
    if all("page_content" in p and isinstance(p.get("metadata"), Mapping | None) for p in payloads):
        return "langchain-qdrant"
    return "llama-index" if all(isinstance(p.get(_NODE), str) for p in payloads) else "plain"


def _text(fields: _Fields, shape: Shape) -> tuple[str | None, str | None]:
    """A field or template, and a note where there was a choice."""
    if shape == "langchain-qdrant":
        return "page_content", None
    if shape == "llama-index":
        there = [name for name in _NODE_TEXTS if fields.values(name)]
        return ("".join(f"{{{name}}}" for name in there) if len(there) > 1 else there[0] if there else None), None
    prose = {name: values for name, values in fields.texts() if not any(map(_is_picture, values))}
    named = sorted((name for name in prose if _last(name) in _TEXTS), key=lambda n: _TEXTS.index(_last(n)))
    title = next((name for name in prose if _last(name) in _TITLES), None)
    body = named[0] if named else _longest(prose, title)
    others = [name for name in prose if name not in (title, body, _id(fields))]
    note = f"other fields that hold text: {', '.join(others)}" if others else None
    if title and body:
        return f"{{{title}}}. {{{body}}}", note
    return title or body, note


def _longest(prose: Mapping[str, list[str]], title: str | None) -> str | None:
    """The field with the most words, if it reads like a sentence."""
    words = {n: sum(len(v.split()) for v in values) / len(values) for n, values in prose.items() if n != title}
    best = max(words, key=words.__getitem__, default=None)
    return best if best is not None and words[best] >= (4 if title else 1) else None


def _image(fields: _Fields) -> tuple[str | None, str | None]:
    counts = Counter({name: sum(map(_is_picture, values)) for name, values in fields.texts() if name != _NODE})
    counts[_BASE64_IMAGE] = sum(not _is_picture(value) for value in fields.values(f"{_NODE}.image"))
    found = [(name, count) for name, count in counts.most_common() if 2 * count >= len(fields.values(name)) and count]
    if not found:
        return None, None
    # What a node itself calls its picture goes before its metadata: that is what LlamaIndex reads. Of fields that are as often there,
    # one whose name says so: a file_path may be a page of text next time.
    best = max(
        found,
        key=lambda one: (
            _NODE in one[0],
            one[1],
            any(word in one[0].lower() for word in ("image", "img", "picture", "photo")),
        ),
    )
    others = [name for name, _ in found if name != best[0]]
    return best[0], f"other fields that hold pictures: {', '.join(others)}" if others else None


def _id(fields: _Fields) -> str | None:
    """A field that every payload has, with a value of its own."""
    for name in _IDS:
        values = fields.values(name)
        plain = all(isinstance(value, str | int) and not isinstance(value, bool) for value in values)
        if len(values) == len(fields.payloads) and plain and len(set(map(str, values))) == len(values):
            return name
    return None


def _is_picture(value: object) -> bool:
    if not isinstance(value, str):
        return False
    if value[:11].lower() == "data:image/":
        return True
    path = urlsplit(value).path if _host(value) else value
    return "\n" not in value and PurePosixPath(path.replace("\\", "/")).suffix.lower() in IMAGE_SUFFIXES


def _host(value: object) -> str | None:
    if not (isinstance(value, str) and value[:8].lower().startswith(("http://", "https://"))):
        return None
    try:
        return urlsplit(value).hostname
    except ValueError:
        return None


def _last(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=True)


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
