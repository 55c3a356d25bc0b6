"""What `retrv-r1 mcp` refuses before a client could be left waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrv_r1_retriever.cli import main
from retrv_r1_retriever.config import read_config
from retrv_r1_retriever.errors import OptionsError

TENANTS = "[serve]\ntenant_field = 'shop'\ntenants = {acme = 'ACME_KEY'}\n"
KEY = "[serve]\napi_key_env = 'RETRV_API_KEY'\n"


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ("", ["--http"], "--http: expected an API key for its callers, got none"),
        ("", ["--port", "1"], "--host, --port: expected --http beside it, got none"),
        (TENANTS, [], "[serve] tenants: expected none over stdio, got some"),
        (TENANTS, ["--http", "--image-root", "."], "--image-root: expected none beside [serve] tenants, got one"),
        (KEY, ["--http", "--host", "0.0.0.0"], "--host 0.0.0.0: expected hosts beside it, got none"),
        (KEY, ["--http"], "environment variable RETRV_API_KEY: expected an API key, got nothing"),
        ("", ["--image-root", "nowhere"], "LocalImages root: expected a folder"),
    ],
)
def test_mistakes(
    config: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETRV_API_KEY", raising=False)
    (tmp_path / "retrv.toml").write_text(config)
    assert main(["mcp", *arguments]) == 2
    said = capsys.readouterr()
    assert (said.out, message in said.err) == ("", True), said.err


@pytest.mark.parametrize("wrong", ["images = 'some'", "image_tokens = 0", "max_results = 0", "port = 70000"])
def test_the_config_is_checked(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "retrv.toml").write_text(f"[mcp]\n{wrong}\n")
    with pytest.raises(OptionsError, match=wrong.partition(" ")[0]):
        read_config(tmp_path / "retrv.toml")
