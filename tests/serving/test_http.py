"""The HTTP helper against a real server that misbehaves: every call ends, in the right error, and is repeated only where that is safe."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from retrv_r1_retriever.errors import OptionsError, ServerError
from retrv_r1_retriever.http import HttpLimits, JsonHttp
from tests.serving.http_stub import Reply, http_stub

QUICK = HttpLimits(retries=2, pause_s=0.01, longest_wait_s=1.0, max_bytes=1000)
IMPATIENT = replace(QUICK, answer_s=0.5)
GOOD = Reply({"fine": True})


async def test_json_goes_there_and_comes_back() -> None:
    with http_stub([GOOD]) as stub:
        http = JsonHttp(stub.url + "/v1/", api_key="secret", headers={"X-Tenant": "a"})
        assert await http.post("chat", {"q": "Größe"}, idempotent=True) == {"fine": True}
        assert await http.get("models") == {"fine": True}
        await http.aclose()
    post, get = stub.requests
    assert (post.method, post.path, post.body) == ("POST", "/v1/chat", {"q": "Größe"})
    assert (post.headers["Authorization"], post.headers["X-Tenant"]) == ("Bearer secret", "a")
    assert (get.method, get.path, get.body) == ("GET", "/v1/models", None)


@pytest.mark.parametrize("status", [429, 503, 500, 502, 504])
async def test_what_may_pass_is_tried_again(status: int) -> None:
    with http_stub([Reply(status=status), Reply(status=status), GOOD]) as stub:
        assert await JsonHttp(stub.url, limits=QUICK).post("x", {}, idempotent=True) == {"fine": True}


@pytest.mark.parametrize("reply", [Reply(status=500), Reply(status=502), Reply({"fine": True}, cut=4)])
async def test_a_call_that_may_have_had_an_effect_is_not_repeated(reply: Reply) -> None:
    with http_stub([reply, GOOD]) as stub:
        with pytest.raises(ServerError):
            await JsonHttp(stub.url, limits=QUICK).post("x", {}, idempotent=False)
        assert len(stub.requests) == 1


@pytest.mark.parametrize("cut", [0, 5])
async def test_a_cut_answer_is_repeated_where_that_is_safe_and_never_taken_for_a_whole_one(cut: int) -> None:
    with http_stub([Reply({"fine": False}, cut=cut), GOOD]) as stub:
        assert await JsonHttp(stub.url, limits=QUICK).post("x", {}, idempotent=True) == {"fine": True}
    with http_stub([Reply({"fine": False}, cut=cut)]) as stub:
        with pytest.raises(ServerError, match="the answer broke off") as caught:
            await JsonHttp(stub.url, limits=QUICK).post("x", {}, idempotent=True)
        assert len(stub.requests) == 3
    assert caught.value.cut


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
async def test_a_refusal_is_final_and_says_why(status: int) -> None:
    reply = Reply({"error": {"message": "no such thing as k-123456", "type": "x"}}, status=status)
    with http_stub([reply, GOOD]) as stub:
        with pytest.raises(ServerError, match=f"status {status}: no such thing") as caught:
            await JsonHttp(stub.url, api_key="k-123456", limits=QUICK).post("x", {}, idempotent=True)
        assert len(stub.requests) == 1
    assert (caught.value.status, caught.value.detail) == (status, "no such thing as ***")
    assert "k-123456" not in str(caught.value)


async def test_retry_after_is_kept_in_both_forms_and_refused_if_too_long() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=1), usegmt=True)
    for value in ("0.2", soon):
        with http_stub([Reply(status=429, headers={"Retry-After": value}), GOOD]) as stub:
            started = time.monotonic()
            assert await JsonHttp(stub.url, limits=QUICK).post("x", {}, idempotent=False) == {"fine": True}
            assert value == soon or time.monotonic() - started >= 0.2
    with http_stub([Reply(status=429, headers={"Retry-After": "3600"}), GOOD]) as stub:
        with pytest.raises(ServerError, match="asks to wait 3600 s") as caught:
            await JsonHttp(stub.url, limits=QUICK).post("x", {}, idempotent=True)
        assert len(stub.requests) == 1
    assert caught.value.retry_after_s == 3600


@pytest.mark.parametrize("reply", [Reply({"fine": True}, delay_s=30), Reply({"fine": True}, drip_s=0.2)])
async def test_a_server_that_never_ends_its_answer_is_left_and_not_asked_again(reply: Reply) -> None:
    with http_stub([reply]) as stub:
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"no answer within 0\.5 s"):
            await JsonHttp(stub.url, limits=IMPATIENT).post("x", {}, idempotent=True)
        assert time.monotonic() - started < 20
        assert len(stub.requests) == 1


async def test_nobody_there() -> None:
    with http_stub([GOOD]) as stub:
        stub.kill()
    with pytest.raises(ServerError, match="Is the server running") as caught:
        await JsonHttp(stub.url, limits=QUICK).get("x")
    assert caught.value.unsent


async def test_a_host_that_takes_no_connection_is_left_in_time() -> None:
    """A full backlog: the kernel drops what knocks, as a firewall does."""
    with socket.socket() as deaf, socket.socket() as guest:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        guest.connect(deaf.getsockname())
        impatient = replace(QUICK, connect_s=0.2, retries=1)
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"no connection within 0\.2 s") as caught:
            await JsonHttp(f"http://127.0.0.1:{deaf.getsockname()[1]}", limits=impatient).get("x")
        assert 0.4 <= time.monotonic() - started < 20  # two tries: nothing was sent
    assert caught.value.unsent


def test_pauses_grow_and_no_two_clients_keep_step() -> None:
    http = JsonHttp("http://127.0.0.1:9", limits=HttpLimits(retries=3, pause_s=1.0))
    broken = ServerError("x", status=503)
    for attempt, middle in enumerate((1.0, 2.0, 4.0)):
        pauses = [http._pause(broken, attempt, False) or 0.0 for _ in range(200)]
        assert min(pauses) >= middle / 2
        assert max(pauses) <= middle * 1.5
        assert max(pauses) - min(pauses) > middle / 2
    assert http._pause(broken, 3, False) is None


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Reply(b"<html>hello</html>"), "with <html>hello</html>"),
        (Reply(b""), "with an empty body"),
        (Reply(b'"' + b"x" * 2000 + b'"'), "more than 1,000 bytes"),
        (Reply(b"\xff\x00", headers={"Content-Encoding": "gzip"}), "broke off"),
        (Reply(status=302, headers={"Location": "https://elsewhere/"}), "status 302 to https://elsewhere/"),
    ],
)
async def test_what_is_no_answer_is_an_error(reply: Reply, says: str) -> None:
    with http_stub([reply]) as stub, pytest.raises(ServerError, match=says):
        await JsonHttp(stub.url, limits=QUICK).post("x", {}, idempotent=False)


def test_one_object_serves_several_event_loops() -> None:
    with http_stub([GOOD]) as stub:
        http = JsonHttp(stub.url)
        for _ in range(3):
            assert asyncio.run(http.get("x")) == {"fine": True}
        assert len(http._clients) == 1  # those of loops that ended are gone


def test_a_base_url_without_scheme_is_refused() -> None:
    with pytest.raises(OptionsError, match="base_url: expected http"):
        JsonHttp("localhost:8000")


@pytest.mark.parametrize("key", ["hidden\n", " hidden", "hidden\x00", "hidd\xe9n"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(OptionsError, match="api_key: expected an API key") as caught:
        JsonHttp("http://127.0.0.1:9", api_key=key)
    assert "hid" not in str(caught.value)
