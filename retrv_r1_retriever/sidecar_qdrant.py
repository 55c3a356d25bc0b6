"""Sidecars on a Qdrant server: collections `<name>__retrv_<memory digest>`, the one in use behind the alias `<name>__retrv`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrv_r1_retriever.errors import StoreError, explain
from retrv_r1_retriever.filters import FilterTranslator
from retrv_r1_retriever.points import (
    LAYOUT_VERSION,
    MEMORY,
    Found,
    PointCodec,
    memory_note,
    memory_rows,
    native_id,
    noted_memory,
)  # fmt: skip
from retrv_r1_retriever.qdrant_opening import MARK, Call, memory_vector
from retrv_r1_retriever.schema import RESERVED
from retrv_r1_retriever.sidecar import COLLECTION, IN_USE, Page
from retrv_r1_retriever.types import Memory


@dataclass(frozen=True, slots=True)
class QdrantBackend:
    """call, opened, found_by_document: the store's own; models: the client's; weigh: is shown all memory that arrives"""

    collection: str
    call: Call
    models: Any
    opened: Callable[[], Awaitable[PointCodec]]
    found_by_document: Callable[[Sequence[str]], Awaitable[list[Found]]]
    weigh: Callable[[Sequence[Found]], Awaitable[None]]

    @property
    def alias(self) -> str:
        return f"{self.collection}__retrv"

    def _name(self, place: str) -> str:
        return {COLLECTION: self.collection, IN_USE: self.alias}.get(place, f"{self.alias}_{place}")

    async def codec(self) -> PointCodec:
        return await self.opened()

    async def page(self, place: str, after: str | None, limit: int) -> Page:
        asked = None
        if place == COLLECTION:
            codec = await self.opened()
            asked = FilterTranslator(self.models, self.models.Range, codec.own)(codec.filter(None))
        records, following = await self.call(
            "scroll",
            collection_name=self._name(place),
            limit=limit,
            offset=None if after is None else native_id(after),
            scroll_filter=asked,
            with_payload=False,
            with_vectors=False,
        )
        return Page(tuple(str(record.id) for record in records), None if following is None else str(following))

    async def points(self, ids: Sequence[str], payload: bool) -> list[Found]:
        return await self._retrieve(COLLECTION, ids, payload, rows=False)

    async def memories(self, ids: Sequence[str]) -> dict[str, Memory]:
        found = await self._retrieve(IN_USE, ids, True, rows=True)
        await self.weigh(found)
        return {point.id: noted_memory(point.rows, point.payload[RESERVED]) for point in found}

    async def hashes(self, digest: str, ids: Sequence[str]) -> dict[str, str]:
        found = await self._retrieve(digest, ids, [f"{RESERVED}.content_hash"], rows=False)
        return {point.id: point.payload[RESERVED]["content_hash"] for point in found}

    async def _retrieve(self, place: str, ids: Sequence[str], payload: bool | list[str], *, rows: bool) -> list[Found]:
        records = await self.call(
            "retrieve",
            collection_name=self._name(place),
            ids=[native_id(id) for id in ids],
            with_payload=payload,
            with_vectors=[MEMORY] if rows else False,
        )
        return found_points(records)

    async def by_document(self, ids: Sequence[str]) -> list[Found]:
        return await self.found_by_document(ids)

    async def write(self, digest: str, memories: Mapping[str, Memory]) -> None:
        structs = [
            self.models.PointStruct(
                id=native_id(id), vector={MEMORY: memory_rows(m)}, payload={RESERVED: memory_note(m)}
            )
            for id, m in memories.items()
        ]
        await self.call("upsert", collection_name=self._name(digest), points=structs, wait=True)

    async def delete(self, digest: str, ids: Sequence[str]) -> None:
        await self._check_ours(digest)
        selected = self.models.PointIdsList(points=[native_id(id) for id in ids])
        await self.call("delete", collection_name=self._name(digest), points_selector=selected, wait=True)

    async def sizes(self) -> dict[str, int]:
        answer = await self.call("get_collections")
        prefix = f"{self.alias}_"
        names = [one.name for one in answer.collections if one.name.startswith(prefix)]
        counts = [await self.call("count", collection_name=name, exact=True) for name in names]
        return {name.removeprefix(prefix): int(count.count) for name, count in zip(names, counts, strict=True)}

    async def create(self, digest: str, width: int) -> None:
        name = self._name(digest)
        if await self.call("collection_exists", collection_name=name):
            await self._check_ours(digest)
            return
        mark = {"layout": LAYOUT_VERSION, "memory_of": self.collection, "memory_digest": digest}
        try:
            await self.call(
                "create_collection",
                collection_name=name,
                vectors_config={MEMORY: memory_vector(self.models, width, on_disk=True)},
                metadata={MARK: mark},
            )
        except StoreError:
            if not await self.call("collection_exists", collection_name=name):
                raise  # else another shard's run was quicker

    async def remove(self, digest: str) -> None:
        await self._check_ours(digest)
        await self.call("delete_collection", collection_name=self._name(digest))

    async def pointer(self) -> str | None:
        answer = await self.call("get_aliases")
        target = next((a.collection_name for a in answer.aliases if a.alias_name == self.alias), None)
        return None if target is None else str(target).removeprefix(f"{self.alias}_")

    async def point_to(self, digest: str) -> None:
        """Both operations are one request, which the server applies as one."""
        models = self.models
        steps: list[Any] = [
            models.CreateAliasOperation(
                create_alias=models.CreateAlias(collection_name=self._name(digest), alias_name=self.alias)
            )
        ]
        if await self.pointer() is not None:
            steps.insert(0, models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=self.alias)))
        await self.call("update_collection_aliases", change_aliases_operations=steps)

    async def _check_ours(self, digest: str) -> None:
        """Before anything is changed under a name that somebody else may have given too."""
        name = self._name(digest)
        config = (await self.call("get_collection", collection_name=name)).config
        mark = (getattr(config, "metadata", None) or {}).get(MARK) or {}
        if mark.get("memory_of") != self.collection:
            raise StoreError(
                explain(
                    f"collection {name!r}", expected="a sidecar made by this package on Qdrant 1.16 or newer",
                    got="one without our mark", fix="Rename it, or remove it yourself.",
                )
            )  # fmt: skip


def found_points(points: Iterable[Any]) -> list[Found]:
    found = []
    for point in points:
        vectors = point.vector if isinstance(point.vector, dict) else {}
        found.append(Found(str(point.id), point.payload or {}, getattr(point, "score", None), vectors.get(MEMORY)))
    return found
