"""The documentation site: builds without a broken link, names all that is public, and looks right in a browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import retrv_r1_retriever
from tests.browser import SIZES, opened

ROOT = Path(__file__).parents[1]
PAGES = ("index.html", "api.html", "observability.html", "examples.html")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_reference_has_all_public_names(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    documented = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="([\w.]+)"', page)}
    assert set(retrv_r1_retriever.__all__) - documented == set()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
async def test_pages_are_quiet_and_fit(site: Path, tmp_path: Path, size: str) -> None:
    folder = Path(os.environ.get("RETRV_SCREENSHOTS", tmp_path))
    async with opened((site / "index.html").as_uri(), size) as page:
        for name in PAGES:
            await page.tab.goto((site / name).as_uri())
            await page.tab.screenshot(path=str(folder / f"site-{name}-{size}.png"))
            width = await page.tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
            assert width[0] <= width[1], name
        assert page.problems == []


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")} | {"index.md", "examples.md"}
