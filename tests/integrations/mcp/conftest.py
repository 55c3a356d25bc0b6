"""An index of two tenants on the shipped miniature checkpoint, and `retrv-r1 mcp` in processes of its own."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from mcp import Client, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared._httpx_utils import create_mcp_http_client

from retrv_r1_retriever import Content, Document, EdgeStore, Indexer, LocalImages
from retrv_r1_retriever.config import Config, collection_spec, open_embedder, open_engine
from retrv_r1_retriever.demo.catalogue import SPLITS, Card, make_cards, render

COMMAND = [sys.executable, "-m", "retrv_r1_retriever.cli", "mcp"]
KEYS = {"ALPHA_KEY": "alpha-key", "BETA_KEY": "beta-key"}
ENVIRONMENT = {name: os.environ[name] for name in ("PYTHONPATH", "PATH", "OMP_NUM_THREADS") if name in os.environ}


@dataclass(frozen=True)
class Shop:
    """cards: alpha's, `alpha-0` the first; beta has `beta-0`. folder/query: pictures that an agent may name."""

    folder: Path
    cards: list[Card]

    def config(self, name: str, more: str) -> Path:
        path = self.folder / f"{name}.toml"
        path.write_text(f"[rerank]\ntop_k = 12\ntimeout_s = 120.0\n[images]\nroot = 'pictures'\n{more}")
        return path


@pytest.fixture(scope="package")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    for name in ("pictures", "query"):
        (folder / name).mkdir()
    cards = [card for card, stratum in make_cards(SPLITS["test"]) if stratum == "coarse"][:12]
    for i, card in enumerate(cards):
        render(card, random.Random(i)).save(folder / "pictures" / f"{i}.png")
        render(card, random.Random(100 + i)).save(folder / "query" / f"{i}.png")
    engine, embedder = open_engine(Config()), open_embedder(Config())
    store = EdgeStore(folder / "retrv-index", spec=collection_spec(engine, embedder))
    for tenant, count in (("alpha", 12), ("beta", 1)):
        documents = [Document(f"{tenant}-{i}", Content(image=f"{i}.png"), {"number": i}) for i in range(count)]
        Indexer(store.for_tenant("tenant", tenant), embedder, engine, LocalImages(folder / "pictures")).index(documents)
    asyncio.run(store.close())
    return Shop(folder, cards)


@dataclass(frozen=True)
class Reached:
    """A server and how to call it. log: what it wrote to standard error."""

    connect: Callable[[], AbstractAsyncContextManager[Client]]
    log: Callable[[], str]


@pytest.fixture
def stdio(shop: Shop, tmp_path: Path) -> Reached:
    """Speaks for alpha, as [store] says; may read below `query`."""
    config = shop.config("stdio", "[store]\ntenant_field = 'tenant'\ntenant_value = 'alpha'\n")
    arguments = [*COMMAND[1:], "--config", str(config), "--image-root", str(shop.folder / "query")]
    parameters = StdioServerParameters(command=COMMAND[0], args=arguments, env=ENVIRONMENT)

    @asynccontextmanager
    async def connect() -> AsyncIterator[Client]:
        with (tmp_path / "log").open("w") as log:
            async with Client(stdio_client(parameters, errlog=log)) as client:
                yield client

    return Reached(connect, (tmp_path / "log").read_text)


@dataclass(frozen=True)
class Running:
    url: str
    log: Path

    @asynccontextmanager
    async def connect(self, key: str = "alpha-key") -> AsyncIterator[Client]:
        async with (
            create_mcp_http_client({"authorization": f"Bearer {key}"}) as http,
            Client(streamable_http_client(self.url, http_client=http)) as client,
        ):
            yield client


@pytest.fixture(scope="module")
def http(shop: Shop) -> Iterator[Running]:
    """Speaks for alpha and beta, by key; on a copy of the index, which one process at a time may have open."""
    shutil.copytree(shop.folder / "retrv-index", shop.folder / "http-index")
    tenants = "tenant_field = 'tenant'\ntenants = {alpha = 'ALPHA_KEY', beta = 'BETA_KEY'}"
    config = shop.config("http", f"[store]\npath = 'http-index'\n[serve]\n{tenants}\n")
    log = shop.folder / "http.log"
    argv = [*COMMAND, "--config", str(config), "--http", "--port", "0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(argv, env={**ENVIRONMENT, **KEYS}, stderr=stderr, stdout=subprocess.PIPE)
        try:
            yield Running(_address(process, log), log)
        finally:
            process.terminate()
            out, _ = process.communicate(timeout=60)
    assert out == b""


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        said = [line for line in log.read_text().splitlines() if "running on http" in line]
        if said:
            return said[0].partition("running on ")[2].split()[0] + "/mcp"
        time.sleep(0.1)
    raise AssertionError(f"no server: {log.read_text()}")
