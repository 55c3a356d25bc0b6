"""Opening a collection on Qdrant: check the one that is there, or make it. Imports no client: `models` comes from the caller."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from retrv_r1_retriever.errors import SchemaError, StoreError, explain, not_indexed
from retrv_r1_retriever.points import MEMORY, CollectionSpec, PointCodec
from retrv_r1_retriever.schema import OWN_SCHEMA, PayloadSchema, found_fields, lookup
from retrv_r1_retriever.store import Scalar

#: A call of the client: method name and its arguments; on the store's collection unless they name another.
Call: TypeAlias = "Callable[..., Awaitable[Any]]"

MARK = "retrv"  # collection metadata under this key says that we made the collection, and how
_SAMPLE = 64  # payloads looked at before each missing field is asked for by itself


@dataclass(frozen=True, slots=True)
class Opening:
    """Checks a collection, or makes it. `call` is the store's, sync or async."""

    call: Call
    models: Any
    where: str
    asked: CollectionSpec | None
    schema: PayloadSchema | None
    tenant: tuple[str, Scalar] | None
    read_only: bool

    async def __call__(self) -> PointCodec:
        if not await self.call("collection_exists"):
            if self.asked is None or self.read_only:
                raise not_indexed(
                    self.where, expected="an existing collection", got="none of that name",
                    fix="Run `retrv-r1 index SOURCE`, fix the name, or pass spec=CollectionSpec(...) without read_only.",
                )  # fmt: skip
            await self.call("create_collection", **_creation(self.models, self.asked))
        config = (await self.call("get_collection")).config
        mark = (getattr(config, "metadata", None) or {}).get(MARK)
        if mark is None and self.asked is not None and self.schema is None:
            raise StoreError(
                explain(
                    self.where, expected="a collection made by this package on Qdrant 1.16 or newer",
                    got="one without our mark", fix="Pass schema=PayloadSchema(...) to read it, or choose a new name.",
                )
            )  # fmt: skip
        vectors = config.params.vectors or {}
        vectors = vectors if isinstance(vectors, dict) else {"": vectors}
        if mark is None:
            return await self._open_foreign(vectors)
        return self._open_own(mark, vectors)

    def _open_own(self, mark: dict[str, Any], vectors: dict[str, Any]) -> PointCodec:
        if self.schema is not None:
            raise SchemaError(
                explain(self.where, expected="no schema= (we made it)", got=self.schema, fix="Leave schema= out.")
            )
        spec = CollectionSpec.from_json(mark, self.where)
        _check_vector(OWN_SCHEMA.vector, vectors, self.where)
        stored = replace(
            spec,
            vector_size=vectors[OWN_SCHEMA.vector].size,
            memory_width=vectors[MEMORY].size if MEMORY in vectors else None,
        )
        stored.check_against(self.asked or spec, self.where)
        return PointCodec(stored, tenant=self.tenant)

    async def _open_foreign(self, vectors: dict[str, Any]) -> PointCodec:
        schema = self.schema
        records, _ = await self.call("scroll", limit=_SAMPLE, with_payload=True, with_vectors=False)
        payloads = [record.payload or {} for record in records]
        names = ", ".join(found_fields(payloads)) or "(none)"
        if schema is None:
            raise SchemaError(
                explain(
                    self.where, expected="schema=PayloadSchema(...), as this package did not make it",
                    got=f"none; its payload has the fields {names}, its vectors are {_names(vectors)}",
                    fix="Map them, e.g. PayloadSchema(text=..., image=..., vector=...).",
                )
            )  # fmt: skip
        _check_vector(schema.vector, vectors, self.where)
        for field in schema.fields:
            if payloads and all(lookup(payload, field) is None for payload in payloads):
                await self._check_field(field, names)
        params = vectors[schema.vector]
        spec = CollectionSpec(params.size)
        spec.check_against(self.asked or spec, self.where)
        higher = params.distance in (self.models.Distance.COSINE, self.models.Distance.DOT)
        return PointCodec(spec, schema, self.tenant, higher)

    async def _check_field(self, field: str, names: str) -> None:
        """A field the sample lacks may still be somewhere; ask for one point that has it."""
        empty = self.models.IsEmptyCondition(is_empty=self.models.PayloadField(key=field))
        records, _ = await self.call(
            "scroll",
            limit=1,
            scroll_filter=self.models.Filter(must_not=[empty]),
            with_payload=False,
            with_vectors=False,
        )
        if not records:
            raise SchemaError(
                explain(
                    f"{self.where}: payload field {field!r}", expected="it in at least one point",
                    got=f"none; the fields found are {names}", fix="Change PayloadSchema to the names found.",
                )
            )  # fmt: skip


def _check_vector(name: str, vectors: dict[str, Any], where: str) -> None:
    shown = repr(name) if name else "the unnamed vector"
    if name not in vectors or vectors[name].multivector_config is not None:
        got = "a multivector" if name in vectors else f"vectors named {_names(vectors)}"
        raise SchemaError(
            explain(
                f"{where}: vector name",
                expected=shown,
                got=got,
                fix="Pass PayloadSchema(vector=...) with a name found.",
            )
        )


def _names(vectors: dict[str, Any]) -> str:
    return ", ".join(repr(name) for name in vectors) or "(no dense vectors)"


def _creation(models: Any, spec: CollectionSpec) -> dict[str, Any]:
    vectors = {OWN_SCHEMA.vector: models.VectorParams(size=spec.vector_size, distance=models.Distance.COSINE)}
    if spec.memory_width is not None:
        vectors[MEMORY] = memory_vector(models, spec.memory_width)
    return {"vectors_config": vectors, "metadata": {MARK: spec.to_json()}}


def memory_vector(models: Any, width: int, on_disk: bool | None = None) -> Any:
    """Fetched by id, never searched: no graph."""
    return models.VectorParams(
        size=width,
        distance=models.Distance.DOT,
        datatype=models.Datatype.FLOAT16,
        multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
        hnsw_config=models.HnswConfigDiff(m=0),
        on_disk=on_disk,
    )
