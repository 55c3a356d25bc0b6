"""Pictures from where they are kept, through the framework's document and the model, to the caller: the same pixels."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_retrv_r1 import RetrvR1Reranker, RetrvR1Retriever
from PIL import Image

from retrv_r1_retriever import Content, EdgeStore, Indexer, LocalImages, PayloadSchema
from retrv_r1_retriever import Document as CoreDocument
from retrv_r1_retriever import RetrvR1Retriever as CoreRetriever
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.errors import InputError
from retrv_r1_retriever.images import ImageSource
from retrv_r1_retriever.parser import Thought
from retrv_r1_retriever.points import CollectionSpec
from retrv_r1_retriever.remote_images import HttpImages
from retrv_r1_retriever.trace import Full
from tests.first_stage.fakes import HashCompressor, HashEmbedder
from tests.integrations.langchain.parts import OPTIONS, THINKING, Fixed, png, reranker, written
from tests.serving.http_stub import pictures_stub

COLOURS = [(250, 1, 2), (3, 240, 4), (5, 6, 230)]
MAPPING = PayloadSchema(text="page_content", image="metadata.picture")
FORMS = ("bytes", "path", "data URI", "Pillow", "URL")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    with pictures_stub(tmp_path) as url:
        yield url


def form(kind: str, data: bytes, folder: Path, name: str, web: str) -> Any:
    if kind == "bytes":
        return data
    if kind == "Pillow":
        return Image.open(io.BytesIO(data))
    if kind in ("data URI", "base64"):
        return ("" if kind == "base64" else "data:image/png;base64,") + base64.b64encode(data).decode()
    (folder / name).write_bytes(data)
    return f"{web}/{name}" if kind == "URL" else name


def sources(folder: Path) -> ImageSource:
    return HttpImages(["127.0.0.1"], then=LocalImages(folder))


def opening() -> ScriptedEngine:
    """Opens every candidate: what it is shown is in its handle."""
    return ScriptedEngine(Thought("x", (), tuple(_check(i) for i in range(3)), 1), slots=(0, 0, 0, -9))


def _check(index: int) -> Any:
    from retrv_r1_retriever.parser import Check

    return Check(index, "looks right", True)


def shown(engine: ScriptedEngine) -> dict[int, tuple[int, ...]]:
    """index -> pixel, of what the model saw in full."""
    full = [s for s in engine.opened[-1].segments if isinstance(s, Full)]
    return {s.index: s.content.image.getpixel((1, 1)) for s in full}  # type: ignore[union-attr]


async def pixel(document: Document, images: ImageSource, key: str = "picture") -> Any:
    return (await images.load(document.metadata[key])).image.getpixel((1, 1))


@pytest.mark.parametrize("kind", FORMS)
async def test_in_documents_of_any_retriever(kind: str, web: str, tmp_path: Path) -> None:
    given = [
        Document(f"no {i}", metadata={"picture": form(kind, png(c), tmp_path, f"{i}.png", web)})
        for i, c in enumerate(COLOURS)
    ]
    images, engine = sources(tmp_path), opening()
    core = reranker(images=images, options=THINKING)
    core.engine = engine
    retriever = RetrvR1Retriever(base=Fixed(found=given), reranker=core, mapping=MAPPING)
    compressor = RetrvR1Reranker(reranker=core, mapping=MAPPING)
    for found in (await retriever.ainvoke("q"), retriever.invoke("q"), compressor.compress_documents(given, "q")):
        assert found[0].metadata["retrv_r1"]["opened"]
        assert shown(engine) == dict(enumerate(COLOURS))
        for document in found:
            assert await pixel(document, images) == COLOURS[int(document.page_content[-1])]


@pytest.mark.parametrize("kind", ["path", "data URI", "URL", "base64"])  # what a payload can hold
async def test_through_their_qdrant_store(kind: str, web: str, tmp_path: Path) -> None:
    given = [
        Document(f"no {i}", metadata={"picture": form(kind, png(c), tmp_path, f"{i}.png", web)})
        for i, c in enumerate(COLOURS)
    ]
    images, engine = sources(tmp_path), opening()
    core = reranker(images=images, options=THINKING)
    core.engine = engine
    field = "data:;base64,{metadata.picture}" if kind == "base64" else "metadata.picture"
    mapping = PayloadSchema(text="page_content", image=field)
    found = await RetrvR1Retriever(base=written(found=given), reranker=core, mapping=mapping).ainvoke("no")
    by_rank = {d.metadata["retrv_r1"]["retrieval_rank"] - 1: d for d in found}
    for index, colour in shown(engine).items():
        assert colour == COLOURS[int(by_rank[index].page_content[-1])]
        assert kind == "base64" or colour == await pixel(by_rank[index], images)
    assert len(by_rank) == 3


@pytest.mark.parametrize("kind", FORMS)
async def test_through_our_own_store(kind: str, web: str, tmp_path: Path) -> None:
    images, engine, embedder, compressor = sources(tmp_path), opening(), HashEmbedder(), HashCompressor()
    found = [
        CoreDocument(str(i), Content(None, form(kind, png(c), tmp_path, f"{i}.png", web)), {"n": i})
        for i, c in enumerate(COLOURS)
    ]
    store = EdgeStore(tmp_path / "index", spec=CollectionSpec(32, 8))
    Indexer(store, embedder, compressor, images).index(found)
    core = CoreRetriever(
        store=store, embedder=embedder, engine=engine, compressor=compressor, images=images, options=THINKING
    )
    retriever = RetrvR1Retriever(base=core)
    for ranked in (await retriever.ainvoke("q"), retriever.invoke("", image=png(COLOURS[1]))):
        assert ranked[0].metadata["status"] == "reranked"
        by_rank = {d.metadata["retrv_r1"]["retrieval_rank"] - 1: d for d in ranked}
        for index, colour in shown(engine).items():
            document = by_rank[index]
            assert colour == COLOURS[document.metadata["n"]] == await pixel(document, images, "image")
            assert document.page_content == ""
    assert ranked[0].id in {"0", "1", "2"}
    assert engine.opened[-1].prompt.query.content.image.getpixel((1, 1)) == COLOURS[1]  # type: ignore[union-attr]
    first = min(ranked, key=lambda d: d.metadata["retrv_r1"]["retrieval_rank"])
    assert first.metadata["n"] == 1, "the query's picture was embedded, too"


async def test_pictures_kept_as_the_page_content() -> None:
    """As multi-vector recipes do it."""
    uri = "data:image/png;base64," + base64.b64encode(png(COLOURS[0])).decode()
    core = reranker(options=THINKING)
    core.engine = engine = opening()
    mapping = PayloadSchema(image="page_content")
    found = await RetrvR1Retriever(base=Fixed(found=[Document(uri)] * 3), reranker=core, mapping=mapping).ainvoke("q")
    assert shown(engine)[0] == COLOURS[0]
    read = engine.opened[-1].prompt.candidates[0].document.content
    assert read.text is None, "never a data URI as text"
    assert found[0].page_content == uri


async def test_a_picture_that_cannot_be_opened_is_said_and_the_rest_is_ranked(tmp_path: Path) -> None:
    given = [Document(f"no {i}", metadata={"picture": f"{i}.png"}) for i in range(3)]
    (tmp_path / "0.png").write_bytes(png())
    core = reranker(images=LocalImages(tmp_path), options=THINKING)
    core.engine = opening()
    found = await RetrvR1Retriever(base=Fixed(found=given), reranker=core, mapping=MAPPING).ainvoke("q")
    assert len(found) == 3
    assert {d.metadata["status"] for d in found} == {"partial"}
    judged = {d.page_content: d.metadata["retrv_r1"]["judged"] for d in found}
    assert judged == {"no 0": True, "no 1": False, "no 2": False}


def test_a_picture_nobody_mapped_is_not_guessed() -> None:
    spy = reranker()
    RetrvR1Retriever(base=Fixed(found=[Document("x", metadata={"image": png()})]), reranker=spy).invoke("q")
    assert spy.engine.opened[0].prompt.candidates[0].document.content == Content("x")


def test_metadata_in_the_place_of_our_own_picture_is_named() -> None:
    async def first_stage(query: Any, *, top_k: int, filter: Any = None) -> Any:
        return [CoreDocument("a", Content("x", png()), {"image": "a caption"})]

    core = CoreRetriever(first_stage=first_stage, engine=ScriptedEngine(slots=(0, -9)), options=OPTIONS)
    with pytest.raises(InputError, match=r"document 'a': expected no key 'image', its picture goes there"):
        RetrvR1Retriever(base=core).invoke("q")
    assert RetrvR1Retriever(base=core, mapping=MAPPING).invoke("q")[0].metadata["picture"] == png()
