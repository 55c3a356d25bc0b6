"""Clients that are killed in the middle of a call: the model is free again, the server answers the next one."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from retrv_r1_mcp.server import create_server
from retrv_r1_mcp.transport import create_app, tenant_of

from retrv_r1_retriever.edge import EdgeStore
from retrv_r1_retriever.engines.scripted import ScriptedEngine
from retrv_r1_retriever.serving.settings import McpConfig, ServeConfig
from tests.integrations.mcp.conftest import COMMAND, ENVIRONMENT, Shop
from tests.integrations.mcp.parts import falling, make_calls, make_index
from tests.integrations.mcp.test_transports import HELLO, call
from tests.serving.conftest import running
from tests.serving.test_running import wait_for

#: One call at a time and none that waits: a place that is not given back is noticed at once.
ONE = ServeConfig(max_running=1, max_waiting=0)
CALLER = """
import asyncio, sys
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

async def main(url, mode):
    async with create_mcp_http_client({"authorization": "Bearer key"}) as http:
        async with Client(streamable_http_client(url, http_client=http), mode=mode) as client:
            await client.call_tool("search", {"query": "card"})

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
async def whole(tmp_path: Path) -> AsyncIterator[EdgeStore]:
    index = await asyncio.to_thread(make_index, tmp_path)
    yield index
    await index.close()


async def _search(url: str) -> bool:
    """Whether a client's search is answered."""
    async with (
        create_mcp_http_client({"authorization": "Bearer key"}) as http,
        Client(streamable_http_client(url, http_client=http)) as client,
    ):
        return not (await client.call_tool("search", {"query": "card"})).is_error


@pytest.mark.parametrize(("mode", "end"), [("legacy", "answered"), (MODERN_PROTOCOL_VERSIONS[-1], "cancelled")])
async def test_a_killed_client_over_http(
    whole: EdgeStore, mode: str, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The older protocol has no cancellation by hanging up: there the call runs to its end, within its `timeout_s`."""
    caplog.set_level(logging.INFO, "retrv_r1_mcp")
    engine: ScriptedEngine = falling(delay_s=0.7)
    calls = make_calls(whole, engine, limits=ONE)
    app = create_app(create_server(lambda: calls, tenant_of), {"key": "alpha"}, McpConfig(), ONE)
    with running(app) as server:
        url = f"{server.url}/mcp"
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", CALLER, url, mode, env=ENVIRONMENT)
        await wait_for(lambda: engine.opened, 120)  # another interpreter starts
        client.kill()
        await client.wait()
        await wait_for(lambda: f"tenant=alpha {end}" in caplog.text)
        await wait_for(lambda: not engine.leaked)
        assert await _search(url)
    assert "Traceback" not in caplog.text


async def test_a_client_that_closes_the_line_in_a_call_over_stdio_ends_the_server(shop: Shop) -> None:
    config = shop.config("line", "[store]\ntenant_field = 'tenant'\ntenant_value = 'alpha'\n")
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--config", str(config), env=ENVIRONMENT, stdin=-1, stdout=-1, stderr=-1
    )
    assert process.stdin
    lines = [
        HELLO,
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        call("search", query="x", think="always"),
    ]
    process.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    process.stdin.write_eof()
    _, log = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, log
    assert b"Traceback" not in log
