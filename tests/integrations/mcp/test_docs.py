"""The client configs of docs/agents.md: their commands are started, and shake hands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters

from retrv_r1_retriever.config import read_config
from tests.integrations.mcp.conftest import COMMAND, ENVIRONMENT

PAGE = (Path(__file__).parents[3] / "docs" / "agents.md").read_text(encoding="utf-8")


def configs(kind: str) -> list[dict[str, Any]]:
    found = re.findall(rf"<!-- test: {kind} -->\n```json\n(.*?)^```", PAGE, re.S | re.M)
    return [server for one in found for server in json.loads(one)["mcpServers"].values()]


@pytest.mark.parametrize("config", configs("client"), ids=lambda config: config["command"])
async def test_a_client_config_starts_a_server(config: dict[str, Any], tmp_path: Path) -> None:
    line = [config["command"], *config["args"]]
    ours = line[line.index("retrv-r1") + 1 :]
    if line[0] == "uvx":
        assert line[1:4] == ["--from", "retrv-r1-retriever[mcp]", "retrv-r1"]
    assert ours[0] == "mcp"
    arguments = [one.replace("/data/shop", str(tmp_path)) for one in ours[1:]]
    (tmp_path / "uploads").mkdir()
    (tmp_path / "retrv.toml").write_text("")
    parameters = StdioServerParameters(command=COMMAND[0], args=[*COMMAND[1:], *arguments], env=ENVIRONMENT)
    async with Client(parameters) as client:
        assert client.server_info
        assert client.server_info.name == "retrv-r1"
        assert "Cite what you use by its id" in (client.instructions or "")
        answer = await client.call_tool("inspect", {"id": "1"})
    assert answer.is_error
    assert "Run `retrv-r1 index SOURCE` first" in answer.content[0].model_dump()["text"]


def test_the_http_config_fits_the_server_beside_it(tmp_path: Path) -> None:
    [client] = configs("http-client")
    [toml] = re.findall(r"```toml\n(\[serve\].*?)^```\n\n```bash\n(.*?)^```", PAGE, re.S | re.M)
    (tmp_path / "retrv.toml").write_text(toml[0])
    config = read_config(tmp_path / "retrv.toml")
    assert shlex.split(toml[1])[:2] == ["retrv-r1", "mcp"]
    assert client["url"] == f"http://{config.mcp.host}:{config.mcp.port}/mcp"
    assert client["headers"]["Authorization"] == f"Bearer ${{{config.serve.api_key_env}}}"


def test_every_json_block_is_held_against_something() -> None:
    assert PAGE.count("```json") == len(configs("client")) + len(configs("http-client")) == 3
