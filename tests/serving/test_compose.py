"""examples/serving: the compose file is not run here, but it is what it says it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from retrv_r1_retriever.config import read_config
from retrv_r1_retriever.engines.vllm import TEMPLATE

FOLDER = Path(__file__).parents[2] / "examples" / "serving"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))


def test_the_parts_find_one_another() -> None:
    config, services = read_config(FOLDER / "retrv.toml"), COMPOSE["services"]
    assert config.store.url == "http://qdrant:6333"
    assert config.engine.base_url == "http://vllm:8000/v1"
    assert {"qdrant", "vllm"} < set(services)
    vllm, serve = services["vllm"], services["serve"]
    assert f"--served-model-name={config.engine.model}" in vllm["command"]
    assert f"--chat-template={TEMPLATE}" in vllm["command"]
    mounted = {re.search(r":(/[^:]+)", volume)[1] for volume in serve["volumes"]}  # type: ignore[index]
    assert {config.model.checkpoint, str(config.images.root)} < mounted
    assert {config.engine.api_key_env, config.serve.api_key_env} == set(serve["environment"])
    assert config.engine.api_key_env in vllm["environment"]
    assert serve["ports"] == [f"8080:{config.serve.port}"]


def test_only_serve_is_reachable() -> None:
    """Embedding rows from outside would go past every escape."""
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    for name, service in COMPOSE["services"].items():
        assert ("ports" in service) == (name == "serve")
        assert service["networks"] == (["inside", "outside"] if name == "serve" else ["inside"])
