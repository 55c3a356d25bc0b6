"""What both stores share: ids, checks, the tenant, and the way from a `Point` to vectors and payload and back.

Pure values; the stores below only add their client's calls.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from retrv_r1_retriever.errors import InputError, SchemaError, StoreError, explain
from retrv_r1_retriever.images import content_hash
from retrv_r1_retriever.schema import OWN_SCHEMA, RESERVED, PayloadSchema, lookup
from retrv_r1_retriever.store import Equals, Filter, Point, Scalar
from retrv_r1_retriever.types import Candidate, Content, Document, Memory

#: Name of the candidate memory among a server collection's vectors.
MEMORY = "memory"
#: Version of ids, payload keys and vectors as laid out below.
LAYOUT_VERSION = 1

#: Levels of nesting in a document's metadata. Qdrant writes more than 126 of them and cannot read them any more.
MAX_DEPTH = 100

_NAMESPACE = uuid.UUID("6f0e3c1e-7f0f-5a0a-9f57-3a1d5cbe2f41")  # part of stored data: never changes
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CollectionSpec:
    """What a collection is made with; kept beside the data and compared when it is opened again.

    memory_width: columns of the candidate memory, None = a collection without memory
    memory_digest: of the model whose memory went in first. Later points may have another: each memory names its own
    embedder: any name; vectors of two embedders cannot be compared, so another name is refused
    """

    vector_size: int
    memory_width: int | None = None
    memory_digest: str | None = None
    embedder: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"layout": LAYOUT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> CollectionSpec:
        if values.get("layout") != LAYOUT_VERSION:
            raise SchemaError(
                explain(
                    where, expected=f"layout version {LAYOUT_VERSION}", got=values.get("layout"),
                    fix="Use the package version it was made with, or index again.",
                )
            )  # fmt: skip
        return cls(**{f.name: values.get(f.name) for f in fields(cls)})  # type: ignore[arg-type]

    def check_against(self, asked: CollectionSpec, where: str) -> None:
        """Raises `SchemaError` if a collection made with `self` cannot serve `asked`."""
        for name in ("vector_size", "memory_width", "embedder"):
            have, want = getattr(self, name), getattr(asked, name)
            if want is not None and have != want and (have is not None or name == "memory_width"):
                raise SchemaError(
                    explain(
                        f"{where}: {name.replace('_', ' ')}", expected=want, got=f"{have} in the collection",
                        fix="Use the model it was made with, or index into a new collection.",
                    )
                )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Encoded:
    """One point as a store takes it. vectors: name -> list of floats; memory: checked, laid out by the store"""

    id: str
    vectors: dict[str, list[float]]
    payload: dict[str, Any]
    memory: Memory | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """One point as a store gives it back.

    rows: its own memory as a server sends it, to be read with the payload's note; None if not there or not asked for
    memory: the same from a file or a sidecar, which bring their own note
    """

    id: str
    payload: dict[str, Any]
    score: float | None = None
    rows: Any = None
    memory: Memory | None = None


@dataclass(frozen=True, slots=True)
class PointCodec:
    """Points of one collection, seen by one tenant.

    tenant: (payload field, value), part of the id of every point and of every filter: two tenants' documents of the same id
        are two points
    higher_is_better: False for distances like Euclid
    """

    spec: CollectionSpec
    schema: PayloadSchema = OWN_SCHEMA
    tenant: tuple[str, Scalar] | None = None
    higher_is_better: bool = True

    @property
    def own(self) -> bool:
        return self.schema is OWN_SCHEMA

    def point_id(self, id: str) -> str:
        name = id if self.tenant is None else json.dumps([*self.tenant, id])
        return str(uuid.uuid5(_NAMESPACE, name))

    def filter(self, asked: Filter | None) -> Filter | None:
        if not isinstance(asked, Filter | None):
            fix = "Wrap conditions: Filter(must=(Equals(...),))."
            got = f"{type(asked).__module__.partition('.')[0]}.{type(asked).__name__}"  # Qdrant's has the same name
            raise InputError(explain("filter", expected="retrv_r1_retriever.Filter or None", got=got, fix=fix))
        if self.tenant is None:
            return asked
        return Filter(must=(Equals(*self.tenant),)) & asked

    def filtered_fields(self, fields: Iterable[str]) -> list[str]:
        """These, and the tenant's, which is part of every filter."""
        return list(dict.fromkeys((*fields, *([] if self.tenant is None else [self.tenant[0]]))))

    def check_query(self, vector: np.ndarray, top_k: int) -> list[float]:
        if top_k < 1:
            raise InputError(explain("top_k", expected="1 or more", got=top_k, fix="Raise it."))
        return self._vector(vector, "query vector")

    def encode(self, points: Sequence[Point]) -> list[Encoded]:
        """Everything is checked before anything is written. Raises `InputError` or `SchemaError`."""
        encoded = [self._encode(point) for point in points]
        for id, times in Counter(point.document.id for point in points).items():
            if times > 1:
                raise InputError(
                    explain("upsert", expected="distinct ids", got=f"a duplicate id, {id!r}", fix="Keep one of them.")
                )
        return encoded

    def decode(self, found: Iterable[Found]) -> list[Candidate]:
        """Ranked 1..n, best first; equal scores are ordered by document id.

        A point without usable content is left out with a warning: there is nothing to read, for the model or the caller.
        """
        read: list[tuple[Found, Document]] = []
        for point in found:
            try:
                read.append((point, self.schema.to_document(point.id, point.payload)))
            except SchemaError as error:
                _logger.warning("Left out of the results: %s", error)
        sign = -1.0 if self.higher_is_better else 1.0
        read.sort(key=lambda one: (sign * (one[0].score or 0.0), one[1].id))
        return [
            Candidate(document, point.score, rank, self._memory(point))
            for rank, (point, document) in enumerate(read, 1)
        ]

    def in_order(self, ids: Sequence[str], found: Iterable[Found]) -> list[Candidate]:
        """As asked for, unknown ids and other tenants' points left out."""
        by_id = {c.document.id: c for c in self.decode(point for point in found if self.is_visible(point.payload))}
        ordered = [by_id[id] for id in dict.fromkeys(ids) if id in by_id]
        return [replace(candidate, rank=rank) for rank, candidate in enumerate(ordered, 1)]

    def is_visible(self, payload: Mapping[str, Any]) -> bool:
        if self.tenant is None:
            return True
        field, value = self.tenant
        stored = lookup(payload, field)
        stored = stored if isinstance(stored, list) else [stored]
        return any(type(one) is type(value) and one == value for one in stored)

    def check_ids(self, ids: Sequence[str], found: Iterable[Found]) -> None:
        """Two ids on one point id cannot happen by chance (122 bits), but a foreign write could make it so."""
        asked = {self.point_id(id): id for id in ids}
        for point in found:
            stored = lookup(point.payload, f"{RESERVED}.id")
            if stored != asked.get(point.id):
                raise StoreError(
                    explain(
                        f"point {point.id}", expected=f"document id {asked.get(point.id)!r}", got=repr(stored),
                        fix="The collection was changed by something else; index it again.",
                    )
                )  # fmt: skip

    @property
    def note_fields(self) -> list[str]:
        """What `check_ids` and `hashes` need; not the pictures, which may lie in the payload too."""
        note = [f"{RESERVED}.{name}" for name in ("id", "content_hash", "memory_digest")]
        return note if self.tenant is None else [*note, self.tenant[0]]

    def hashes(self, found: Iterable[Found], memory_digest: str | None) -> dict[str, str]:
        """Document id -> content hash, where the stored memory has this digest (None: with or without any)."""
        notes = [point.payload[RESERVED] for point in found if self.is_visible(point.payload)]
        return {
            note["id"]: note["content_hash"]
            for note in notes
            if memory_digest is None or note.get("memory_digest") == memory_digest
        }

    def _encode(self, point: Point) -> Encoded:
        document = point.document
        if not isinstance(document.id, str) or not document.id:
            raise InputError(
                explain("document id", expected="a non-empty str", got=repr(document.id), fix="Use str(id).")
            )
        vectors = {self.schema.vector: self._vector(point.vector, f"vector of document {document.id!r}")}
        memory = point.memory and checked_memory(point.memory, self.spec.memory_width, document.id)
        return Encoded(self.point_id(document.id), vectors, self._payload(point), memory)

    def _payload(self, point: Point) -> dict[str, Any]:
        document = point.document
        metadata = {**document.metadata, **point.payload}
        if _deeper_than(MAX_DEPTH, metadata):
            raise InputError(
                explain(
                    f"metadata of document {document.id!r}", expected=f"at most {MAX_DEPTH} levels", got="more",
                    fix="Flatten it, or keep it as a string.",
                )
            )  # fmt: skip
        if RESERVED in metadata:
            raise InputError(
                explain(
                    f"metadata of document {document.id!r}", expected=f"no key {RESERVED!r}", got="one",
                    fix="Rename it: this package keeps its own values there.",
                )
            )  # fmt: skip
        self._stamp(metadata, document.id)
        payload = self.schema.to_payload(replace(document, metadata=metadata))
        note = payload[RESERVED]
        if bools := list(_bools(metadata)):
            note["true"] = [path for path, value in bools if value]
            note["false"] = [path for path, value in bools if not value]
        note["content_hash"] = content_hash(Content(note.get("text"), note.get("image")))
        if (memory := point.memory) is not None:
            note.update(memory_note(memory))
        return _checked_json(payload, document.id)

    def _stamp(self, metadata: dict[str, Any], id: str) -> None:
        """Write the tenant in; a document that names another one is refused."""
        if self.tenant is None:
            return
        field, value = self.tenant
        if lookup(metadata, field) is not None and not self.is_visible(metadata):
            raise InputError(
                explain(
                    f"document {id!r}: tenant {field!r}", expected=repr(value), got=repr(lookup(metadata, field)),
                    fix="This store writes for one tenant only; open another one.",
                )
            )  # fmt: skip
        *parents, last = field.split(".")
        for key in parents:
            metadata[key] = dict(metadata.get(key, {}))
            metadata = metadata[key]
        metadata[last] = value

    def _vector(self, vector: np.ndarray, what: str) -> list[float]:
        values = np.asarray(vector, dtype=np.float32)
        if values.shape != (self.spec.vector_size,):
            raise SchemaError(
                explain(
                    f"{what}: vector size", expected=f"({self.spec.vector_size},)", got=values.shape,
                    fix="Use the embedder the collection was made with.",
                )
            )  # fmt: skip
        if not np.isfinite(values).all():
            raise InputError(explain(what, expected="finite numbers", got="NaN or inf", fix="Check the embedder."))
        listed: list[float] = values.tolist()
        return listed

    def _memory(self, point: Found) -> Memory | None:
        note = point.payload.get(RESERVED, {})
        if self.own and point.memory is None and point.rows is not None and "memory_digest" in note:
            return noted_memory(point.rows, note)
        return point.memory


def checked_memory(memory: Memory, width: int | None, id: str) -> Memory:
    """Its rows as float16. width: columns the collection has for it, None = it has no memory. Raises if it does not fit."""
    rows = np.asarray(memory.rows, dtype=np.float16)
    if width is None or rows.ndim != 2 or len(rows) == 0 or rows.shape[1] != width:
        expected = "no memory (the collection was made without)" if width is None else f"(1 or more, {width})"
        raise SchemaError(
            explain(
                f"document {id!r}: memory width", expected=expected, got=rows.shape,
                fix="Use the model the collection was made with, or index into a new one.",
            )
        )  # fmt: skip
    if not np.isfinite(rows).all():
        raise InputError(explain(f"memory of document {id!r}", expected="finite", got="NaN or inf", fix="Check it."))
    return replace(memory, rows=rows)


def memory_rows(memory: Memory) -> list[list[float]]:
    """As a Qdrant client takes it."""
    listed: list[list[float]] = memory.rows.astype(np.float32).tolist()
    return listed


def memory_note(memory: Memory) -> dict[str, Any]:
    """What is kept in the payload beside the rows, under `RESERVED`."""
    return {
        "content_hash": memory.content_hash,
        "memory_digest": memory.digest,
        "full_tokens": memory.full_tokens,
        "image_hash": memory.image_hash,
    }


def noted_memory(rows: Any, note: Mapping[str, Any]) -> Memory:
    """The way back from `memory_rows` and `memory_note`."""
    rows = np.asarray(rows, dtype=np.float16)
    return Memory(rows, note["memory_digest"], note["content_hash"], note["full_tokens"], note["image_hash"])


def whole_number(text: str, below: int) -> int | None:
    """The number that `str()` made this text of; None if none did, say of "007", or if it is too large."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(below))):
        return None
    number = int(text)
    return number if number < below and str(number) == text else None


def native_id(text: str) -> int | str | None:
    """The point id of a foreign collection that `str()` made this document id of; None if none can have."""
    if (number := whole_number(text, 2**64)) is not None:
        return number
    try:
        uuid.UUID(text)
    except ValueError:
        return None
    return text  # as it is: older clients in local mode know a point only by the form it was written in


def _bools(value: object, path: str = "") -> Iterator[tuple[str, bool]]:
    """Paths of all booleans, in Qdrant's notation.

    Kept as two lists of names beside the metadata: Qdrant Edge 0.9 takes True for the number 1 and matches no boolean at all.
    """
    if isinstance(value, bool):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _bools(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _bools(inner, f"{path}[]" if isinstance(inner, Mapping) else path)


def _deeper_than(limit: int, value: object) -> bool:
    level = [value]
    for _ in range(limit):
        level = [inner for one in level if isinstance(one, Mapping | list | tuple)
                 for inner in (one.values() if isinstance(one, Mapping) else one)]  # fmt: skip
    return any(isinstance(one, Mapping | list | tuple) for one in level)


def _stored_int(digits: str) -> int:
    """Qdrant keeps 64 bits; of a longer number it would keep the first 16 digits or so, without a word."""
    value = int(digits)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"a whole number of more than 64 bits, {digits[:40]}")
    return value


def _checked_json(payload: dict[str, Any], id: str) -> dict[str, Any]:
    """The payload as any store gives it back: plain JSON, tuples as lists."""
    try:
        text = json.dumps(payload, allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")  # half a surrogate pair passes json, and no store takes it
        plain: dict[str, Any] = json.loads(text, parse_int=_stored_int)
    except (TypeError, ValueError) as error:
        what, expected, fix = f"metadata of document {id!r}", "JSON values", "Convert them, e.g. with str()."
        if isinstance(error, UnicodeEncodeError):
            what, expected, fix = f"text or metadata of document {id!r}", "valid Unicode", "Mend the half pairs in it."
        raise InputError(explain(what, expected=expected, got=error, fix=fix)) from error
    return plain
