"""One real server for all tests of this folder, and the local engine on the same weights to compare it with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from retrv_r1_retriever.config import Config, checkpoint_path
from retrv_r1_retriever.engines.local import LocalEngine
from retrv_r1_retriever.engines.vllm import VllmEngine
from tests.vllm.server import MODEL, PYTHON, Running, vllm_server
from tests.vllm.shop import make_shop


@pytest.fixture(scope="session")
def installed() -> Path:
    """The interpreter of an environment with vLLM."""
    if not PYTHON.exists():
        reason = f"no vLLM at {PYTHON}: run `make vllm-env`, or `make test-vllm`, which does"
        (pytest.fail if os.environ.get("RETRV_VLLM_REQUIRED") else pytest.skip)(reason)
    return PYTHON


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A started server; RETRV_VLLM_URL names one that runs already, with the flags of `server.FLAGS`."""
    if url := os.environ.get("RETRV_VLLM_URL"):
        yield Running(url, checkpoint_path(Config()), Path(os.devnull))
        return
    request.getfixturevalue("installed")
    with vllm_server(tmp_path_factory.mktemp("vllm")) as running:
        yield running


@pytest.fixture
def engine(server: Running) -> VllmEngine:
    return VllmEngine(server.checkpoint, base_url=server.base_url, model=MODEL)


@pytest.fixture(scope="session")
def local(server: Running) -> LocalEngine:
    torch.set_num_threads(1)
    return LocalEngine.from_pretrained(server.checkpoint, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def shop(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index of cards and the config beside it; one process at a time can open it."""
    folder = tmp_path_factory.mktemp("shop")
    make_shop(folder, server)
    return folder
