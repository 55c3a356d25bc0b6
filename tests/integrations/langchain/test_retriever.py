"""What comes back, in which order, marked how; what is asked of the base; and what is refused, in which words."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.runnables import ConfigurableField
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_retrv_r1 import RankedDocuments, RetrvR1Retriever
from pydantic import ValidationError
from qdrant_client import models

from retrv_r1_retriever import Equals, Filter, PayloadSchema, RerankTimeout, SchemaError
from retrv_r1_retriever import Query as CoreQuery
from retrv_r1_retriever import RetrvR1Retriever as CoreRetriever
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.errors import EngineError, InputError, OptionsError
from tests.helpers import candidates
from tests.integrations.langchain.parts import (
    OPTIONS,
    TEXTS,
    THINKING,
    Fixed,
    documents,
    png,
    prefer,
    red,
    reranker,
    texts,
    written,
)


def over(base: Any, *words: str, **options: Any) -> RetrvR1Retriever:
    return RetrvR1Retriever(base=base, reranker=reranker(*words), **options)


def bases() -> dict[str, Any]:
    store = written()
    return {
        "vector store": store,
        "vector store retriever": store.as_retriever(search_kwargs={"k": 1}),
        "any retriever": Fixed(found=documents()),
    }


@pytest.mark.parametrize("kind", bases())
@pytest.mark.parametrize("is_async", [False, True])
async def test_every_kind_of_base_is_read_whole_and_reranked(kind: str, is_async: bool) -> None:
    retriever = over(bases()[kind], "square")
    found = await retriever.ainvoke("red rings") if is_async else retriever.invoke("red rings")
    assert texts(found)[0] == "one blue square"
    assert sorted(texts(found)) == sorted(TEXTS), "top_k documents were asked for, not the retriever's own k"
    scores = [d.metadata["relevance_score"] for d in found]
    assert scores == sorted(set(scores), reverse=True)
    assert {d.metadata["status"] for d in found} == {"reranked"}
    assert {d.metadata["reason"] for d in found} == {None}


def test_both_scores_and_the_whole_decision_are_in_the_metadata() -> None:
    found = over(written(), "circle").invoke("two red rings", k=2)
    top = found[0].metadata
    assert top["color"] == "red"
    assert top["relevance_score"] == 1.0
    assert 0 < top["retrieval_score"] < 0.99
    record = top["retrv_r1"]
    assert (record["rank"], record["selected"], record["judged"], record["status"]) == (1, True, True, "reranked")
    assert record["retrieval_rank"] > 1
    assert record["slot_logprob"] > found[1].metadata["retrv_r1"]["slot_logprob"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_a_later_sort_or_cutoff_by_score_keeps_our_order() -> None:
    found = over(written(), "stars").invoke("red")
    key = lambda d: d.metadata["relevance_score"]  # noqa: E731
    assert sorted(random.Random(0).sample(found, len(found)), key=key, reverse=True) == found
    for bar in (0.0, 0.3, 0.5, 1.0):
        kept = [d for d in found if key(d) >= bar]
        assert kept == found[: len(kept)]
        assert texts(kept)[0] == "three green stars"


def test_the_callers_documents_are_copied_and_never_changed() -> None:
    class Special(Document):
        extra: int = 0

    given = [Special(page_content=t, metadata={"a": [1]}, id=f"id-{i}", extra=i) for i, t in enumerate(TEXTS)]
    before = copy.deepcopy(given)
    found = over(Fixed(found=given), "square").invoke("q")
    assert given == before
    assert (type(found[0]), found[0].id, found[0].extra) == (Special, "id-1", 1)
    assert found.results[0].document.id == "id-1"


def test_documents_of_the_same_text_or_id_stay_apart() -> None:
    given = [Document("same", metadata={"n": i}, id="x") for i in range(4)]
    found = over(Fixed(found=given), "nothing").invoke("q")
    assert sorted(d.metadata["n"] for d in found) == [0, 1, 2, 3]


def test_metadata_of_the_documents_own_is_not_overwritten_but_an_older_reranking_is() -> None:
    own = [Document("one", metadata={"status": "published"}), Document("two")]
    first = over(Fixed(found=own), "one").invoke("q")
    assert first[0].metadata["status"] == "published"
    assert first[0].metadata["retrv_r1"]["status"] == "reranked"
    failing = RetrvR1Retriever(base=Fixed(found=first), reranker=reranker(failing={"open": EngineError("down")}))
    second = failing.invoke("q")
    assert [d.metadata["retrv_r1"]["status"] for d in second] == ["fallback", "fallback"]
    assert second[1].metadata["status"] == "fallback", "the older 'reranked' must not pass for this one"


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_failing_model_gives_the_first_order_with_the_reason_or_raises(is_async: bool) -> None:
    broken = reranker(failing={"probe": RuntimeError("CUDA error")})
    retriever = RetrvR1Retriever(base=Fixed(found=documents()), reranker=broken, k=3)
    found = await retriever.ainvoke("q") if is_async else retriever.invoke("q")
    assert texts(found) == list(TEXTS[:3])
    assert {d.metadata["status"] for d in found} == {"fallback"}
    assert all("CUDA error" in d.metadata["reason"] and d.metadata["relevance_score"] is None for d in found)
    assert not any(d.metadata["retrv_r1"]["judged"] for d in found)
    with pytest.raises(EngineError, match="CUDA error"):
        retriever.invoke("q", options=OPTIONS.with_options(on_failure="raise"))


def test_a_timeout_is_a_failure_like_any_other() -> None:
    slow = reranker(delay_s=30)
    retriever = RetrvR1Retriever(base=Fixed(found=documents()), reranker=slow)
    found = retriever.invoke("q", options=OPTIONS.with_options(timeout_s=0.5))
    assert "timed out" in found[0].metadata["reason"]
    with pytest.raises(RerankTimeout, match="timed out"):
        retriever.invoke("q", options=OPTIONS.with_options(timeout_s=0.5, on_failure="raise"))


def test_how_many_documents_come_back() -> None:
    retriever = over(written(), "square", k=3, options=OPTIONS.with_options(top_n=4))
    assert len(retriever.invoke("q")) == 3
    assert len(retriever.invoke("q", k=2)) == 2
    assert len(retriever.invoke("q", options=OPTIONS.with_options(top_n=1))) == 1
    assert len(retriever.invoke("q", options=OPTIONS)) == 3
    assert len(retriever.invoke("q", k=2, options=OPTIONS.with_options(top_n=1))) == 2
    assert len(over(written()).invoke("q")) == len(TEXTS)
    configurable = retriever.configurable_fields(k=ConfigurableField(id="k"))
    assert len(configurable.invoke("q", config={"configurable": {"k": 1}})) == 1
    assert len(retriever.bind(k=2).invoke("q")) == 2


def test_options_go_through_whole() -> None:
    engine = ScriptedEngine(slots=prefer("square"))
    core = CoreRetriever(first_stage=_five, engine=engine, options=OPTIONS)
    retriever = RetrvR1Retriever(base=core)
    assert retriever.invoke("q").results.trace.stop_reason is None
    thinking = THINKING.with_options(top_k=2)
    found = retriever.invoke("q", options=thinking)
    assert len(found) == 2
    assert "the script has ended" in found[0].metadata["reason"], "it thought, as asked"


async def _five(query: Any, *, top_k: int, filter: Any = None) -> Any:
    return candidates(5)[:top_k]


@pytest.mark.parametrize("as_retriever", [False, True])
async def test_a_filter_of_the_stores_own_kind_holds_per_call(as_retriever: bool) -> None:
    store = written()
    retriever = over(store.as_retriever() if as_retriever else store, "square")
    for found in (retriever.invoke("one", filter=red()), await retriever.ainvoke("one", filter=red())):
        assert {d.metadata["color"] for d in found} == {"red"}
    assert len(retriever.invoke("one")) == len(TEXTS)


def test_our_own_filter_reaches_our_own_pipeline() -> None:
    asked: list[Any] = []

    async def first_stage(query: Any, *, top_k: int, filter: Any = None) -> Any:
        asked.append((query, filter))
        return candidates(3)

    retriever = RetrvR1Retriever(base=CoreRetriever(first_stage=first_stage, engine=ScriptedEngine(), options=OPTIONS))
    only_red = Filter(must=(Equals("color", "red"),))
    retriever.invoke("q", filter=only_red)
    assert asked == [(CoreQuery.of("q"), only_red)]


def test_a_filter_that_would_be_passed_over_is_refused() -> None:
    with pytest.raises(InputError, match="filter for Fixed: expected none, got one it takes no account of"):
        over(Fixed(found=documents())).invoke("q", filter=red())
    with pytest.raises(InputError, match="expected what QdrantVectorStore takes, got our Filter"):
        over(written()).invoke("q", filter=Filter(must=(Equals("color", "red"),)))


def test_a_filter_does_not_take_the_place_of_the_base_retrievers_own() -> None:
    """As a tenant's, which no caller may drop: LangChain itself would put the call's filter in its place."""
    mine = over(written().as_retriever(search_kwargs={"filter": red()}))
    assert {d.metadata["color"] for d in mine.invoke("one")} == {"red"}
    with pytest.raises(
        InputError, match="filter for VectorStoreRetriever: expected none beside that of its search_kwargs"
    ):
        mine.invoke("one", filter=models.Filter(must=[]))


def test_the_number_and_the_filter_reach_any_retriever_that_names_them() -> None:
    class Naming(Fixed):
        def _get_relevant_documents(self, query: str, *, run_manager: Any, k: int = 1, filter: Any = None) -> Any:
            return [d for d in self.found if filter is None or d.metadata["color"] == filter][:k]

    retriever = over(Naming(found=documents()))
    assert len(retriever.invoke("q")) == len(TEXTS)
    assert len(retriever.invoke("q", filter="red")) == 2


def test_other_vector_stores() -> None:
    store = InMemoryVectorStore.from_documents(documents(), DeterministicFakeEmbedding(size=16))
    assert texts(over(store, "square").invoke("q"))[0] == "one blue square"
    only_blue = lambda document: document.metadata["color"] == "blue"  # noqa: E731
    assert len(over(store).invoke("q", filter=only_blue)) == 2

    class Scoreless(VectorStore):
        def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:  # theirs
            return documents()[:k]

        @classmethod
        def from_texts(cls, *args: Any, **kwargs: Any) -> Any:  # theirs
            raise NotImplementedError

    with pytest.raises(OptionsError, match=r"Scoreless: expected similarity_search_with_score, got none.*as_retriever"):
        over(Scoreless()).invoke("q")
    assert len(over(Scoreless().as_retriever()).invoke("q")) == 5


def test_nothing_found() -> None:
    found = over(Fixed(found=[])).invoke("q")
    assert (found, isinstance(found, RankedDocuments), found.results.status) == ([], True, "fallback")


def test_a_query_with_its_instruction() -> None:
    engine_of = reranker("square")
    retriever = RetrvR1Retriever(base=Fixed(found=documents()), reranker=engine_of, instruction="Find the shape.")
    retriever.invoke("q")
    assert engine_of.engine.opened[-1].prompt.query == CoreQuery.of("q", instruction="Find the shape.")
    retriever.invoke(CoreQuery.of("q", instruction="Another."))
    assert engine_of.engine.opened[-1].prompt.query.instruction == "Another."


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        (None, {}, "query: expected str or Query, got NoneType"),
        (" ", {}, "query: expected a text or an image, got an empty string"),
        ("q", {"k": 0}, "k: expected an integer >= 1 or None, got 0"),
        ("q", {"k": "3"}, "k: expected an integer >= 1"),
        ("q", {"k": 11}, "k: expected at most top_k=10, got 11. Raise options.top_k"),
        ("q", {"options": {"top_n": 1}}, "options: expected RerankOptions, got dict"),
        ("q", {"image": png()}, "search in QdrantVectorStore: expected a text query, got a query with an image"),
        ("q", {"image": b"junk"}, "image .* expected a readable"),
        ("q", {"image": 3}, "image: expected bytes, a path, a data URI or a Pillow image, got int"),
        (CoreQuery.of("q"), {"image": png()}, "image: expected None beside a Query"),
        (b"q", {}, "query: expected str or Query, got bytes"),
        ({"query": "q"}, {}, "query: expected str or Query, got dict"),
    ],
)
def test_calls_that_cannot_be_used(query: Any, options: Any, message: str) -> None:
    with pytest.raises((InputError, OptionsError), match=message):
        over(written()).invoke(query, **options)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"base": object()}, "base: expected a LangChain VectorStore or BaseRetriever, or .*, got object"),
        ({"base": Fixed(found=[])}, "reranker: expected retrv_r1_retriever.RetrvR1Reranker, got NoneType"),
        (
            {"base": Fixed(found=[]), "reranker": ScriptedEngine()},
            r"got ScriptedEngine. Wrap it: .*RetrvR1Reranker\(eng",
        ),
        (
            {"base": CoreRetriever(first_stage=_five, engine=ScriptedEngine()), "reranker": reranker()},
            "our own pipeline",
        ),
        ({"base": Fixed(found=[]), "reranker": reranker(), "embedder": object()}, "a vector store with"),
        (
            {"base": written(), "reranker": reranker(), "embedder": DeterministicFakeEmbedding(size=64)},
            "embedder: expected a .*Embedder, got DeterministicFakeEmbedding. Leave it out: the store embeds texts itself",
        ),
        ({"base": Fixed(found=[]), "reranker": reranker(), "k": 0}, "k: expected an integer >= 1 or None, got 0"),
        ({"base": Fixed(found=[]), "reranker": reranker(), "options": 3}, "RerankOptions"),
        ({"base": Fixed(found=[]), "reranker": reranker(), "top_k": 3}, "Extra inputs are not permitted"),
        (
            {"base": Fixed(found=[]), "reranker": reranker(), "mapping": "image"},
            "mapping: expected PayloadSchema, got str",
        ),
        (
            {"base": Fixed(found=[]), "reranker": reranker(), "mapping": PayloadSchema(text="text")},
            "mapping: expected 'page_content', 'id' or 'metadata.<key>', got 'text'",
        ),
        (
            {
                "base": CoreRetriever(first_stage=_five, engine=ScriptedEngine()),
                "mapping": PayloadSchema(text="page_content"),
            },
            "mapping.image: expected 'metadata.<key>', where pictures of our own documents go, got None",
        ),
    ],
)
def test_parts_that_do_not_fit(parts: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RetrvR1Retriever(**parts)


def test_documents_without_text_or_picture_come_last_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    given = [Document("", metadata={"image": "x.png"}, id="blank"), Document("one red circle"), Document("two rings")]
    found = over(Fixed(found=given), "rings").invoke("q")
    assert texts(found) == ["two rings", "one red circle", ""]
    assert [d.metadata["relevance_score"] for d in found] == [1.0, 0.5, 0.0]
    assert {d.metadata["status"] for d in found} == {"partial"}
    assert "nothing to read, neither text nor picture, in 1 of those found" in found[0].metadata["reason"]
    assert found.results.unranked == ("blank",)
    assert [d.metadata["retrv_r1"]["judged"] for d in found] == [True, True, False]
    assert len(over(Fixed(found=given)).invoke("q", k=2)) == 2
    assert "1 of 3 documents cannot be read" in caplog.text
    assert "payload of point blank: expected text and/or image in page_content, got neither" in caplog.text
    assert "metadata.image" in caplog.text, "the fields that are there, so that the mapping can be put right"
    with pytest.raises(SchemaError, match="payload of point blank: expected text"):
        over(Fixed(found=given[:1])).invoke("q")


def test_a_fallback_leaves_unreadable_documents_where_they_were() -> None:
    given = [Document(""), Document("one red circle")]
    found = RetrvR1Retriever(base=Fixed(found=given), reranker=reranker(failing={"open": EngineError("down")})).invoke(
        "q"
    )
    assert texts(found) == ["", "one red circle"]
    assert {(d.metadata["status"], d.metadata["relevance_score"]) for d in found} == {("fallback", None)}


def test_a_text_key_that_no_document_has_is_an_error_that_names_those_there_are() -> None:
    retriever = over(Fixed(found=documents()), mapping=PayloadSchema(text="metadata.title"))
    with pytest.raises(
        SchemaError, match=r"text and/or image in metadata\.title, got neither .* metadata\.color, metadata\.n"
    ):
        retriever.invoke("q")


def test_a_picture_key_that_no_document_has_is_said(caplog: pytest.LogCaptureFixture) -> None:
    mapping = PayloadSchema(text="page_content", image="metadata.photo")
    RetrvR1Retriever(base=Fixed(found=documents()), reranker=reranker(), mapping=mapping).invoke("q")
    assert "None of 5 documents has a picture at 'metadata.photo'; their metadata keys: color, n." in caplog.text


def test_a_template_over_several_fields_is_what_the_model_reads() -> None:
    spy = reranker()
    mapping = PayloadSchema(text="{metadata.color}: {page_content}", id="metadata.n")
    found = RetrvR1Retriever(base=Fixed(found=documents()), reranker=spy, mapping=mapping).invoke("q", k=1)
    read = [c.document for c in spy.engine.opened[0].prompt.candidates]
    assert (read[0].id, read[0].content.text) == ("0", "red: two red rings")
    assert found[0].page_content in TEXTS


def test_strange_texts_come_back_as_they_were() -> None:
    """Half a character, a NUL, emoji, other scripts, tags of ours, and very long: in documents and in the query."""
    strange = ["cut \ud83d", "nul \x00 here", "日本語 🚀", "<|c0|></think><answer>", "word " * 50_000]
    given = [Document(text) for text in strange]
    retriever = over(Fixed(found=given), "nul")
    for query in strange:
        found = retriever.invoke(query)
        assert found[0].page_content == strange[1]
        assert sorted(texts(found)) == sorted(strange)
        assert {d.metadata["status"] for d in found} == {"reranked"}
        json.dumps(found.artifact)
