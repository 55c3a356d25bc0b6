"""Input that cannot be used: a clear error or a documented result, and nothing silent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_index.core.schema import BaseNode, ImageNode, Node, NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from llama_index.vector_stores.qdrant import QdrantVectorStore
from llama_index_retrv_r1 import RerankQuery, RetrvR1Rerank, RetrvR1Retriever
from llama_index_retrv_r1.filters import to_filter
from qdrant_client import QdrantClient, models

from retrv_r1_retriever import (
    FAST,
    EngineError,
    Equals,
    Filter,
    InputError,
    OneOf,
    OptionsError,
    Range,
    RerankOptions,
    StoreError,
)
from retrv_r1_retriever import RetrvR1Retriever as Pipeline
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from tests.integrations.llama_index.parts import (
    DIM,
    Fixed,
    Words,
    embedded,
    make,
    reranker,
    scored,
    texts,
    vector,
)

EMPTY = [TextNode(id_="blank", text=" \n"), Node(id_="nothing"), ImageNode(id_="no picture", text="")]


def with_empty() -> list[NodeWithScore]:
    nodes: list[BaseNode] = [
        EMPTY[0],
        TextNode(id_="1", text="text 1"),
        EMPTY[1],
        TextNode(id_="2", text="text 2"),
        EMPTY[2],
    ]
    return scored(nodes)


@pytest.mark.parametrize("kind", ["retriever", "postprocessor"])
async def test_nodes_without_text_or_picture_come_last_and_are_named(kind: str) -> None:
    nodes = with_empty()
    if kind == "retriever":
        found: list[Any] = await RetrvR1Retriever(Fixed(nodes), reranker=reranker()).aretrieve("q")
    else:
        found = await RetrvR1Rerank(reranker()).apostprocess_nodes(nodes, query_str="q")
    assert [n.node_id for n in found] == ["2", "1", "blank", "nothing", "no picture"]
    assert [n.score for n in found] == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert found[0].metadata["status"] == "partial"
    assert "nothing to read, neither text nor picture, in 3 of those found" in found[0].metadata["reason"]
    assert found[0].results.unranked == ("blank", "nothing", "no picture")
    assert found[2].metadata["retrieval_score"] == 0.9


async def test_a_fallback_leaves_them_where_they_were() -> None:
    broken = reranker(failing={"open": EngineError("no model")})
    found: list[Any] = await RetrvR1Rerank(broken).apostprocess_nodes(with_empty(), query_str="q")
    assert [n.node_id for n in found] == ["blank", "1", "nothing", "2", "no picture"]
    assert {n.score for n in found} == {None}
    assert {n.metadata["status"] for n in found} == {"fallback"}
    cut = await RetrvR1Rerank(broken, options=FAST.with_options(top_n=2)).apostprocess_nodes(
        with_empty(), query_str="q"
    )
    assert [n.node_id for n in cut] == ["blank", "1"]


async def test_only_unreadable_nodes_are_a_fallback() -> None:
    found: list[Any] = await RetrvR1Rerank(reranker()).apostprocess_nodes(scored(EMPTY), query_str="q")
    assert [n.node_id for n in found] == ["blank", "nothing", "no picture"]
    assert {n.metadata["status"] for n in found} == {"fallback"}


@pytest.mark.parametrize("query", [None, 3, "", " ", QueryBundle(""), QueryBundle(None)])  # type: ignore[arg-type]
async def test_no_query_is_an_error(query: Any) -> None:
    retriever, rerank = RetrvR1Retriever(Fixed(scored(texts(2))), reranker=reranker()), RetrvR1Rerank(reranker())
    with pytest.raises(InputError, match=r"expected .*(text|QueryBundle|str)"):
        retriever.retrieve(query)
    with pytest.raises(InputError, match=r"expected .*(text|QueryBundle|str)"):
        await retriever.aretrieve(query)
    if isinstance(query, QueryBundle) or query is None:
        with pytest.raises(InputError, match=r"expected .*(text|QueryBundle)"):
            rerank.postprocess_nodes(scored(texts(2)), query)


@pytest.mark.parametrize("form", ["sync", "async"])
async def test_arguments_of_another_type_are_named(form: str, tmp_path: Path) -> None:
    async def retrieve(retriever: RetrvR1Retriever, query: Any = "text 1", **more: Any) -> Any:
        return retriever.retrieve(query, **more) if form == "sync" else await retriever.aretrieve(query, **more)

    retriever = RetrvR1Retriever(Fixed(scored(texts(2))), reranker=reranker())
    for options in ({"options": {"top_n": 1}}, {"query": RerankQuery("q", options={"top_n": 1})}):  # type: ignore[arg-type]
        with pytest.raises(OptionsError, match="options: expected RerankOptions, got dict"):
            await retrieve(retriever, **options)
    for source in ("qdrant", "own", "custom"):
        over = await make(source, texts(2), tmp_path)
        for filters in ({"even": 1}, "even", [1]):
            with pytest.raises(InputError, match="filters: expected MetadataFilters, got"):
                await retrieve(over, filters=filters)
    with pytest.raises(InputError, match="image: expected bytes, a path, a data URI or a Pillow image, got int"):
        await retrieve(retriever, image=3)


def test_parts_of_another_type_are_named() -> None:
    options: Any = {"top_n": 1}
    for build in (
        lambda: RetrvR1Retriever(Fixed([]), reranker=reranker(), options=options),
        lambda: RetrvR1Rerank(reranker(), options=options),
    ):
        with pytest.raises(OptionsError, match="options: expected RerankOptions, got dict"):
            build()
    with pytest.raises(ValueError, match="'junk' is not a valid MetadataMode"):
        RetrvR1Rerank(reranker(), metadata_mode="junk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'junk' is not a valid MetadataMode"):
        RetrvR1Retriever(Fixed([]), reranker=reranker(), metadata_mode="junk")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"nodes: expected NodeWithScore, got TextNode\. Wrap it"):
        RetrvR1Rerank(reranker()).postprocess_nodes(texts(2), query_str="q")  # type: ignore[arg-type]


def test_embed_models_as_llama_index_takes_them() -> None:
    store = QdrantVectorStore("things", client=QdrantClient(":memory:"))
    with pytest.raises(OptionsError, match=r"embed_model: expected a BaseEmbedding or our Embedder, got function"):
        RetrvR1Retriever(store, reranker=reranker(), embed_model=lambda texts: texts)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match="llama-index-embeddings-huggingface"):  # LlamaIndex's own words for a name
        RetrvR1Retriever(store, reranker=reranker(), embed_model="local")


def test_strange_texts_come_back_as_they_were() -> None:
    """Half a character, a NUL, emoji, other scripts, tags of ours, and very long: in nodes and in the query."""
    strange = ["cut \ud83d", "nul \x00 text 9", "日本語 🚀", "<|c0|></think><answer>", "word " * 50_000]
    nodes = scored([TextNode(text=text) for text in strange])
    for query in strange:
        found = RetrvR1Rerank(reranker()).postprocess_nodes(nodes, query_str=query)
        assert found[0].node is nodes[1].node
        assert {n.get_content() for n in found} == set(strange)
        assert {n.metadata["status"] for n in found} == {"reranked"}


def test_top_k_and_top_n_of_zero_are_errors() -> None:
    for options in ({"top_k": 0}, {"top_n": 0}):
        with pytest.raises(OptionsError, match="expected an integer"):
            RerankOptions(**options)  # type: ignore[arg-type]


async def test_more_nodes_than_labels_is_an_error() -> None:
    with pytest.raises(InputError, match="expected at most 127, got 128"):
        await RetrvR1Rerank(reranker()).apostprocess_nodes(scored(texts(128)), query_str="q")


@pytest.mark.parametrize("form", ["sync", "async"])
async def test_an_embedder_of_another_size(form: str) -> None:
    class Short(Words):
        def _get_query_embedding(self, query: str) -> list[float]:
            return [1.0, 0.0]

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return [1.0, 0.0]

    store = QdrantVectorStore("things", client=QdrantClient(":memory:"))
    store.add(embedded(texts(3)))
    retriever = RetrvR1Retriever(store, reranker=reranker(), embed_model=Short())
    with pytest.raises(StoreError, match="embed_model is the one the collection was written with"):
        retriever.retrieve("q") if form == "sync" else await retriever.aretrieve("q")


def test_payload_keys_that_llama_index_does_not_know() -> None:
    client = QdrantClient(":memory:")
    client.create_collection("things", vectors_config=models.VectorParams(size=DIM, distance=models.Distance.COSINE))
    client.upsert("things", [models.PointStruct(id=1, vector=vector(b"x"), payload={"body": "text 1", "sku": 7})])
    options: dict[str, Any] = {"reranker": reranker(), "embed_model": Words()}
    with pytest.raises(StoreError, match="that text_key names the payload's text"):
        RetrvR1Retriever(QdrantVectorStore("things", client=client), **options).retrieve("q")
    [found] = RetrvR1Retriever(QdrantVectorStore("things", client=client, text_key="body"), **options).retrieve("q")
    assert (found.get_content(), found.metadata["sku"], found.metadata["status"]) == ("text 1", 7, "reranked")


async def test_a_missing_collection_is_an_error_and_is_not_made() -> None:
    client = QdrantClient(":memory:")
    retriever = RetrvR1Retriever(QdrantVectorStore("nowhere", client=client), reranker=reranker(), embed_model=Words())
    with pytest.raises(StoreError, match="not found"):
        await retriever.aretrieve("q")
    assert not client.collection_exists("nowhere")


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    pipeline = Pipeline(first_stage=no_stage, reranker=reranker())
    for source, options, message in (
        (Fixed([]), {}, "reranker: expected retrv_r1_retriever.RetrvR1Reranker, got NoneType"),
        (Fixed([]), {"reranker": ScriptedEngine()}, r"got ScriptedEngine. Wrap it: .*RetrvR1Reranker\(engine"),
        (Fixed([]), {"reranker": "jina"}, "reranker: expected retrv_r1_retriever.RetrvR1Reranker, got str"),
        (Fixed([]), {"reranker": reranker(), "embed_model": Words()}, "only a vector store needs one"),
        (pipeline, {"reranker": reranker()}, "a RetrvR1Retriever has its own"),
        ("things", {"reranker": reranker()}, "base: expected a vector store, a BaseRetriever"),
    ):
        with pytest.raises(OptionsError, match=message):
            RetrvR1Retriever(source, **options)  # type: ignore[arg-type]


async def no_stage(query: Any, *, top_k: int, filter: Any = None) -> list[Any]:
    return []


# -- filters for our own store -----------------------------------------------------------------------------------------


def one(key: str, value: Any, operator: FilterOperator = FilterOperator.EQ) -> MetadataFilter:
    return MetadataFilter(key=key, value=value, operator=operator)


def test_filters_in_our_words() -> None:
    op = FilterOperator
    given = [
        one("a", 1),
        one("b", 2.5),
        one("c", ["x"], op.IN),
        one("d", 3, op.GTE),
        one("e", "y", op.NE),
        one("f", ["z"], op.NIN),
    ]
    assert to_filter(MetadataFilters(filters=given)) == Filter(
        must=(Equals("a", 1), Range("b", gte=2.5, lte=2.5), OneOf("c", ("x",)), Range("d", gte=3)),
        must_not=(Equals("e", "y"), OneOf("f", ("z",))),
    )
    two = [one("a", 1), one("a", 2)]
    assert to_filter(MetadataFilters(filters=two, condition=FilterCondition.OR)) == Filter(
        should=(Equals("a", 1), Equals("a", 2))
    )
    assert to_filter(MetadataFilters(filters=two, condition=FilterCondition.NOT)) == Filter(
        must_not=(Equals("a", 1), Equals("a", 2))
    )
    assert to_filter(ours := Filter(must=(Equals("a", 1),))) is ours


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (MetadataFilters(filters=[MetadataFilters(filters=[one("a", 1)])]), "nested filters"),
        (MetadataFilters(filters=[one("a", "x", FilterOperator.TEXT_MATCH)]), "text_match with 'x'"),
        (MetadataFilters(filters=[one("a", None, FilterOperator.IS_EMPTY)]), "is_empty with None"),
        (MetadataFilters(filters=[one("a", 1, FilterOperator.NE)], condition=FilterCondition.OR), "!= or nin under or"),
    ],
)
def test_filters_our_stores_do_not_have(filters: MetadataFilters, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_filter(filters)


async def test_our_own_filter_goes_to_our_own_store_only(tmp_path: Path) -> None:
    only = Filter(must=(Equals("even", 1),))
    found = await (await make("own", texts(4), tmp_path)).aretrieve("text 1", filters=only)
    assert [n.get_content() for n in found] == ["text 3", "text 1"]
    with pytest.raises(InputError, match="expected MetadataFilters, got Filter"):
        await (await make("qdrant", texts(4), tmp_path)).aretrieve("text 1", filters=only)


def test_a_bundle_with_everything_is_still_a_bundle() -> None:
    bundle = RerankQuery("q", image=np.zeros(0).tobytes(), options=FAST)
    assert isinstance(bundle, QueryBundle)
    assert bundle.embedding_strs == ["q"]


def test_without_llama_index_the_extra_is_named() -> None:
    code = "import sys; sys.modules['llama_index'] = None; import llama_index_retrv_r1"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'retrv-r1-retriever[llamaindex]'" in done.stderr
