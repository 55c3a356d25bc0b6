"""A model server that fails in every way: each call ends, with the right status, the first stage's ids, and a reason."""

from __future__ import annotations

import time
from typing import Any

import pytest

from retrv_r1_retriever.engines.chat import ChatEngine
from retrv_r1_retriever.errors import EngineError, RerankTimeout, ServerError
from retrv_r1_retriever.http import HttpLimits
from retrv_r1_retriever.options import RerankOptions
from retrv_r1_retriever.reranker import RetrvR1Reranker
from retrv_r1_retriever.types import Content, Document, RankedResults, Status
from tests.serving.http_stub import Reply
from tests.serving.openai_stub import MODEL, Override, Vlm, openai_stub, parts, picture

DOCS = [
    Document("hat", Content("a blue hat")),
    Document("maybe", Content("maybe a red shoe")),
    Document("red", Content("a red shoe")),
    Document("green", Content("a shoe", picture("green"))),
]
AS_FOUND = ["hat", "maybe", "red", "green"]
BY_GRADE = ["red", "green", "maybe", "hat"]
LIMITS = HttpLimits(connect_s=2.0, answer_s=30.0, retries=1, pause_s=0.01, longest_wait_s=0.5)
THINK = RerankOptions(think="always", timeout_s=60.0)


async def rerank(
    vlm: Vlm, *, limits: HttpLimits = LIMITS, options: RerankOptions = THINK, model: str = MODEL
) -> RankedResults:
    with openai_stub(vlm) as (stub, _):
        engine = ChatEngine(model, base_url=stub.url, api_key="key-123", limits=limits)
        results = await RetrvR1Reranker(engine, options=options).arerank("red shoe", DOCS)
        await engine.aclose()
    assert sorted(r.document.id for r in results) == sorted(AS_FOUND)
    assert "key-123" not in (results.reason or "")
    return results


def ids(results: RankedResults) -> list[str]:
    return [r.document.id for r in results]


def always(reply: Any) -> Override:
    return lambda number, body: reply


def from_check_on(reply: Any) -> Override:
    """From the first inspection on: the list itself is judged as usual."""
    return lambda number, body: reply if number else None


def error(status: int, message: str, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply({"error": {"message": message}}, status=status, headers=named)


@pytest.mark.parametrize(
    ("reply", "says", "requests"),
    [
        (error(400, "something else"), "status 400: something else", 3),  # schema, JSON, plain
        (error(401, "Incorrect API key provided: key-123"), "Check the API key", 1),
        (error(403, "no"), "Check the API key and its rights", 1),
        (error(413, "Request Entity Too Large"), "not even one candidate fits", 3),  # 4, 2, 1
        (error(429, "slow down", Retry_After="0"), "status 429", 2),
        (error(429, "quota", Retry_After="3600"), "asks to wait 3600 s", 1),
        (error(500, "oops"), "status 500: oops", 2),
        (error(503, "loading"), "status 503: loading", 2),
        (Reply(b"<html>proxy error</html>", status=502), "proxy error", 2),
        (Reply({"choices": []}, cut=5), "the answer broke off", 2),
        (Reply({"choices": []}), "expected a completion", 1),
        (Reply({"error": {"message": "upstream"}}), "upstream", 1),  # some gateways answer 200
        (Reply(b"data: {}\n\ndata: [DONE]\n\n"), "Is this the API's base URL", 1),  # a stream nobody asked for
        (Reply(b"", status=302, headers={"Location": "https://elsewhere.invalid/"}), "redirects are not followed", 1),
        (Reply({"choices": [{"message": {"content": None, "refusal": "I cannot help"}, "finish_reason": "stop"}]}), "refused", 1),
        (Reply({"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]}), "content filter", 1),
        ("I like the third one best.", "expected verdicts as JSON", 2),
        ('{"candidates": {"c9": {"verdict": "keep", "grade": 9}}, "answer": "c9"}', "expected verdicts as JSON", 2),
        ("", "expected verdicts as JSON", 2),
    ],
)  # fmt: skip
async def test_no_judgement_is_a_fallback_with_the_reason(reply: Any, says: str, requests: int) -> None:
    vlm = Vlm(override=always(reply))
    results = await rerank(vlm)
    assert (results.status, ids(results)) == (Status.FALLBACK, AS_FOUND)
    assert says in (results.reason or "")
    assert all(r.score is None for r in results)
    assert len(vlm.bodies) == requests


@pytest.mark.parametrize(
    "reply",
    [
        error(500, "oops"), error(401, "expired"), error(429, "quota", Retry_After="3600"), error(400, "what"),
        Reply({"choices": []}, cut=3), Reply({"choices": []}), Reply(b"nonsense"),
        Reply({"choices": [{"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}]}),
        Reply({}, delay_s=60), Reply({"x": "y" * 100}, drip_s=1.0),
    ],
)  # fmt: skip
async def test_a_failing_inspection_leaves_the_judgement_of_the_list(reply: Any) -> None:
    limits = HttpLimits(answer_s=2.0, retries=0)
    results = await rerank(Vlm(override=from_check_on(reply)), limits=limits)
    assert (results.status, ids(results)) == (Status.PARTIAL, BY_GRADE)
    assert "the thought failed" in (results.reason or "")
    assert "this is the direct read's order" in (results.reason or "")


async def test_a_server_killed_during_an_inspection() -> None:
    with openai_stub() as (stub, vlm):

        def die(number: int, body: dict[str, Any]) -> None:
            if number == 1:
                stub.kill()

        vlm.override = die
        reranker = RetrvR1Reranker(ChatEngine(MODEL, base_url=stub.url, limits=LIMITS), options=THINK)
        results = await reranker.arerank("red shoe", DOCS)
        assert (results.status, ids(results)) == (Status.PARTIAL, BY_GRADE)
        gone = await reranker.arerank("red shoe", DOCS)
    assert (gone.status, ids(gone)) == (Status.FALLBACK, AS_FOUND)
    assert "Is the server running" in (gone.reason or "")


async def test_a_server_that_comes_back_is_used_again() -> None:
    vlm = Vlm(override=lambda number, body: error(503, "restarting") if number < 2 else None)
    with openai_stub(vlm) as (stub, _):
        reranker = RetrvR1Reranker(ChatEngine(MODEL, base_url=stub.url, limits=LIMITS), options=THINK)
        assert (await reranker.arerank("red shoe", DOCS)).status is Status.FALLBACK
        assert (await reranker.arerank("red shoe", DOCS)).status is Status.RERANKED


async def test_a_model_that_never_answers_ends_with_the_call_or_with_the_request() -> None:
    never = Vlm(override=always(Reply({}, delay_s=600)))
    started = time.monotonic()
    results = await rerank(never, options=THINK.with_options(timeout_s=1.0))
    assert results.status is Status.FALLBACK
    assert "timed out before the model had read the candidates" in (results.reason or "")
    unlimited = THINK.with_options(timeout_s=None)
    results = await rerank(never, limits=HttpLimits(answer_s=1.0), options=unlimited)
    assert "no answer within 1 s" in (results.reason or "")
    late = await rerank(Vlm(override=from_check_on(Reply({}, delay_s=600))), options=THINK.with_options(timeout_s=5.0))
    assert (late.status, ids(late)) == (Status.PARTIAL, BY_GRADE)
    assert "timed out while thinking" in (late.reason or "")
    assert time.monotonic() - started < 60


async def test_failures_are_raised_where_that_is_asked_for() -> None:
    loud = THINK.with_options(on_failure="raise")
    with pytest.raises(ServerError, match="status 500: oops") as caught:
        await rerank(Vlm(override=always(error(500, "oops"))), options=loud)
    assert caught.value.status == 500
    with pytest.raises(RerankTimeout):
        await rerank(Vlm(override=always(Reply({}, delay_s=600))), options=loud.with_options(timeout_s=0.5))


async def test_a_wrong_model_name_is_told_with_the_right_ones() -> None:
    with pytest.raises(EngineError, match=rf"model: expected one of {MODEL}, got 'gpt-nothing'"):
        await rerank(Vlm(), model="gpt-nothing", options=THINK.with_options(on_failure="raise"))


async def test_a_forgotten_candidate_is_asked_for_once_more_and_named_if_it_stays_forgotten() -> None:
    short = {
        "candidates": {"c2": {"verdict": "keep", "grade": 8}, "c0": {"verdict": "no", "grade": 1}},
        "answer": "c2",
        "open": [],
    }
    vlm = Vlm(override=lambda number, body: short if number == 0 else None)
    again = await rerank(vlm)
    assert again.status is Status.RERANKED
    assert "no valid entry for: c1, c3." in parts(vlm.bodies[1]["messages"])[-1]["text"]
    for think in ("always", "never"):
        left = await rerank(Vlm(override=always(short)), options=THINK.with_options(think=think))
        assert (left.status, left.unranked) == (Status.PARTIAL, ("maybe", "green"))
        assert ids(left) == ["red", "hat", "maybe", "green"]
        assert "2 of 4 candidates were not judged" in (left.reason or "")


@pytest.mark.parametrize("think", ["always", "never"])
async def test_an_answer_alone_is_promoted_and_says_so(think: Any) -> None:
    results = await rerank(Vlm(override=always("c2")), options=THINK.with_options(think=think))
    assert (results.status, ids(results)) == (Status.PARTIAL, ["red", "hat", "maybe", "green"])
    assert results.unranked == ("hat", "maybe", "green")
    assert results.trace is not None
    assert any("(promote)" in note for note in results.trace.notes)


async def test_no_answer_takes_the_best_grade_and_says_so() -> None:
    grades = {f"c{i}": {"verdict": "x", "grade": g} for i, g in enumerate((1, 2, 7, 3))}
    results = await rerank(Vlm(override=always({"candidates": grades, "answer": "c77", "open": []})))
    assert results.selected is not None
    assert results.selected.document.id == "red"
    assert results.trace is not None
    assert any("named no answer" in note for note in results.trace.notes)


@pytest.mark.parametrize(
    "check", ["nonsense", {"check": "match", "match": "yes"}, {"answer": "c55", "open": ["c55", 7]}]
)
async def test_a_check_that_cannot_be_read_decides_nothing(check: Any) -> None:
    results = await rerank(Vlm(override=from_check_on(check)))
    assert (results.status, ids(results)[0]) == (Status.RERANKED, "red")
    assert [r.signals.match for r in results if r.signals.opened] == [None]


async def test_opening_for_ever_ends_with_the_budget() -> None:
    def greedy(number: int, body: dict[str, Any]) -> dict[str, Any] | None:
        more = {"open": ["c0", "c1", "c2", "c3"], "answer": "c2"}
        grades = {f"c{i}": {"verdict": "unsure", "grade": 5} for i in range(4)}
        return {"check": "hm", "match": False, **more} if number else {"candidates": grades, **more}

    vlm = Vlm(override=greedy)
    results = await rerank(vlm, options=THINK.with_options(max_inspections=2))
    assert results.trace is not None
    assert results.trace.inspected == (0, 1)
    assert (results.trace.stop_reason, len(vlm.bodies)) == ("forced_by_budget", 3)
    everything = await rerank(Vlm(override=greedy), options=THINK.with_options(max_inspections=9))
    assert everything.trace is not None
    assert everything.trace.inspected == (0, 1, 2, 3)


async def test_one_lost_part_does_not_cost_the_others() -> None:
    def fail_on_third(number: int, body: dict[str, Any]) -> Reply | None:
        named = any("c3:" in part.get("text", "") for part in parts(body["messages"]))
        return error(500, "oops") if named and number else None

    docs = [Document(f"d{i}", Content(f"a {'red' if i == 1 else 'blue'} shoe", picture("green"))) for i in range(4)]
    vlm = Vlm(max_images=2, override=fail_on_third)
    with openai_stub(vlm) as (stub, _):
        engine = ChatEngine(MODEL, base_url=stub.url, limits=LIMITS)
        results = await RetrvR1Reranker(engine, options=THINK).arerank("red", docs)
    assert (results.status, results.unranked) == (Status.PARTIAL, ("d2", "d3"))
    assert ids(results) == ["d1", "d0", "d2", "d3"]
    assert results.trace is not None
    assert any("candidates c2 to c3 were not judged" in note for note in results.trace.notes)
