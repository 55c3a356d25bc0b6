"""How a document lies in a collection's payload: our own layout, and a map for any layout that somebody else made."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from retrv_r1_retriever.errors import InputError, OptionsError, SchemaError, explain
from retrv_r1_retriever.images import image_reference
from retrv_r1_retriever.types import Content, Document

#: Everything of ours lies under this one payload key, so that metadata keeps its own names and filters on it work.
RESERVED = "_retrv"

_FIELD = re.compile(r"\{([^{}]+)\}")
_PATH = re.compile(r"[^\s{}.!:\[\]]+(?:\.[^\s{}.!:\[\]]+)*")
_NESTED = (dict, Mapping)  # dict first: Mapping asks slowly. Not made anew for each of fifty documents a query
_PLAIN = str | int | float | None
_CLOSING = re.compile(r"""^[)\]}"'”’»%]+""")


def _is_template(value: str) -> bool:
    return "{" in value or "}" in value


@dataclass(frozen=True, slots=True)
class PayloadSchema:
    """Maps a payload to a `Document`; everything not named here becomes its metadata.

    text: a field, or a template over several ("{title} - {attrs.color}"); dots reach into nested objects, lists are joined
        with commas; a missing field is left out together with the text before it
    image: field with a path or data URI (in memory also bytes or a Pillow image), as the `ImageSource` understands it; or a
        template, as "data:;base64,{attrs.thumbnail}" for base64 alone; without one of its fields there is no picture
    id: field with the caller's id; None = the point id
    vector: name of the dense vector that is searched; "" = the collection's unnamed one
    """

    text: str | None = None
    image: str | None = None
    id: str | None = None
    vector: str = "dense"
    _parts: tuple[tuple[str, str, str], ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        if self.text is None and self.image is None:
            raise OptionsError(
                explain("PayloadSchema", expected="text=, image= or both", got="neither", fix="Name the fields.")
            )
        if self.text is not None and self.is_template:
            object.__setattr__(self, "_parts", _parse_template(self.text))
        if self.image is not None and _is_template(self.image):
            _parse_template(self.image)
        for name in self.fields:
            if not _PATH.fullmatch(name):
                raise OptionsError(
                    explain(
                        "PayloadSchema",
                        expected='field names like "title" or "attrs.color"',
                        got=repr(name),
                        fix="Use dots for nested fields; nothing is evaluated.",
                    )
                )

    @property
    def is_template(self) -> bool:
        """Whether the text is one."""
        return self.text is not None and _is_template(self.text)

    @property
    def text_fields(self) -> tuple[str, ...]:
        if self.text is None:
            return ()
        return tuple(name for _, name, _ in self._parts) if self.is_template else (self.text,)

    @property
    def image_fields(self) -> tuple[str, ...]:
        if self.image is None:
            return ()
        return tuple(_FIELD.findall(self.image)) if _is_template(self.image) else (self.image,)

    @property
    def fields(self) -> tuple[str, ...]:
        """All payload fields this schema names."""
        return tuple(dict.fromkeys((*self.text_fields, *self.image_fields, *((self.id,) if self.id else ()))))

    def to_document(self, point_id: object, payload: Mapping[str, Any]) -> Document:
        """Raises `SchemaError` if the payload holds neither text nor image where this schema looks."""
        id = lookup(payload, self.id) if self.id else point_id
        if id is None:
            raise self._unusable(point_id, payload, "no id")
        return Document(str(id), self.content(point_id, payload), self._metadata(payload))

    def content(self, point_id: object, payload: Mapping[str, Any]) -> Content:
        """The text and the picture alone; `point_id` is for messages. Raises `SchemaError` as `to_document` does."""
        image = self._image(payload)
        if image is not None and not isinstance(image, str | bytes | os.PathLike | Image.Image):
            raise self._unusable(point_id, payload, f"an image field of type {type(image).__name__}")
        text = self._text(payload)
        if not (text.strip() or image):
            raise self._unusable(point_id, payload, "neither text nor image")
        return Content(text or None, image or None)

    def to_payload(self, document: Document) -> dict[str, Any]:
        """The way back. Raises `InputError` where metadata and a field of the schema would overwrite each other."""
        for template in filter(None, (self.text, self.image)):
            if _is_template(template):
                raise SchemaError(
                    explain(
                        "PayloadSchema.to_payload", expected="text= and image= as one field", got=f"the template {template!r}",
                        fix="It cannot be taken apart again; such a collection can only be read.",
                    )
                )  # fmt: skip
        payload: dict[str, Any] = copy.deepcopy(dict(document.metadata))
        content = document.content
        image = None if content.image is None else image_reference(content.image)
        for name, value in ((self.id, document.id), (self.text, content.text), (self.image, image)):
            if name is not None and lookup(payload, name) is not None:
                raise InputError(
                    explain(
                        f"metadata of document {document.id!r}",
                        expected=f"no field {name!r}", got="one", fix="Rename it: the document itself is stored there.",
                    )
                )  # fmt: skip
            if name is not None and value is not None:
                _assign(payload, name, value)
        return payload

    def _text(self, payload: Mapping[str, Any]) -> str:
        if not self.is_template:
            return _shown(lookup(payload, self.text)) if self.text else ""
        text = ""
        for index, (before, name, after) in enumerate(self._parts):
            if value := _shown(lookup(payload, name)):
                if not text and index:  # the first field that is there: drop a separator that would lead the line
                    before = before.lstrip(" \t\n.,;:|/-–—")
                text += before + value + after
        return text

    def _image(self, payload: Mapping[str, Any]) -> Any:
        if self.image is None or not _is_template(self.image):
            return lookup(payload, self.image) if self.image else None
        found = {name: _shown(lookup(payload, name)) for name in self.image_fields}
        return _FIELD.sub(lambda field: found[field[1]], self.image) if all(found.values()) else None

    def _metadata(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The rest. Fields of a template stay: the text is made of them, but does not hold them one by one."""
        rest: dict[str, Any] = {key: _copied(value) for key, value in payload.items() if key != RESERVED}
        for name in (self.id, self.image, None if self.is_template else self.text):
            if name:
                _remove(rest, name)
        return rest

    def _unusable(self, point_id: object, payload: Mapping[str, Any], got: str) -> SchemaError:
        return SchemaError(
            explain(
                f"payload of point {point_id}",
                expected=f"text and/or image in {', '.join(self.fields)}",
                got=f"{got}; it has the fields {', '.join(found_fields([payload])) or '(none)'}",
                fix="Change PayloadSchema to the names found.",
            )
        )


#: The layout of collections this package makes.
OWN_SCHEMA = PayloadSchema(text=f"{RESERVED}.text", image=f"{RESERVED}.image", id=f"{RESERVED}.id")


def lookup(payload: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, None if there is none. A key that itself holds the dots wins over nesting.

    A string that holds a JSON object counts as that object: LlamaIndex keeps its nodes that way (`_node_content.text`).
    """
    if path in payload:
        return payload[path]
    head, dot, rest = path.partition(".")
    if not dot:
        return None
    inner = payload.get(head)
    if isinstance(inner, str) and inner.startswith("{"):
        try:
            inner = json.loads(inner)
        except ValueError:
            return None
    return lookup(inner, rest) if isinstance(inner, _NESTED) else None


def found_fields(payloads: Iterable[Mapping[str, Any]]) -> list[str]:
    """Dotted names of all fields, for messages."""
    return sorted({name for payload in payloads for name in _names(payload)})


def _names(payload: Mapping[str, Any]) -> Iterator[str]:
    for key, value in payload.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{key}.{name}" for name in _names(value))
        else:
            yield str(key)


def _parse_template(template: str) -> tuple[tuple[str, str, str], ...]:
    """(text before, field, text after) per field. A closing bracket or quote belongs to the field it follows."""
    pieces = _FIELD.split(template)
    texts, names = pieces[::2], pieces[1::2]
    if not names or any("{" in text or "}" in text for text in texts):
        raise OptionsError(
            explain(
                "PayloadSchema template", expected='fields in single braces, as in "{title} - {attrs.color}"',
                got=repr(template), fix="Close every brace, or give one field name without braces.",
            )
        )  # fmt: skip
    parts = []
    before = texts[0]
    for index, (name, text) in enumerate(zip(names, texts[1:], strict=True)):
        closing = _CLOSING.match(text)
        cut = len(text) if index == len(names) - 1 else closing.end() if closing else 0
        parts.append((before, name, text[:cut]))
        before = text[cut:]
    return tuple(parts)


def _shown(value: object) -> str:
    """A payload value as text; objects are no text and count as missing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str | int | float):
        return str(value).strip() if not isinstance(value, str) else value
    if isinstance(value, list | tuple):
        return ", ".join(shown for item in value if (shown := _shown(item)))
    return ""


def _copied(value: Any) -> Any:
    """A deep copy; of JSON in a tenth of the time that `copy.deepcopy` takes, which counts for fifty documents a query."""
    if isinstance(value, _PLAIN):
        return value
    if type(value) is dict:
        return {key: _copied(inner) for key, inner in value.items()}
    if type(value) is list:
        return [_copied(inner) for inner in value]
    return copy.deepcopy(value)


def _assign(payload: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split(".")
    for key in parents:
        payload = payload.setdefault(key, {})
    payload[last] = value


def _remove(payload: dict[str, Any], path: str) -> None:
    head, dot, rest = path.partition(".")
    if path in payload:
        del payload[path]
    elif dot and isinstance(payload.get(head), dict):
        _remove(payload[head], rest)
        if not payload[head]:
            del payload[head]
