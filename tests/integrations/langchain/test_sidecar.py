"""Collections of langchain-qdrant with memory built beside them: every candidate is judged, and nothing is made per query."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_qdrant import QdrantVectorStore
from langchain_retrv_r1 import RetrvR1Reranker as Compressor
from langchain_retrv_r1 import RetrvR1Retriever

from retrv_r1_retriever import LocalImages, PayloadSchema, RetrvR1Reranker
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.errors import StoreError
from retrv_r1_retriever.lazy import WriteBack
from retrv_r1_retriever.qdrant import QdrantStore
from retrv_r1_retriever.sidecar import Sidecars
from retrv_r1_retriever.sidecar_build import MemoryBuilder
from tests.first_stage.fakes import HashCompressor
from tests.integrations.langchain.parts import OPTIONS, contents, prefer, texts, written

TWELVE = [Document(f"card {i} of a set", metadata={"n": i}) for i in range(12)]


def sidecars_of(store: QdrantVectorStore, **schema: Any) -> Sidecars:
    schema = {"text": store.content_payload_key, "vector": store.vector_name, **schema}
    return QdrantStore("theirs", client=store.client, schema=PayloadSchema(**schema)).sidecars


async def build(sidecars: Sidecars) -> None:
    compressor = HashCompressor()
    await MemoryBuilder(sidecars, compressor, LocalImages()).build()
    await sidecars.switch(compressor.memory_digest)


def reranker(compressor: HashCompressor, sidecars: Sidecars | None, **more: Any) -> RetrvR1Reranker:
    engine = ScriptedEngine(slots=prefer("card 7"))
    return RetrvR1Reranker(
        engine, compressor=compressor, options=OPTIONS.with_options(top_k=12), sidecars=sidecars, **more
    )


@pytest.mark.parametrize("kind", ["dense", "named", "hybrid"])
async def test_with_memory_beside_it_all_candidates_are_judged(kind: str) -> None:
    store, compressor = written(kind, TWELVE), HashCompressor()
    bare = RetrvR1Retriever(base=store, reranker=reranker(compressor, None)).invoke("a card")
    assert (bare[0].metadata["status"], compressor.seen) == ("partial", 8)
    assert "4 of 12 candidates have no usable memory" in bare[0].metadata["reason"]

    before = contents(store.client)["theirs"]
    sidecars, compressor = sidecars_of(store), HashCompressor()
    await build(sidecars)
    ranked = reranker(compressor, sidecars)
    bare_ids = [
        d.model_copy(update={"id": d.metadata["_id"].replace("-", "")}) for d in store.similarity_search("a", k=12)
    ]
    for found in (
        Compressor(reranker=ranked).compress_documents(bare_ids, "a card"),
        RetrvR1Retriever(base=store, reranker=ranked).invoke("a card"),
        await RetrvR1Retriever(base=store.as_retriever(), reranker=ranked).ainvoke("a card"),
        Compressor(reranker=ranked).compress_documents(store.similarity_search("a card", k=12), "a card"),
    ):
        assert texts(found)[0] == "card 7 of a set"
        assert {d.metadata["status"] for d in found} == {"reranked"}
        assert len(found) == 12
        assert all(d.metadata["retrv_r1"]["judged"] for d in found)
    assert compressor.seen == 0
    assert contents(store.client)["theirs"] == before


async def test_documents_of_elsewhere_have_no_memory_there() -> None:
    sidecars = sidecars_of(written("dense", TWELVE))
    await build(sidecars)
    compressor = HashCompressor()
    given = [Document("a card", id="not-a-point"), Document("card 7"), Document("another", id="9")]
    found = Compressor(reranker=reranker(compressor, sidecars)).compress_documents(given, "a card")
    assert (found[0].metadata["status"], texts(found)[0], compressor.seen) == ("reranked", "card 7", 3)


async def test_ids_that_hide_the_points_are_said() -> None:
    """`mapping` may name an id of the application's; memory lies under the point's."""
    sidecars = sidecars_of(written("dense", TWELVE))
    await build(sidecars)
    given = [Document("card 7", metadata={"sku": f"s-{i}"}) for i in range(3)]
    mapping = PayloadSchema(text="page_content", id="metadata.sku")
    compressor = Compressor(reranker=reranker(HashCompressor(), sidecars), mapping=mapping)
    found = compressor.compress_documents(given, "a card")
    notes = " ".join(found.results.trace.notes)
    assert "3 candidates have ids that no point can have; memory beside the collection is found by point ids" in notes


async def test_ids_that_look_like_numbers_cost_nobody_the_memory() -> None:
    store = written("dense", TWELVE)
    sidecars = sidecars_of(store)
    await build(sidecars)
    strange = [Document(f"card 7 {i}", id=id) for i, id in enumerate(("007", "9" * 25, "9" * 5000, "²", "-3"))]
    compressor = HashCompressor()
    given = [*store.similarity_search("a card", k=6), *strange]
    found = Compressor(reranker=reranker(compressor, sidecars)).compress_documents(given, "a card")
    assert (found[0].metadata["status"], compressor.seen) == ("reranked", len(strange))
    assert "5 candidates have ids that no point can have" in " ".join(found.results.trace.notes)


async def test_memory_of_other_fields_is_not_used_and_said_so() -> None:
    store, compressor = written("dense", TWELVE), HashCompressor()
    sidecars = sidecars_of(store, text="{metadata.n}: {page_content}")
    await build(sidecars)
    found = RetrvR1Retriever(base=store, reranker=reranker(compressor, sidecars)).invoke("a card")
    assert (found[0].metadata["status"], compressor.seen) == ("partial", 8)
    assert "stored memory of 12 candidates is of other content" in " ".join(found.results.trace.notes)


async def test_a_sidecar_that_cannot_be_read_costs_its_memory_not_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    store = written("dense", TWELVE)
    sidecars = sidecars_of(store)
    await build(sidecars)

    async def fails(ids: Any) -> Any:
        raise StoreError("the server is gone")

    monkeypatch.setattr(sidecars, "fetch", fails)
    found = RetrvR1Retriever(base=store, reranker=reranker(HashCompressor(), sidecars)).invoke("a card")
    assert found[0].metadata["status"] == "partial"
    assert "memory beside the collection could not be read: the server is gone" in found.results.trace.notes


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
async def test_lazy_memory_grows_from_being_used(kind: str) -> None:
    store, compressor = written(kind, TWELVE), HashCompressor()
    before = contents(store.client)["theirs"]
    sidecars = sidecars_of(store)
    keep = WriteBack(sidecars)
    retriever = RetrvR1Retriever(base=store, reranker=reranker(compressor, sidecars, write_back=keep))
    states = []
    for _ in range(3):
        states.append((await retriever.ainvoke("a card"))[0].metadata["status"])
        await keep.flush()
    assert states == ["partial", "reranked", "reranked"]
    assert compressor.seen == 12
    assert contents(store.client)["theirs"] == before


def test_lazy_memory_of_sync_calls_is_finished_on_request() -> None:
    store, compressor = written("dense", TWELVE), HashCompressor()
    sidecars = sidecars_of(store)
    keep = WriteBack(sidecars)
    RetrvR1Retriever(base=store, reranker=reranker(compressor, sidecars, write_back=keep)).invoke("a card")
    asyncio.run(keep.flush())
    [one] = asyncio.run(sidecars.all())
    assert (one.points, one.in_use) == (8, True)


async def test_a_payload_that_changed_is_read_anew_and_said() -> None:
    store = written("dense", TWELVE)
    sidecars, compressor = sidecars_of(store), HashCompressor()
    await build(sidecars)
    point = next(p.id for p in store.client.scroll("theirs", limit=99)[0] if p.payload["metadata"]["n"] == 3)
    store.client.set_payload("theirs", {"page_content": "card 7 now"}, points=[point])
    found = RetrvR1Retriever(base=store, reranker=reranker(compressor, sidecars)).invoke("a card")
    assert (found[0].metadata["status"], compressor.seen) == ("reranked", 1)
    assert "card 7 now" in texts(found)[:2], "the model reads what is there now"
    assert "stored memory of 1 candidates is of other content" in " ".join(found.results.trace.notes)
    await MemoryBuilder(sidecars, HashCompressor(), LocalImages()).build()
    compressor = HashCompressor()
    again = RetrvR1Retriever(base=store, reranker=reranker(compressor, sidecars)).invoke("a card")
    assert (again[0].metadata["status"], compressor.seen) == ("reranked", 0)
