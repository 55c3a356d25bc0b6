"""A real browser without a window, for tests of pages; where there is none they are skipped and say so."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


@dataclass
class Page:
    """problems: errors and warnings of the console, exceptions, requests that left the page."""

    tab: Any  # playwright's Page
    problems: list[str] = field(default_factory=list)


@asynccontextmanager
async def opened(url: str, size: str) -> AsyncIterator[Page]:
    """The page at `url` in a fresh browser of this size. Needs playwright and a Chromium on the PATH (or playwright's own)."""
    playwright = pytest.importorskip(
        "playwright.async_api", reason="playwright is not installed: no page was looked at"
    )
    width, height = SIZES[size]
    async with playwright.async_playwright() as api:
        found = next(filter(None, map(shutil.which, (api.chromium.executable_path, *_NAMES))), None)
        if found is None:
            pytest.skip(f"no browser on this machine (none of {', '.join(_NAMES)}): no page was looked at")
        browser = await api.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            tab = await browser.new_page(viewport={"width": width, "height": height})
            page = Page(tab)
            tab.on("console", lambda m: page.problems.append(m.text) if m.type in ("error", "warning") else None)
            tab.on("pageerror", lambda error: page.problems.append(str(error)))
            tab.on("requestfailed", lambda request: _failed(page, request))
            await tab.goto(url)
            yield page
        finally:
            await browser.close()


def _failed(page: Page, request: Any) -> None:
    if request.failure != "net::ERR_ABORTED":  # the tab went on to another page
        page.problems.append(f"{request.failure}: {request.url[:200]}")
