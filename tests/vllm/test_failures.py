"""A vLLM server that fails in every way: each call ends, with the right status, the first stage's ids, and a reason."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.engines.vllm import VllmEngine
from retrv_r1_retriever.errors import EngineError, ServerError
from retrv_r1_retriever.http import HttpLimits
from retrv_r1_retriever.model.checkpoint import Checkpoint
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.types import Candidate, Content, Document, Memory, Query, RankedResults, Status
from tests.serving.http_stub import Reply
from tests.tiny import checkpoint, folder, picture
from tests.vllm.stub import MODEL, Vllm, refusal, vllm_stub

__all__ = ["checkpoint", "folder"]

LIMITS = HttpLimits(connect_s=2.0, answer_s=30.0, retries=1, pause_s=0.01, longest_wait_s=0.5)
THINK = RerankOptions(think="always", timeout_s=60.0)
WORDS = ("red", "two", "circle", "plain")
AS_FOUND = ["0", "1", "2", "3"]
DIRECT = ["3", "2", "1", "0"]  # the stub's direct read: later labels are likelier
SCRIPT = (
    "<|c0|> keep <|c1|> diff <inspection-index-start> <|c1|> <inspection-index-end>",
    "match </think>",
)


@pytest.fixture
def vllm(checkpoint: Checkpoint) -> Vllm:
    slots = {token: 0.1 * place - 20 for place, token in enumerate(checkpoint.processor.slot_ids[:-1])}
    return Vllm(checkpoint.processor, SCRIPT, lambda token: slots.get(token, -30.0))


@pytest.fixture(scope="session")
def found(checkpoint: Checkpoint) -> list[Candidate]:
    local = LocalEngine(checkpoint)
    contents = [Content(word) for word in WORDS]
    return [
        Candidate(Document(str(i), c), 1.0, i + 1, Memory(m.rows, local.memory_digest, "", m.full_tokens))
        for i, (c, m) in enumerate(zip(contents, local.compress(contents), strict=True))
    ]


def engine(folder: Path, url: str, limits: HttpLimits = LIMITS, check: bool = False, model: str = MODEL) -> VllmEngine:
    return VllmEngine(folder, base_url=url, model=model, api_key="key-123", limits=limits, check=check)


async def rerank(
    vllm: Vllm, folder: Path, found: list[Candidate], limits: HttpLimits = LIMITS, options: RerankOptions = THINK
) -> RankedResults:
    with vllm_stub(vllm) as stub:
        results = await RetrvR1Reranker(engine(folder, stub.url, limits), options=options).arerank("which", found)
    assert sorted(ids(results)) == AS_FOUND
    assert "key-123" not in (results.reason or "")
    return results


def ids(results: RankedResults) -> list[str]:
    return [r.document.id for r in results]


async def test_the_stub_is_a_server(vllm: Vllm, folder: Path, found: list[Candidate]) -> None:
    results = await rerank(vllm, folder, found)
    assert results.status is Status.RERANKED, results.reason
    assert results.trace is not None
    assert results.trace.inspected == (1,)
    assert [bool(body.get("allowed_token_ids")) for body in vllm.bodies] == [True, False, False, True]


async def test_requests_of_one_list_have_one_session(vllm: Vllm, folder: Path, found: list[Candidate]) -> None:
    """By which a router finds the server that has read the beginning, and no other list can hit what was kept of this one."""
    with vllm_stub(vllm) as stub:
        reranker = RetrvR1Reranker(engine(folder, stub.url), options=THINK)
        for _ in range(2):
            vllm.written = 0
            assert (await reranker.arerank("which", found)).status is Status.RERANKED
        sessions = [request.headers["X-Session-ID"] for request in stub.requests]
    assert [body["cache_salt"] for body in vllm.bodies] == sessions
    assert len(sessions) == 8
    assert len(set(sessions[:4])) == len(set(sessions[4:])) == 1
    assert sessions[0] != sessions[4]


FAILURES = [
    (refusal(400, "max_tokens is too large"), "status 400: max_tokens is too large", 1),
    (refusal(401, "Unauthorized: key-123"), "Check the API key", 1),
    (Reply(b"too big", status=413), "Send less at once", 1),
    (refusal(429, "slow down", Retry_After="0"), "status 429", 2),
    (refusal(500, "EngineCore died"), "status 500: EngineCore died", 2),
    (refusal(503, "loading"), "status 503: loading", 2),
    (Reply({"choices": []}, cut=5), "the answer broke off", 2),
    (Reply({"choices": []}), "expected token ids with log-probabilities", 1),
    (Reply(b"<html>"), "Is this the API's base URL", 1),
    (refusal(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`"), "Start it with --enable-prompt-embeds", 1),
    (refusal(400, "At most 2 image(s) may be provided in one prompt."), "Raise image in --limit-mm-per-prompt", 1),
    (refusal(404, "The model `retrv` does not exist."), "Check the base URL and the model's name", 1),  # another one came up
    (refusal(400, "Multi-modal item with uuid 'a' is not in the cache"), "status 400: Multi-modal item", 1),
    (Reply(b"data: {}\n\ndata: [DONE]\n\n"), "Is this the API's base URL", 1),  # a stream nobody asked for
    (Reply({}, delay_s=60), "no answer within 2 s", 1),
    (Reply({"choices": ["x" * 100]}, drip_s=0.5), "no answer within 2 s", 1),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "says", "requests"), FAILURES)
async def test_no_reading_is_a_fallback_with_the_reason(
    vllm: Vllm, folder: Path, found: list[Candidate], reply: Reply, says: str, requests: int
) -> None:
    vllm.override = lambda number, body: reply
    limits = HttpLimits(answer_s=2.0, retries=1, pause_s=0.01, longest_wait_s=0.5)
    results = await rerank(vllm, folder, found, limits)
    assert (results.status, ids(results)) == (Status.FALLBACK, AS_FOUND)
    assert says in (results.reason or "")
    assert all(r.score is None for r in results)
    assert len(vllm.bodies) == requests


@pytest.mark.parametrize("reply", [one for one, _, _ in FAILURES])
async def test_a_failing_inspection_leaves_the_direct_read(
    vllm: Vllm, folder: Path, found: list[Candidate], reply: Reply
) -> None:
    vllm.override = lambda number, body: reply if number >= 2 else None
    results = await rerank(vllm, folder, found, HttpLimits(answer_s=2.0, retries=0))
    assert (results.status, ids(results)) == (Status.PARTIAL, DIRECT)
    assert "the thought failed" in (results.reason or "")


def shorter(answer: dict[str, Any]) -> None:
    answer["choices"][0]["token_ids"].pop()


def not_allowed(answer: dict[str, Any]) -> None:
    answer["choices"][0]["token_ids"][-1] = 1


def none_read(answer: dict[str, Any]) -> None:
    for place in answer["choices"][0]["logprobs"]["content"]:
        place["top_logprobs"] = place["top_logprobs"][:-1]


def other_prompt(answer: dict[str, Any]) -> None:
    answer["usage"]["prompt_tokens"] += 9


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shorter, "expected 1 to 1 tokens, got 0 ids and 1 log-probabilities"),
        (not_allowed, "expected one of 5 tokens, got another one"),
        (none_read, "expected log-probabilities of 5 tokens, got not all of them"),
        (other_prompt, "the server's prompt: expected .* Serve the very checkpoint that is read here, with --chat-template"),
    ],
)  # fmt: skip
async def test_an_answer_to_another_question_is_no_reading(
    vllm: Vllm, folder: Path, found: list[Candidate], spoil: Any, says: str
) -> None:
    def spoilt(number: int, body: Any) -> Reply:
        answer = vllm.completion(body)
        spoil(answer)
        return Reply(answer)

    vllm.override = spoilt
    with pytest.raises(EngineError, match=says):
        await rerank(vllm, folder, found, options=THINK.with_options(on_failure="raise"))


async def test_a_server_killed_during_an_inspection(vllm: Vllm, folder: Path, found: list[Candidate]) -> None:
    with vllm_stub(vllm) as stub:

        def die(number: int, body: Any) -> None:
            if number == 2:
                stub.kill()

        vllm.override = die
        reranker = RetrvR1Reranker(engine(folder, stub.url), options=THINK)
        results = await reranker.arerank("which", found)
        assert (results.status, ids(results)) == (Status.PARTIAL, DIRECT)
        gone = await reranker.arerank("which", found)
    assert (gone.status, ids(gone)) == (Status.FALLBACK, AS_FOUND)
    assert "Is the server running" in (gone.reason or "")


async def test_an_inspection_beyond_the_pictures_a_server_takes_names_the_flag(
    vllm: Vllm, folder: Path, found: list[Candidate]
) -> None:
    """The query's picture fits, the opened one beside it does not."""

    def one_picture(number: int, body: Any) -> Reply | None:
        pictures = sum(part["type"] == "image_url" for part in body["messages"][0]["content"])
        return refusal(400, "At most 1 image(s) may be provided in one prompt.") if pictures > 1 else None

    vllm.override = one_picture
    shown = [
        replace(c, document=replace(c.document, content=Content(c.document.content.text, picture(3)))) for c in found
    ]
    with vllm_stub(vllm) as stub:
        reranker = RetrvR1Reranker(engine(folder, stub.url), options=THINK)
        results = await reranker.arerank(Query.of("which", picture(4)), shown)
    assert (results.status, ids(results)) == (Status.PARTIAL, DIRECT)
    assert "Raise image in --limit-mm-per-prompt to max_inspections + 1" in (results.reason or "")
    # Pictures travel in every request that shows them: there is no media id that a server could have forgotten.
    sent = [part for body in vllm.bodies for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    assert len(sent) == 4
    assert all(part["image_url"]["url"].startswith("data:image/png;base64,") and "uuid" not in part for part in sent)


async def test_a_server_that_comes_back_is_used_again(vllm: Vllm, folder: Path, found: list[Candidate]) -> None:
    vllm.override = lambda number, body: refusal(503, "restarting") if number < 2 else None
    with vllm_stub(vllm) as stub:
        reranker = RetrvR1Reranker(engine(folder, stub.url), options=THINK)
        assert (await reranker.arerank("which", found)).status is Status.FALLBACK
        assert (await reranker.arerank("which", found)).status is Status.RERANKED


async def test_a_model_that_never_answers_ends_with_the_call(vllm: Vllm, folder: Path, found: list[Candidate]) -> None:
    started = time.monotonic()
    vllm.override = lambda number, body: Reply({}, delay_s=600)
    nothing = await rerank(vllm, folder, found, options=THINK.with_options(timeout_s=1.5))
    assert "timed out before the model had read the candidates" in (nothing.reason or "")
    vllm.bodies.clear()
    vllm.override = lambda number, body: Reply({}, delay_s=600) if number else None
    late = await rerank(vllm, folder, found, options=THINK.with_options(timeout_s=3.0))
    assert (late.status, ids(late)) == (Status.PARTIAL, DIRECT)
    assert time.monotonic() - started < 30


# -- what the constructor says -----------------------------------------------------------------------------------------


def test_the_constructor_asks_a_tiny_question(vllm: Vllm, folder: Path) -> None:
    vllm.max_model_len = 512
    with vllm_stub(vllm) as stub:
        made = engine(folder, stub.url, check=True)
    assert (made.versions["vllm"], made.max_context) == ("9.9.9", 512)
    assert len(vllm.bodies) == 2


@pytest.mark.parametrize(
    ("detail", "says"),
    [
        ("You must set `--enable-prompt-embeds` to input `prompt_embeds`", "Start it with --enable-prompt-embeds"),
        ("At most 0 image(s) may be provided in one prompt.", "--limit-mm-per-prompt"),
        ("As of transformers v4.44, default chat template is no longer allowed", "--chat-template '{% for m in"),
        ("Token id 640 is out of vocabulary", "Export the checkpoint again"),
    ],
)
def test_a_missing_flag_is_named(vllm: Vllm, folder: Path, detail: str, says: str) -> None:
    vllm.override = lambda number, body: refusal(400, detail)
    with vllm_stub(vllm) as stub, pytest.raises(EngineError) as caught:
        engine(folder, stub.url, check=True)
    assert says in str(caught.value)


def test_a_wrong_name_and_a_server_that_is_gone_are_named(vllm: Vllm, folder: Path) -> None:
    with vllm_stub(vllm) as stub:
        with pytest.raises(EngineError, match="model: expected one of retrv, got 'other'"):
            engine(folder, stub.url, check=True, model="other")
        stub.kill()
        with pytest.raises(ServerError, match="Is the server running"):
            engine(folder, stub.url, check=True)


def test_other_weights_are_noticed(vllm: Vllm, folder: Path) -> None:
    def differs(number: int, body: Any) -> Reply | None:
        vllm.slots = lambda token: -1.0 - number * token / 1000
        return None

    vllm.override = differs
    with (
        vllm_stub(vllm) as stub,
        pytest.raises(EngineError, match="the server's weights: expected those of our checkpoint"),
    ):
        engine(folder, stub.url, check=True)


async def test_calls_of_many_loops_share_the_engine(vllm: Vllm, folder: Path, found: list[Candidate]) -> None:
    with vllm_stub(vllm) as stub:
        reranker = RetrvR1Reranker(engine(folder, stub.url), options=THINK.with_options(think="never"))
        inside = await reranker.arerank("which", found)
        threads = [asyncio.to_thread(reranker.rerank, "which", found) for _ in range(3)]
        assert [ids(r) for r in await asyncio.gather(*threads)] == [ids(inside)] * 3 == [DIRECT] * 3
