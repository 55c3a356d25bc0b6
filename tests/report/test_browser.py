"""The page in a real browser, at desktop and phone width: opens in time, says nothing on the console, does what it offers."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retrv_r1_retriever.cli.demo import HEADER
from retrv_r1_retriever.report import ReportTable, write_report
from retrv_r1_retriever.report.browse import MANY
from tests.browser import SIZES, opened
from tests.report.samples import fallback, many, rescued, text_list

QUERIES = 200
SECONDS = 2.0  # from the click to the painted page, as a person waits
CPU_SECONDS = 1.0

#: Where screenshots are kept for a person to look at; by default with the test's other files.
SHOTS = os.environ.get("RETRV_SCREENSHOTS")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "large.html", many(QUERIES), title="traces.jsonl")


async def shoot(tab: Any, folder: Path, name: str) -> None:
    """A screenshot that shows something: neither blank nor cut at the side."""
    png = await tab.screenshot(path=str((Path(SHOTS) if SHOTS else folder) / f"{name}.png"))
    assert len(Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24) or ()) > 50
    width = await tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]


async def seconds_to_paint(tab: Any, url: str) -> float:
    started = time.perf_counter()
    await tab.goto(url)
    await tab.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return time.perf_counter() - started


@pytest.mark.parametrize("size", SIZES)
async def test_two_hundred_traces_open_in_time_and_can_be_searched(
    large: Path, tmp_path: Path, size: str, record_property: Callable[[str, object], None]
) -> None:
    async with opened(large.as_uri(), size) as page:
        tab = page.tab
        await shoot(tab, tmp_path, f"traces-{size}")
        session = await tab.context.new_cdp_session(tab)
        await session.send("Performance.enable")
        spent = {m["name"]: m["value"] for m in (await session.send("Performance.getMetrics"))["metrics"]}
        assert spent["ProcessTime"] < CPU_SECONDS
        waits: list[float] = []
        while min(waits, default=SECONDS) >= SECONDS and len(waits) < 5:  # other processes may hold the cores
            waits.append(await seconds_to_paint(tab, large.as_uri()))
        record_property(f"seconds until 200 traces are painted, {size}", waits)
        assert min(waits) < SECONDS, waits

        async def shown() -> str:
            words: str = await tab.inner_text("output")
            assert await tab.locator("section.query:visible").count() == int(words.split()[0])
            return words

        assert await shown() == "200 queries"
        await tab.select_option("select[name=status]", "fallback")
        assert await shown() == "20 of 200 queries"
        await tab.select_option("select[name=status]", "")
        await tab.select_option("select[name=stop]", "forced_by_budget")
        assert await shown() == "26 of 200 queries"
        await tab.select_option("select[name=stop]", "")
        await tab.select_option("select[name=change]", "first")
        assert await shown() == "80 of 200 queries"
        await tab.select_option("select[name=change]", "overruled")
        assert await shown() == "180 of 200 queries"
        await tab.fill("input[name=words]", "SKU-17-49 was")
        assert await shown() == "1 of 200 queries"
        await tab.fill("input[name=words]", "no such word")
        assert await shown() == "0 of 200 queries"
        assert await tab.is_visible("text=No query here fits these filters.")
        await tab.fill("input[name=words]", "number 17")

        query = tab.locator("section.query:visible").first
        assert await query.locator("img").first.get_attribute("src") is None
        await query.locator("summary").first.click()
        picture = query.locator("img[src]").first
        await picture.evaluate("(image) => image.complete || new Promise((done) => (image.onload = done))")
        assert await picture.evaluate("(image) => image.naturalWidth") == 64
        assert await query.locator("text=Opens #4 in full").is_visible()
        await shoot(tab, tmp_path, f"trace-{size}")
        assert page.problems == []


async def test_a_link_to_a_query_opens_it(large: Path) -> None:
    async with opened(f"{large.as_uri()}#q150", "phone") as page:
        assert await page.tab.is_visible("#q150 .outcome")
        assert page.problems == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [2, MANY])
async def test_the_longest_words_of_an_evaluation_fit(tmp_path: Path, size: str, count: int) -> None:
    lost = replace(rescued(), kind="K=127 always/promote: lost by reranking: direct read")
    path = write_report(tmp_path / "kinds.html", [lost] * count)
    async with opened(path.as_uri(), size) as page:
        await shoot(page.tab, tmp_path, f"kinds-{count}-{size}")
        cut = "[...document.querySelectorAll('.kind')].filter((words) => words.scrollWidth > words.clientWidth).length"
        assert await page.tab.evaluate(cut) == 0


@pytest.mark.parametrize("size", SIZES)
async def test_a_few_queries_are_all_unfolded(tmp_path: Path, size: str) -> None:
    table = ReportTable("All queries", HEADER, (("coarse", *["0.123"] * 6), ("all", "", *["0.123"] * 5)), "A note.")
    settings = ReportTable("Configuration", ("", ""), (("checkpoint", "/a/long/path/without/spaces" * 4),))
    entries = [rescued(), text_list(), fallback()]
    path = write_report(tmp_path / "few.html", entries, tables=[table, settings])
    async with opened(path.as_uri(), size) as page:
        tab = page.tab
        wide = "[...document.querySelectorAll('.scroll')].filter((box) => box.scrollWidth > box.clientWidth).length"
        assert await tab.evaluate(wide) == 0, "a table is cut at the side"
        over = await tab.evaluate("getComputedStyle(document.querySelectorAll('td')[1], '::before').content")
        assert await tab.is_visible("th:text-is('first stage R@1')") or over == '"first stage R@1"'
        assert await tab.locator("form, script").count() == 0
        assert await tab.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
        await shoot(tab, tmp_path, f"few-{size}")
        assert page.problems == []
