"""The SDK's own client against `retrv-r1 mcp` in another process, with the shipped model: over stdio and over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from typing import Any

import anyio
import httpx
import pytest
from mcp import Client
from mcp_types import CallToolResult
from PIL import Image

from tests.integrations.mcp.conftest import ENVIRONMENT, Reached, Running, Shop
from tests.integrations.mcp.parts import pictures, text
from tests.serving.test_running import wait_for


def ids(answer: CallToolResult) -> list[str]:
    assert not answer.is_error, text(answer)
    assert answer.structured_content["status"] in ("reranked", "partial"), text(answer)
    return [one["id"] for one in answer.structured_content["results"]]


async def searches(client: Client, shop: Shop, image: str) -> None:
    """By words, by picture and by both; the pictures come back. By the direct read: the miniature's thoughts know lists of 20."""
    words = {"query": shop.cards[3].coarse_text}
    for asked in (words, {"image": image}, {**words, "image": image}):
        answer = await client.call_tool("search", {**asked, "think": "never"})
        assert "alpha-3" in ids(answer)
        assert len(ids(answer)) == 10
        assert all(id.startswith("alpha-") for id in ids(answer))
        assert len(pictures(answer)) == 10
    sent = pictures(answer)[0]
    assert Image.open(io.BytesIO(base64.b64decode(sent.data))).size == (64, 64)
    assert f"[{ids(answer)[0]}]" in text(answer)


async def cancels(client: Client, log: Any) -> None:
    """When the call has found its candidates; the next one is answered."""
    with anyio.CancelScope() as scope:

        async def cancel(progress: float, total: float | None, message: str | None) -> None:
            if message is not None and "found" in message:
                scope.cancel()

        await client.call_tool("search", {"query": "a card", "think": "always"}, progress_callback=cancel)
    assert scope.cancelled_caught
    await wait_for(lambda: "tool=search" in log() and "cancelled" in log())
    assert ids(await client.call_tool("search", {"query": "a card", "think": "never"}))


async def is_refused(client: Client) -> None:
    """Another tenant's document, by every way to name one."""
    picture = "retrv://documents/beta-0/picture"
    documents: dict[str, Any] = {"query": "x", "documents": [{"id": "beta-0"}]}
    for name, asked in (("inspect", {"id": "beta-0"}), ("rerank", documents), ("search", {"image": picture})):
        answer = await client.call_tool(name, asked)
        assert answer.is_error
        assert "beta-0" in text(answer)
    own = [{"field": "tenant", "equals": "beta"}]
    answer = await client.call_tool("search", {"query": "x", "where": own})
    assert "beta-0" not in str(answer.structured_content)


async def test_over_stdio(stdio: Reached, shop: Shop) -> None:
    async with stdio.connect() as client:
        await searches(client, shop, "3.png")
        await cancels(client, stdio.log)
        await is_refused(client)
        outside = await client.call_tool("search", {"image": str(shop.folder / "pictures" / "3.png")})
        assert outside.is_error
        assert "outside root" in text(outside)
        shown = await client.call_tool("inspect", {"id": "alpha-3"})
        assert shown.structured_content["metadata"]["number"] == 3
    assert "Traceback" not in stdio.log()


async def test_over_http(http: Running, shop: Shop) -> None:
    data = base64.b64encode((shop.folder / "query" / "3.png").read_bytes()).decode()
    async with http.connect() as client:
        await searches(client, shop, f"data:image/png;base64,{data}")
        await cancels(client, http.log.read_text)
        await is_refused(client)
        path = await client.call_tool("search", {"image": "3.png"})
        assert path.is_error
        assert "Paths are read where the server was started with --image-root" in text(path)
    async with http.connect("beta-key") as client:
        assert (await client.call_tool("inspect", {"id": "beta-0"})).structured_content["id"] == "beta-0"
        assert (await client.call_tool("inspect", {"id": "alpha-3"})).is_error
    assert "Traceback" not in http.log.read_text()


HELLO = {
    "jsonrpc": "2.0", "id": 1, "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}},
}  # fmt: skip
ACCEPT = {"accept": "application/json, text/event-stream", "content-type": "application/json"}


def call(tool: str, **arguments: Any) -> dict[str, Any]:  # a tool's arguments
    return {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {"name": tool, "arguments": arguments}}


async def test_http_lets_in_only_who_has_a_key_and_no_web_page(http: Running) -> None:
    key = {"authorization": "Bearer alpha-key", **ACCEPT}
    async with httpx.AsyncClient(timeout=60) as plain:
        for headers, code in (
            (ACCEPT, 401),
            ({**ACCEPT, "authorization": "Bearer alpha-keyy"}, 401),
            ({**ACCEPT, "authorization": "Bearer ALPHA_KEY"}, 401),
            ({**key, "origin": "https://evil.example"}, 403),
            ({**key, "host": "evil.example:80"}, 421),
            ({**key, "origin": "http://localhost:3000"}, 200),
        ):
            assert (await plain.post(http.url, json=HELLO, headers=headers)).status_code == code, headers
        opened = await plain.post(http.url, json=HELLO, headers=key)
        session = {"mcp-session-id": opened.headers["mcp-session-id"], "mcp-protocol-version": "2025-06-18"}
        stolen = {**key, **session, "authorization": "Bearer beta-key"}
        asked = call("inspect", id="alpha-3")
        assert (await plain.post(http.url, json=asked, headers=stolen)).status_code == 404
        assert "alpha-3" in (await plain.post(http.url, json=asked, headers={**key, **session})).text


async def test_a_client_that_hangs_up_leaves_the_server_up(http: Running) -> None:
    key = {"authorization": "Bearer alpha-key", **ACCEPT}
    async with httpx.AsyncClient(timeout=60) as plain:
        opened = await plain.post(http.url, json=HELLO, headers=key)
        session = {**key, "mcp-session-id": opened.headers["mcp-session-id"], "mcp-protocol-version": "2025-06-18"}
        with pytest.raises(httpx.ReadTimeout):
            await plain.post(http.url, json=call("search", query="x", think="always"), headers=session, timeout=0.05)
    async with http.connect() as client:
        assert ids(await client.call_tool("search", {"query": "a card", "think": "never"}))


NOISY = """
import os, subprocess, sys, warnings
from retrv_r1_retriever import config
from retrv_r1_retriever.cli import main

def open_retriever(*arguments, original=config.open_retriever):
    print("noise: print")
    warnings.warn("noise: warn")
    os.write(1, b"noise: write\\n")
    subprocess.run(["echo", "noise: echo"], check=True)
    return original(*arguments)

config.open_retriever = open_retriever
sys.exit(main(sys.argv[1:]))
"""


async def test_stdout_is_protocol_only_whatever_a_library_prints(shop: Shop) -> None:
    """Line by line, without a client that would forgive."""
    config = shop.config("plain", "[store]\ntenant_field = 'tenant'\ntenant_value = 'alpha'\n")
    argv = [sys.executable, "-c", NOISY, "mcp", "--config", str(config)]
    process = await asyncio.create_subprocess_exec(*argv, env=ENVIRONMENT, stdin=-1, stdout=-1, stderr=-1)
    assert process.stdin
    lines = [HELLO, {"jsonrpc": "2.0", "method": "notifications/initialized"}, call("search", query="x")]
    process.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode() + b"this is no JSON\n")
    await process.stdin.drain()
    assert process.stdout
    answers: dict[Any, Any] = {}
    while 2 not in answers:
        line = json.loads(await asyncio.wait_for(process.stdout.readline(), 300))
        answers[line.get("id")] = line
    assert answers[1]["result"]["serverInfo"]["name"] == "retrv-r1"
    assert answers[2]["result"]["structuredContent"]["results"]
    process.stdin.close()  # the client has gone
    rest, log = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    assert [json.loads(line)["jsonrpc"] for line in rest.splitlines()] == ["2.0"] * len(rest.splitlines())
    assert b"Traceback" not in log
    assert all(f"noise: {way}".encode() in log for way in ("print", "warn", "write", "echo"))
