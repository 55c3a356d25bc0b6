"""The documentation site: builds without a broken link, names all that is public, and looks right in a browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import langchain_retrv_r1
import llama_index_retrv_r1
import pytest

import retrv_r1_retriever
import retrv_r1_retriever.engines.chat
import retrv_r1_retriever.engines.local
import retrv_r1_retriever.engines.vllm
from retrv_r1_retriever import engines, report
from tests.browser import SIZES, opened

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def _pages(site: Path) -> list[Path]:
    return sorted(path for path in site.glob("*.html") if path.name != "404.html")  # that one needs a server


@pytest.mark.slow
def test_the_reference_has_all_public_names(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    documented = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="([\w.]+)"', page)}
    public = (
        retrv_r1_retriever,
        langchain_retrv_r1,
        llama_index_retrv_r1,
        report,
        engines.local,
        engines.vllm,
        engines.chat,
    )
    for module in public:
        assert set(module.__all__) - documented == set(), module.__name__


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
async def test_pages_are_quiet_and_fit(site: Path, tmp_path: Path, size: str) -> None:
    folder = Path(os.environ.get("RETRV_SCREENSHOTS", tmp_path))
    pages = _pages(site)
    assert len(pages) > 25
    async with opened((site / "index.html").as_uri(), size) as page:
        for path in pages:
            await page.tab.goto(path.as_uri())
            await page.tab.screenshot(path=str(folder / f"site-{path.stem}-{size}.png"))
            width = await page.tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
            assert width[0] <= width[1], path.name
            assert page.problems == [], path.name


@pytest.mark.slow
async def test_the_search_finds_a_page(site: Path) -> None:
    """Served, because browsers let no page that is a file read its index."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        async with opened(f"http://127.0.0.1:{server.server_address[1]}/index.html", "desktop") as page:
            await page.tab.locator("input[name=query]").click()
            await page.tab.keyboard.type("tenant")
            await page.tab.wait_for_selector(".md-search-result__item")
            assert "Tenants" in await page.tab.inner_text(".md-search-result")
            assert page.problems == []
        server.shutdown()


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")} | {"index.md", "examples.md"}
