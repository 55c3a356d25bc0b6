"""`RemoteReranker`: the same lists as the reranker behind the server, in every failure the right end, and no torch."""

from __future__ import annotations

import asyncio
import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retrv_r1_retriever import (
    Candidate,
    Content,
    Document,
    EngineError,
    InputError,
    LocalImages,
    OptionsError,
    Query,
    RankedResults,
    RemoteReranker,
    RerankOptions,
    RerankTimeout,
    RetrvR1Reranker,
    RetrvR1Retriever,
    StaleMemoryError,
)
from retrv_r1_retriever.engines.scripted import FuzzEngine, ScriptedEngine
from retrv_r1_retriever.http import HttpLimits
from retrv_r1_retriever.parser import Thought, Verdict
from retrv_r1_retriever.progress import Progress
from tests.first_stage.fakes import HashCompressor
from tests.helpers import candidates, documents, png
from tests.serving.conftest import FALLING, RISING, MakeApp, running
from tests.serving.http_stub import Reply, http_stub

QUICK = HttpLimits(retries=1, pause_s=0.01)
ONCE = HttpLimits(retries=0)
ALWAYS = RerankOptions(think="always")


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def summary(results: RankedResults) -> Any:
    """All but timings, and names that one side makes for itself."""
    trace = results.trace
    listed = [(r.document, r.rank, r.score, r.selected, r.retrieval_score) for r in results]
    signals = [
        (_finite(s.keep_logprob), _finite(s.slot_logprob), s.verdict, s.opened, s.match)
        for s in (r.signals for r in results)
    ]
    seen = trace and (trace.candidates, trace.thought, trace.inspected, trace.answer, trace.stop_reason, trace.usage)
    return results.status, results.reason, results.none_chosen, sorted(results.unranked), listed, signals, seen


@pytest.fixture
def served(make_app: MakeApp, request: pytest.FixtureRequest) -> Any:
    with running(make_app(RISING)) as server:
        yield server.url


async def test_lists_are_those_of_the_reranker_behind_the_server(make_app: MakeApp) -> None:
    given = candidates(4)
    thought = Thought("red", (Verdict(0, "keep"), Verdict(1, "wrong colour")), answer=2)
    for engine in (RISING, ScriptedEngine(thought, slots=FALLING.slots, keep={0: -0.1})):
        local = RetrvR1Reranker(engine, compressor=HashCompressor())
        with running(make_app(engine)) as server:
            remote = RemoteReranker(server.url)
            for options in (
                ALWAYS,
                RerankOptions(think="never"),
                ALWAYS.with_options(top_n=2),
                RerankOptions(ranking="promote"),
            ):
                expected = await local.arerank("q", given, options=options)
                got = await remote.arerank("q", given, options=options)
                assert summary(got) == summary(expected)
                assert all(any(r.candidate is c for c in given) for r in got)
            await remote.aclose()


async def test_the_first_stages_order_holds_whatever_order_the_list_has(make_app: MakeApp) -> None:
    given = [Candidate(d, None, 4 - i) for i, d in enumerate(documents(4))]
    equal = ScriptedEngine(slots=[0.0] * 4 + [-1.0])
    with running(make_app(equal)) as server:
        remote = RemoteReranker(server.url, options=RerankOptions(think="never"))
        assert [r.candidate.rank for r in await remote.arerank("q", given)] == [1, 2, 3, 4]
        await remote.aclose()


async def test_whatever_a_model_writes_arrives_as_it_is(make_app: MakeApp) -> None:
    for seed in range(30):
        expected = await RetrvR1Reranker(FuzzEngine(seed), compressor=HashCompressor()).arerank(
            "q", documents(5), options=ALWAYS
        )
        with running(make_app(FuzzEngine(seed))) as server:
            remote = RemoteReranker(server.url, options=ALWAYS)
            assert summary(await remote.arerank("q", documents(5))) == summary(expected), seed
            await remote.aclose()


def test_sync_batch_ids_progress_and_pictures(served: str, tmp_path: Path) -> None:
    Image.open(io.BytesIO(png())).save(tmp_path / "a.png")
    remote = RemoteReranker(served, images=LocalImages(tmp_path), options=RerankOptions(think="never"), trace=False)
    assert [r.document.id for r in remote.rerank("q", documents(3))] == ["doc-2", "doc-1", "doc-0"]
    assert [len(r) for r in remote.rerank_batch(["a", "b"], [documents(2), documents(4)])] == [2, 4]
    pictures = [
        Document("bytes", Content(image=png())),
        Document("file", Content("x", Path("a.png"))),
        Document("pil", Content(image=Image.new("RGB", (4, 4)))),
    ]
    results = remote.rerank(Query.of("q", "a.png", "Find it."), pictures)
    assert (results.status, [r.document.id for r in results]) == ("reranked", ["pil", "file", "bytes"])
    assert results.trace is None
    seen: list[Progress] = []

    async def note(step: Progress) -> None:
        seen.append(step)

    by_id = RemoteReranker(served, by_id=True, options=RerankOptions(think="never", on_stale="raise"))
    common = Document("common", Content("not what the server has"))
    assert asyncio.run(by_id.arerank("q", [common], progress=note)).status == "reranked"
    assert seen[0].stage == "answered"
    with pytest.raises(InputError, match="'gone'"):
        by_id.rerank("q", [Document("gone", Content("x"))])
    remote.close()
    by_id.close()


def test_a_picture_that_cannot_be_read_here_is_last_and_named(served: str) -> None:
    given = [Document("broken", Content(image=b"no")), *documents(2), Document("path", Content(image="gone.png"))]
    results = RemoteReranker(served, options=RerankOptions(think="never")).rerank("q", given)
    assert [r.document.id for r in results] == ["doc-1", "doc-0", "broken", "path"]
    assert (results.status, set(results.unranked)) == ("partial", {"broken", "path"})
    assert [r.score for r in results] == [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(InputError, match=r"gone\.png"):
        RemoteReranker(served).rerank(Query.of("q", "gone.png"), documents(2))


def test_it_stands_behind_our_own_first_stage(served: str) -> None:
    async def first_stage(query: Query, *, top_k: int, filter: Any = None) -> list[Candidate]:
        return [Candidate(d, 1.0 / (i + 1), i + 1) for i, d in enumerate(documents(top_k))]

    retriever = RetrvR1Retriever(
        first_stage=first_stage, reranker=RemoteReranker(served), options=RerankOptions(top_k=3, think="never")
    )
    results = retriever.retrieve("q")
    assert [(r.document.id, r.candidate.rank) for r in results] == [("doc-2", 3), ("doc-1", 2), ("doc-0", 1)]


# -- failures

ANSWER = {
    "status": "reranked", "reason": None, "none_chosen": False, "unranked": [], "trace": None,
    "results": [{"index": i, "rank": i + 1, "selected": i == 0, "opened": False, "match": None, "verdict": None,
                 "keep_logprob": None, "slot_logprob": None} for i in range(3)],
}  # fmt: skip


def lines(*indices: Any) -> Reply:
    made = [{**ANSWER["results"][0], "index": index, "rank": rank} for rank, index in enumerate(indices, 1)]  # type: ignore[index]
    return Reply({**ANSWER, "results": made})


def test_the_stub_is_a_good_server() -> None:
    with http_stub([Reply(ANSWER)]) as stub:
        assert RemoteReranker(stub.url).rerank("q", documents(3)).status == "reranked"


@pytest.mark.parametrize(
    "reply",
    [
        lines(0, 1), lines(0, 1, 1), lines(0, 1, 3), lines(-1, 0, 1), lines("0", "1", "2"), lines(0, 1, 2, 3),
        Reply({**ANSWER, "results": ANSWER["results"][::-1]}), Reply({**ANSWER, "unranked": [-1]}),
        Reply({**ANSWER, "status": "fine"}), Reply({**ANSWER, "unranked": [7]}), Reply({"results": []}), Reply([]), Reply(b"<html>"),
        Reply({**ANSWER, "trace": {"trace_version": 99}}), Reply({**ANSWER, "trace": {"trace_version": 1}}),
        Reply(ANSWER, cut=20), Reply(status=429), Reply(status=500), Reply(status=503), Reply(status=504),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_a_fallback_or_an_error_and_never_a_wrong_order(reply: Reply) -> None:
    with http_stub([reply]) as stub:
        remote = RemoteReranker(stub.url, limits=QUICK)
        results = remote.rerank("q", documents(3))
        assert (results.status, [r.document.id for r in results]) == ("fallback", ["doc-0", "doc-1", "doc-2"])
        assert stub.url in (results.reason or "")
        with pytest.raises(EngineError):
            remote.rerank("q", documents(3), options=RerankOptions(on_failure="raise"))


REFUSALS = {
    400: InputError,
    401: OptionsError,
    404: InputError,
    409: StaleMemoryError,
    413: InputError,
    422: InputError,
}


@pytest.mark.parametrize(("status", "error"), REFUSALS.items())
def test_a_refusal_is_raised_as_what_it_is(status: int, error: type[Exception]) -> None:
    with http_stub([Reply({"error": {"message": "so not"}}, status=status)]) as stub:
        with pytest.raises(error, match="so not"):
            RemoteReranker(stub.url).rerank("q", documents(3))
        assert len(stub.requests) == 1


def test_a_server_that_is_silent_dead_or_nowhere_ends_in_time() -> None:
    quick = RerankOptions(timeout_s=0.5)
    with http_stub([Reply(ANSWER, delay_s=5)]) as stub:
        results = RemoteReranker(stub.url).rerank("q", documents(3), options=quick)
        assert (results.status, "timeout_s=0.5" in (results.reason or "")) == ("fallback", True)
        with pytest.raises(RerankTimeout):
            RemoteReranker(stub.url).rerank("q", documents(3), options=quick.with_options(on_failure="raise"))
        stub.kill()
        assert RemoteReranker(stub.url, limits=ONCE).rerank("q", documents(3)).status == "fallback"


def test_the_servers_own_deadline_comes_before_ours() -> None:
    with http_stub([Reply(ANSWER)]) as stub:
        for given, sent in ((30.0, 29.5), (4.0, 3.6)):
            RemoteReranker(stub.url).rerank("q", documents(3), options=RerankOptions(timeout_s=given))
            assert stub.requests[-1].body["options"]["timeout_s"] == pytest.approx(sent)
        RemoteReranker(stub.url).rerank("q", documents(3), options=RerankOptions(timeout_s=None))
        assert "timeout_s" not in stub.requests[-1].body["options"]


def test_on_failure_raise_covers_the_servers_own_fallback(make_app: MakeApp) -> None:
    broken = ScriptedEngine(failing={"probe": RuntimeError("CUDA error")})
    with running(make_app(broken)) as server:
        remote = RemoteReranker(server.url, options=RerankOptions(think="never"))
        results = remote.rerank("q", documents(2))
        assert (results.status, {r.score for r in results}) == ("fallback", {None})
        with pytest.raises(EngineError, match="CUDA error"):
            remote.rerank("q", documents(2), options=RerankOptions(think="never", on_failure="raise"))


def test_bad_input_is_said_before_anything_is_sent() -> None:
    remote = RemoteReranker("http://127.0.0.1:9")
    assert remote.rerank("q", []).status == "fallback"
    for call, error in (
        (lambda: remote.rerank("", documents(2)), InputError),
        (lambda: remote.rerank("q", documents(200)), InputError),
        (lambda: remote.rerank_batch(["q"], []), InputError),
        (lambda: RemoteReranker("127.0.0.1:8080"), OptionsError),
    ):
        with pytest.raises(error, match="expected"):
            call()


# -- in the frameworks, without torch

ADAPTERS = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them raises
from retrv_r1_retriever import Content, Document, RemoteReranker, RerankOptions
remote = RemoteReranker(sys.argv[1], options=RerankOptions(think="never"))
print([r.document.id for r in remote.rerank("q", [Document(str(i), Content(f"text {i}")) for i in range(3)])])

from langchain_core.documents import Document as LangChainDocument
from langchain_retrv_r1 import RetrvR1Reranker
made = RetrvR1Reranker(reranker=remote, top_n=2).compress_documents([LangChainDocument(f"text {i}") for i in range(3)], "q")
print([d.page_content for d in made], made[0].metadata["retrv_r1"]["status"])

from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index_retrv_r1 import RetrvR1Rerank
nodes = [NodeWithScore(node=TextNode(text=f"text {i}"), score=0.5) for i in range(3)]
made = RetrvR1Rerank(remote).postprocess_nodes(nodes, query_bundle=QueryBundle("q"))
print([n.node.text for n in made], made[0].status)
"""


def test_core_and_both_frameworks_without_torch(served: str) -> None:
    done = subprocess.run([sys.executable, "-c", ADAPTERS, served], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['2', '1', '0']",
        "['text 2', 'text 1'] reranked",
        "['text 2', 'text 1', 'text 0'] reranked",
    ]
